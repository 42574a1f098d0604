"""How accelerate() takes over a block: the contract between the core and the families.

A family is one kind of block in other people's models. It is a subclass of `Family`, registered by `@register`, in a
file of its own in `families/`; it never imports the package whose blocks it knows. What it says:

    name       its key in reports and in `python -m zeroblock info NAME`; also the name of its counter
    classes    the names of the classes it may know (of the block's class or one of its bases)
    method     the method that accelerate replaces, "forward" unless the class has an inner one ("_forward")
    inner      whether it leaves blocks alone that belong to an outer block (see below)
    only_skips  whether its forward is the original unless it skips: the original runs what is not zero, and under
               torch.compile, where no branch is skipped as a whole, everything
    docstring  what the user reads: the formula, the source, then what is skipped while zero in inference, in training
               forward and in training backward (three lines of use)

and four methods, `block` being the foreign module:

    match(block, path, root)     None when the block has this family's structure, else the reason why it has not
    forward(block, *a, **kw)     the method's replacement, built of zeroblock.functional and the forwards in
                                 zeroblock.blocks, obeying self.zero_skip. It looks at the block anew at each call:
                                 layers that are replaced, hooked, parametrised or quantised by then, and arguments
                                 it does not know, go to `return self.eager(block, *a, **kw)`, the original
    branches(block)              {name of a residual branch: the tensors that hold it at zero together}
    example(block)               arguments of the method, small CPU tensors in float32, for the proof below

Nobody can tell by its name whether a block computes what its namesake does, so `accelerate` proves it: a copy of the
block with random parameters runs both forwards in train mode under one seed, and their results and the gradients of
their inputs must agree (`proof.py`). A family that needs no proof, because it calls the original and only skips,
returns None from `example`. The proof makes subclasses and modified forwards safe: they fit or are left alone.

Nested blocks are all visited, outer first. `inner` families (single zero layers, attention of any block) leave those in
`inner_modules(block)` (default: all submodules) to the block, which may need to find them unchanged.

An accelerated block changes nothing but its class: to a subclass of its own class, created once for each family and
set of options, which holds the replaced method. Its attributes, parameters, hooks and `isinstance` relations stay;
pickle and torch.save write the original class; copy and deepcopy stay accelerated.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable
from copyreg import __newobj__ as _newobj  # type: ignore[attr-defined]
from copyreg import _reconstructor  # type: ignore[attr-defined]
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..backends import available as _backends
from ..plan import mode as _mode

FAMILIES: dict[str, type[Family]] = {}


class Family:
    """One kind of block (see above). An instance holds the options of one call of accelerate."""

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    method: ClassVar[str] = "forward"
    inner: ClassVar[bool] = False
    only_skips: ClassVar[bool] = False

    def __init__(self, zero_skip: str = "auto", backend: str = "auto", precision: str = "strict"):
        self.zero_skip, self.backend, self.precision = zero_skip, backend, precision

    def knows(self, block: nn.Module) -> bool:
        """Whether the block could be one of this family's, by the names of its class and bases."""
        return any(c.__name__ in self.classes for c in type(block).__mro__)

    def match(self, block: nn.Module, path: str, root: nn.Module) -> str | None:
        raise NotImplementedError

    def forward(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        raise NotImplementedError

    def example(self, block: Any) -> tuple | None:
        raise NotImplementedError

    def proof_target(self, block: nn.Module) -> nn.Module:
        """What the proof copies: the block, or less of it where the rest proves nothing."""
        return block

    def inner_modules(self, block: nn.Module) -> Iterable[nn.Module]:
        return block.modules()

    def on_class_created(self, kind: type[nn.Module]) -> None:
        """Called once for every subclass that `accelerated_class` creates for this family."""

    def eager(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        """The method the block had before accelerate."""
        return type(block)._zeroblock.method(block, *args, **kwargs)


def register(family: type[Family]) -> type[Family]:
    has_docstring = family.__doc__ or sys.flags.optimize >= 2  # which strips them
    if not has_docstring or family.name in FAMILIES:
        raise TypeError(f"register: {family.__name__} needs a docstring and a name of its own")
    FAMILIES[family.name] = family
    return family


def lacks(block: nn.Module, *paths: str) -> str | None:
    """The reason why a block does not have a family's structure: the first of these attributes ("a.0.b") it lacks."""
    for path in paths:
        found: Any = block
        for name in path.split("."):
            found = found[int(name)] if name.isdigit() and _has_item(found, int(name)) else getattr(found, name, None)
            if found is None:
                return f"it has no {path}"
    return None


def _has_item(m: Any, i: int) -> bool:
    return isinstance(m, (nn.Sequential, nn.ModuleList)) and i < len(m)


# ---- the class of an accelerated block ------------------------------------------------------------------------------


class _Applied:
    """What the class of an accelerated block knows about itself."""

    def __init__(self, original: type, family: Family):
        self.original, self.family = original, family
        # The function itself: torch.compile cannot look it up on a class marked allow_in_graph (diffusers' Attention).
        self.method: Callable[..., Any] = getattr(original, family.method)


_classes: dict[tuple, type] = {}


def accelerated_class(original: type, family: Family) -> type:
    """The subclass of `original` whose method is the family's; one per class, family and options. TypeError when the
    class cannot be extended."""
    key = (original, type(family), family.zero_skip, family.backend, family.precision)
    if key not in _classes:
        known = _Applied(original, family)
        body = {
            "_zeroblock": known,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": _pickled_as(original),
            "__deepcopy__": _copied_as(original, copy.deepcopy),
            "__copy__": _copied_as(original, copy.copy),
            family.method: _replacement(known),
        }
        _classes[key] = types.new_class(original.__name__, (original,), exec_body=lambda ns: ns.update(body))
        family.on_class_created(_classes[key])
    return _classes[key]


def applied(block: nn.Module) -> _Applied | None:
    """What accelerate did to this block, None when it is untouched."""
    return getattr(type(block), "_zeroblock", None)


def _replacement(known: _Applied) -> Callable:
    original, family, method = known.original, known.family, known.method
    name, forward, backend, fast = family.method, family.forward, family.backend, family.precision == "fast"
    only_skips = family.only_skips
    parameters = inspect.signature(forward).parameters.values()
    names = tuple(p.name for p in parameters)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    most = _most_positional(forward, method)

    @functools.wraps(method)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiled = is_compiling()
        if compiled and only_skips:
            return method(self, *args, **kwargs)
        if len(args) > most or kwargs and not takes_all and _has_others(kwargs, names):
            return method(self, *args, **kwargs)  # a fork's own argument
        if not compiled and getattr(original, name) is not method:
            return getattr(original, name)(self, *args, **kwargs)  # somebody patched the class since
        if compiled or backend == "auto" and not fast:  # what runs when it was compiled asks for its backend then
            return forward(self, *args, **kwargs)
        with contextlib.ExitStack() as options:
            if backend != "auto":
                options.enter_context(_backends.use_backend(backend))
            if fast:
                options.enter_context(_mode.allow_reduced())
            return forward(self, *args, **kwargs)

    return replaced


def _has_others(kwargs: dict[str, Any], names: tuple[str, ...]) -> bool:
    for name in kwargs:
        if name not in names:
            return True
    return False


def _most_positional(forward: Callable, method: Callable) -> float:
    """How many positional arguments mean the same to a family's forward(block, ...) as to the method(self, ...) that it
    replaces: those that the proof passes, then as far as the names agree."""
    ours = list(inspect.signature(forward).parameters.values())[1:]
    try:
        theirs = list(inspect.signature(method).parameters)[1:]
    except ValueError:  # a builtin's is not known
        theirs = [p.name for p in ours]
    most = 0
    for i, p in enumerate(ours):
        if p.kind is inspect.Parameter.VAR_POSITIONAL:
            return math.inf
        if p.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            break
        if p.default is not inspect.Parameter.empty and theirs[i : i + 1] != [p.name]:
            break
        most += 1
    return most


def _pickled_as(original: Any) -> Callable:
    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Pickles as the original class."""
        reduced = original.__reduce_ex__(self, protocol)
        if isinstance(reduced, str) or type(self)._zeroblock.original is not original:
            return reduced
        function, args, *rest = reduced
        args = tuple(original if a is type(self) else a for a in args)
        if function is _newobj and args == (original,):  # which insists on the object's own class
            function, args = _reconstructor, (original, object, None)
        return function, args, *rest

    return __reduce_ex__


def _copied_as(original: type, copier: Callable) -> Callable:
    def method(self: Any, *args: Any) -> Any:
        """A copy as the original class makes it, accelerated like the block it was taken of."""
        accelerated = type(self)
        self.__class__ = original
        try:
            twin = copier(self, *args)
        finally:
            self.__class__ = accelerated
        twin.__class__ = accelerated
        return twin

    return method
