"""The class of an accelerated block: a subclass of the block's own, which holds the replaced method."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import sys
import types
from collections.abc import Callable
from copyreg import __newobj__ as _newobj  # type: ignore[attr-defined]
from copyreg import _reconstructor  # type: ignore[attr-defined]
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from ..backends import available as _backends
from ..plan import mode as _mode
from .choice import choice_of
from .family import Family


class _Applied:
    """What the class of an accelerated block knows about itself."""

    def __init__(self, original: type, family: Family):
        self.original, self.family = original, family
        self.name = family.entry(original)
        # The function itself: torch.compile cannot look it up on a class marked allow_in_graph (diffusers' Attention).
        self.method: Callable[..., Any] = getattr(original, self.name)
        self.choice = choice_of(family, keeps_state=type(family).forget is not Family.forget)


_classes: dict[tuple, type] = {}


def accelerated_class(original: type, family: Family, proved: frozenset[str] | None = None) -> type:
    """The subclass of `original` whose method is the family's; one per class, family, options and `proved`, which
    optional arguments the family may be given (None: all). TypeError when the class cannot be extended."""
    key = (original, type(family), family.options_key(), proved)
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
        _enter(_classes[key], original)
        family.on_class_created(_classes[key])
    return _classes[key]


def _enter(kind: type, original: type) -> None:
    """Into the list in which the caches of diffusers (first block, MagCache, layer skip) look up, by a block's very
    class, which of its results are the hidden states."""
    hooks = sys.modules.get("diffusers.hooks._helpers")
    blocks = getattr(hooks, "TransformerBlockRegistry", None)
    if blocks is None:
        return
    try:
        metadata = blocks.get(original)
    except ValueError:  # not among them
        return
    blocks._registry[kind] = metadata


def applied(block: nn.Module) -> _Applied | None:
    """What accelerate did to this block, None when it is untouched."""
    return getattr(type(block), "_zeroblock", None)


def _replacement(known: _Applied, proved: frozenset[str] | None) -> Callable:
    original, family, method, name = known.original, known.family, known.method, known.name
    forward, backend, fast = family.forward, family.backend, family.precision == "fast"
    eager = family.rounding == "eager"
    plain = backend == "auto" and not fast and not eager
    only_skips, choice = family.only_skips, known.choice
    taken = _Taken(forward, method, proved)
    sure = taken.sure

    @functools.wraps(method)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiled = is_compiling()
        if compiled and (only_skips or eager):  # a compiler rounds in its own way
            return method(self, *args, **kwargs)
        if len(args) > sure and not taken.positional(args) or kwargs and not taken.keywords(kwargs, len(args)):
            return method(self, *args, **kwargs)  # a fork's own argument, or one that was not proved
        if not compiled and getattr(original, name) is not method:
            return getattr(original, name)(self, *args, **kwargs)  # somebody patched the class since
        if not compiled and choice is not None and choice.prefers_original(self, forward, method, args, kwargs):
            return method(self, *args, **kwargs)
        if compiled or plain:  # what runs when it was compiled asks for its backend then
            return forward(self, *args, **kwargs)
        with contextlib.ExitStack() as options:
            if backend != "auto":
                options.enter_context(_backends.use_backend(backend))
            if fast:
                options.enter_context(_mode.allow_reduced())
            if eager:
                options.enter_context(_mode.eager_rounding())
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


def takes(family: Family, original: type, args: tuple[Any, ...]) -> bool:
    """Whether a call of the original with these goes to the family."""
    return _Taken(family.forward, getattr(original, family.entry(original)), None).positional(args)


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
