"""How accelerate() takes over a block: the contract between the core and the families.

A family is one kind of block in other people's models. It is a subclass of `Family`, registered by `@register`, in a
file of its own in `families/`; it never imports the package whose blocks it knows. What it says:

    name       its key in reports and in `python -m zeroblock info NAME`; also the name of its counter
    classes    the names of the classes it may know (of the block's class or one of its bases)
    method     the method that accelerate replaces, "forward" unless the class has an inner one ("_forward"; `entry`,
               where it is one or the other)
    inner      whether it leaves alone what belongs to an outer block (see below)
    only_skips  whether its forward is the original unless it skips: the original runs what is not zero, and under
               torch.compile, where no branch is skipped as a whole, everything
    docstring  what the user reads: the formula, the source, then what is skipped while zero in inference, in training
               forward and in training backward (three lines of use)

and four methods, `block` being the foreign module:

    match(block, path, root)     None when the block has this family's structure, else why it has not
    forward(block, *a, **kw)     the method's replacement, built of zeroblock.functional and the forwards in
                                 zeroblock.blocks, obeying self.zero_skip. It looks at the block anew at each call:
                                 layers that are replaced, hooked, parametrised or quantised by then, and arguments
                                 it does not know, go to `return self.eager(block, *a, **kw)`, the original
    branches(block)              {name of a residual branch: the tensors that hold it at zero together}
    example(block, side)         positional arguments of the method, small CPU tensors in float32 with two samples, for
                                 images of side x side pixels or side ** 2 tokens
    options(block)               {name: values} to try: what else the family's forward takes (the method's optional
                                 arguments), beside example(block, SMALL)

Nobody can tell by its name whether a block computes what its namesake does, so `accelerate` proves it: a copy of the
block with random parameters runs both forwards, and their results and gradients must agree (`proof.py`). A family that
needs no proof, because it only skips, returns None from `example`. At a call, what the proof has not seen goes to the
original: an argument that is neither in `example` nor in `options`, or about which both forwards do not agree, unless
it has its default value. So does a call for which the original is faster (`choice.py`).

Outer blocks come first. `inner` families (zero layers, attention) leave `inner_modules(block)` (default: all) to it.

An accelerated block changes nothing but its class: to a subclass, created once for each family and set of options,
which holds the replaced method. Attributes, parameters, hooks and `isinstance` stay; pickle and torch.save write the
original class; copy and deepcopy stay accelerated.
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
from .choice import choice_of
from .report import Obstacle, Reason

FAMILIES: dict[str, type[Family]] = {}

# The side of an example of few pixels or tokens.
SMALL = 2


class Family:
    """One kind of block (see above). An instance holds the options of one call of accelerate."""

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    method: ClassVar[str] = "forward"
    inner: ClassVar[bool] = False
    only_skips: ClassVar[bool] = False

    def __init__(self, zero_skip: str = "auto", backend: str = "auto", precision: str = "strict", prefer: str = ""):
        self.zero_skip, self.backend, self.precision, self.prefer = zero_skip, backend, precision, prefer

    def knows(self, block: nn.Module) -> bool:
        """Whether the block could be one of this family's, by the names of its class and bases."""
        return any(c.__name__ in self.classes for c in type(block).__mro__)

    def match(self, block: nn.Module, path: str, root: nn.Module) -> Obstacle | None:
        raise NotImplementedError

    def forward(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        raise NotImplementedError

    def example(self, block: Any, side: int) -> tuple | None:
        raise NotImplementedError

    def options(self, block: Any) -> dict[str, tuple]:
        return {}

    def entry(self, kind: type[nn.Module]) -> str:
        """The name of the method that is replaced in blocks of this class."""
        return self.method

    def proof_target(self, block: nn.Module) -> nn.Module:
        """What the proof copies: the block, or less of it where the rest proves nothing."""
        return block

    def forget(self, block: nn.Module) -> None:
        """Takes from a copy of the block what it keeps from call to call, before each run of the proof."""

    def inner_modules(self, block: nn.Module) -> Iterable[nn.Module]:
        return block.modules()

    def on_class_created(self, kind: type[nn.Module]) -> None:
        """Called once for every subclass that `accelerated_class` creates."""

    def eager(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        """The method the block had before accelerate."""
        return type(block)._zeroblock.method(block, *args, **kwargs)


def register(family: type[Family]) -> type[Family]:
    """Decorator: accelerate knows this family. TypeError when its name is taken, or it lacks a docstring."""
    has_docstring = family.__doc__ or sys.flags.optimize >= 2  # which strips them
    if not has_docstring or family.name in FAMILIES:
        raise TypeError(f"register: {family.__name__} needs a docstring and a name of its own")
    FAMILIES[family.name] = family
    return family


def lacks(block: nn.Module, *paths: str) -> Obstacle | None:
    """Why a block does not have a family's structure: the first of these attributes ("a.0.b") it lacks."""
    for path in paths:
        found: Any = block
        for name in path.split("."):
            found = found[int(name)] if name.isdigit() and _has_item(found, int(name)) else getattr(found, name, None)
            if found is None:
                return Obstacle(Reason.NAMESAKE, f"it has no {path}")
    return None


def _has_item(m: Any, i: int) -> bool:
    return isinstance(m, (nn.Sequential, nn.ModuleList)) and i < len(m)


# ---- the class of an accelerated block ------------------------------------------------------------------------------


class _Applied:
    """What the class of an accelerated block knows about itself."""

    def __init__(self, original: type, family: Family):
        self.original, self.family = original, family
        self.name = family.entry(original)
        # torch.compile cannot look it up on a class marked allow_in_graph (diffusers' Attention).
        self.method: Callable[..., Any] = getattr(original, self.name)
        self.choice = choice_of(family, keeps_state=type(family).forget is not Family.forget)


_classes: dict[tuple, type] = {}


def accelerated_class(original: type, family: Family, proved: frozenset[str] | None = None) -> type:
    """The subclass of `original` whose method is the family's; one per class, family, options and `proved`, which
    optional arguments the family may be given (None: all). TypeError when the class cannot be extended."""
    key = (original, type(family), family.zero_skip, family.backend, family.precision, family.prefer, proved)
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
            known.name: _replacement(known, proved),
        }
        _classes[key] = types.new_class(original.__name__, (original,), exec_body=lambda ns: ns.update(body))
        family.on_class_created(_classes[key])
    return _classes[key]


def applied(block: nn.Module) -> _Applied | None:
    """What accelerate did to this block, None when it is untouched."""
    return getattr(type(block), "_zeroblock", None)


def _replacement(known: _Applied, proved: frozenset[str] | None) -> Callable:
    original, family, method, name = known.original, known.family, known.method, known.name
    forward, backend, fast = family.forward, family.backend, family.precision == "fast"
    only_skips, choice = family.only_skips, known.choice
    taken = _Taken(forward, method, proved)
    sure = taken.sure

    @functools.wraps(method)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiled = is_compiling()
        if compiled and only_skips:
            return method(self, *args, **kwargs)
        if len(args) > sure and not taken.positional(args) or kwargs and not taken.keywords(kwargs, len(args)):
            return method(self, *args, **kwargs)  # a fork's own argument, or one that was not proved
        if not compiled and getattr(original, name) is not method:
            return getattr(original, name)(self, *args, **kwargs)  # somebody patched the class since
        if not compiled and choice is not None and choice.prefers_original(self, forward, method, args, kwargs):
            return method(self, *args, **kwargs)
        if compiled or backend == "auto" and not fast:  # what runs when it was compiled asks for its backend then
            return forward(self, *args, **kwargs)
        with contextlib.ExitStack() as options:
            if backend != "auto":
                options.enter_context(_backends.use_backend(backend))
            if fast:
                options.enter_context(_mode.allow_reduced())
            return forward(self, *args, **kwargs)

    return replaced


class _Taken:
    """The arguments that mean the same to a family's forward(block, ...) as to the method(self, ...) that it replaces,
    and were proved."""

    def __init__(self, forward: Callable, method: Callable, proved: frozenset[str] | None):
        ours = list(inspect.signature(forward).parameters.values())[1:]
        theirs = _names(method) or [p.name for p in ours]
        default = {p.name: p.default for p in ours if p.default is not inspect.Parameter.empty}
        unproved = [] if proved is None else [n for n in default if n not in proved]
        # How many positional ones: the required ones, which the proof passes, then as far as the names agree.
        self.most = 0.0
        for i, p in enumerate(ours):
            if p.kind is inspect.Parameter.VAR_POSITIONAL:
                self.most = math.inf
            if (
                p.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD
                or p.name in default
                and theirs[i : i + 1] != [p.name]
            ):
                break
            self.most = i + 1.0
        self.unproved = [(i, p.default) for i, p in enumerate(ours) if p.name in unproved]
        # So many need no look at their values.
        self.sure = min([self.most, *(i for i, _ in self.unproved)])
        # By keyword, with any value: a required one must have its name in the same place there.
        placed = [p.name for p, name in zip(ours, theirs, strict=False) if p.name == name]
        self.any_value = dict.fromkeys(n for n in (*placed, *default) if n not in unproved)
        self.default = {n: default[n] for n in unproved if n in theirs}
        self.others = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours)
        self.named = dict.fromkeys(p.name for p in ours)
        self.required = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in default]

    def positional(self, args: tuple[Any, ...]) -> bool:
        return len(args) <= self.most and all(args[i] is value for i, value in self.unproved if i < len(args))

    def keywords(self, kwargs: dict[str, Any], positional: int) -> bool:
        for name, value in kwargs.items():
            if name in self.any_value or name in self.default and value is self.default[name]:
                continue
            # What a family takes as **kwargs; a required one under another name leaves it without.
            if name in self.named or not self.others or not all(n in kwargs for n in self.required[positional:]):
                return False
        return True


def _names(method: Callable) -> list[str]:
    """The names of a method's parameters after self; none where they are not known, as those of a builtin."""
    try:
        return list(inspect.signature(method).parameters)[1:]
    except ValueError:
        return []


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
