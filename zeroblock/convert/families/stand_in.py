"""Stand-ins for what a block only calls, and what need not run on a CPU (flash attention): for a proof, which is about
all the rest. Each counts every argument, so that another one shows."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

StandIns = Mapping[str, Callable[..., Any]]


def of_tokens(x: Tensor, *others: Any) -> Tensor:
    """In the place of a layer of tokens: its result is like the first tensor it is given."""
    return x.tanh() + x.mean(1, keepdim=True) + _weighed(others)


def of_heads(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    """In the place of an attention of queries, keys and values [B, T, heads, features]; [B, T, D]"""
    return (q * k.softmax(1) + v).flatten(2) + _weighed(others)


def _weighed(values: tuple[Any, ...]) -> Any:
    """A number of tensors, numbers and words, each at its place."""
    total: Any = 0.0
    for i, v in enumerate(values, 1):
        if isinstance(v, Tensor):
            v = (torch.view_as_real(v) if v.is_complex() else v).float().mean()
        elif isinstance(v, str):
            v = sum(map(ord, v)) % 7
        if isinstance(v, (Tensor, int, float)):
            total = total + 0.3 * i * v
    return total


def _bound(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, given all that a call gives the original, in the order of its parameters."""
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        values = [sorted(v.items()) if isinstance(v, dict) else v for v in given.arguments.values()]
        return function(*tree_leaves(values))

    return call


class _Layer(nn.Module):
    """A function in the place of a layer of this class."""

    def __init__(self, kind: type[nn.Module], function: Callable[..., Any]):
        super().__init__()
        self.kind, self.function = kind, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        without_self = functools.partial(self.kind.forward, None)
        return _bound(without_self, self.function)(*args, **kwargs)


def width_of(layer: Any, linear: str, otherwise: int) -> int:
    """How many features a linear of the layer takes; a stand-in takes any."""
    return getattr(getattr(layer, linear, None), "in_features", otherwise)


def inner_method(kind: type[nn.Module], method: str) -> str:
    """Where forward only checkpoints (trainers' blocks), the method that computes."""
    return "_forward" if method == "forward" and inspect.isfunction(getattr(kind, "_forward", None)) else method


def find_home(kind: Any) -> None:
    """For an accelerated class: the module whose functions its own method calls, under its decorators."""
    if not hasattr(kind, "_zeroblock_home"):
        kind._zeroblock_home = sys.modules.get(inspect.unwrap(kind._zeroblock.method).__module__)


def home(block: nn.Module) -> Any:
    """That module; for a proof, with stand-ins."""
    return type(block)._zeroblock_home  # type: ignore[attr-defined]


def with_stand_ins(block: nn.Module, stand_ins: StandIns) -> nn.Module:
    """The block for a proof: with these in the place of its layers, and of the functions that its method calls."""
    if not stand_ins:
        return block
    twin = copy.copy(block)
    parts = twin.__dict__["_modules"] = dict(block._modules)
    functions = []
    for name, function in stand_ins.items():
        if name not in parts:
            functions.append((name, function))
        elif parts[name] is not None:
            parts[name] = _Layer(type(parts[name]), function)
    if functions:
        twin.__class__ = _staged(type(block), tuple(functions))  # type: ignore[arg-type]
    return twin


@functools.cache
def _staged(kind: type[nn.Module], functions: tuple[tuple[str, Callable[..., Any]], ...]) -> type[nn.Module]:
    """A subclass whose methods find these functions where the original's find those of their module."""
    body: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    for name in {name for base in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(base)}:
        method = getattr(kind, name)
        if not isinstance(method, types.FunctionType) or hasattr(method, "__wrapped__"):
            continue
        theirs = method.__globals__
        found = {n: _bound(theirs[n], f) for n, f in functions if n in theirs and _mentions(method.__code__, n)}
        if found:
            known = theirs | found
            body[name] = types.FunctionType(method.__code__, known, name, method.__defaults__, method.__closure__)
            body[name].__kwdefaults__ = method.__kwdefaults__
            body["_zeroblock_home"] = types.SimpleNamespace(**known)
    return type(kind.__name__, (kind,), body)


def _mentions(code: types.CodeType, name: str) -> bool:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return name in code.co_names or any(_mentions(c, name) for c in inner)
