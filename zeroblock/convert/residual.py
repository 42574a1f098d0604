"""Which blocks add what they compute to their input, as their source tells: the ones that a report has to name though
no family knows them."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What is asked of a tensor that is not its numbers, or passes no gradient.
_NO_VALUE = frozenset("shape ndim dtype device size dim numel detach".split())
_SUMS = frozenset("add add_ lerp lerp_ addcmul".split())
# The layer on the way around a branch, where sizes differ.
_SHORTCUT = re.compile("skip|short|res|ident|down|nin")


def blocks_beside(model: nn.Module, known: set[nn.Module], taken: set[nn.Module]) -> list[nn.Module]:
    """The residual blocks of `model` that are neither `known` nor part of what is `taken`: the outermost, but no stacks
    of others."""
    found = {m for m in model.modules() if m not in taken and m not in known and _is_residual(m)}
    blocks, inside, result = found | known, set[nn.Module](), []
    for m in model.modules():
        if m in found and m not in inside and not _is_stack(m, blocks):
            result.append(m)
            inside.update(m.modules())
    return result


def _is_stack(m: nn.Module, blocks: set[nn.Module]) -> bool:
    """Whether m holds several of the blocks, or a list of them."""
    inner = [part for part in m.modules() if part is not m]
    lists = (part for part in inner if isinstance(part, _CONTAINERS))
    return sum(part in blocks for part in inner) > 1 or any(part in blocks for c in lists for part in c.modules())


def _is_residual(m: nn.Module) -> bool:
    parts = ((name, child) for name, child in m.named_children() if not isinstance(child, nn.Embedding))
    children = frozenset(name for name, child in parts if next(child.parameters(), None) is not None)
    return bool(children) and not isinstance(m, _CONTAINERS) and _adds_to_input(type(m), children)


_known: dict[tuple[type, frozenset[str]], bool] = {}


def _adds_to_input(kind: type[nn.Module], children: frozenset[str]) -> bool:
    key = kind, children
    if key not in _known:
        _known[key] = any(_Reader(kind, children, name).found for name in _methods(kind, children))
    return _known[key]


def _methods(kind: type, children: frozenset[str]) -> Iterator[str]:
    """forward, and the methods that it (and they) mention and that use the children."""
    waiting, seen = ["forward"], set[str]()
    while waiting:
        name = waiting.pop()
        code = getattr(_function(kind, name), "__code__", None)
        if name in seen or code is None:
            continue
        seen.add(name)
        yield name
        waiting += [n for n in code.co_names if _uses(kind, n, children)]


def _function(kind: type, name: str) -> Any:
    """The function behind a method of one's own, None for other attributes and for what nn.Module has."""
    found = getattr(kind, name, None)
    found = inspect.unwrap(found) if callable(found) else None
    return found if inspect.isfunction(found) and getattr(nn.Module, name, None) is not found else None


def _uses(kind: type, name: str, children: frozenset[str]) -> bool:
    code = getattr(_function(kind, name), "__code__", None)
    return code is not None and not children.isdisjoint(code.co_names)


@functools.cache
def _parsed(function: Any) -> ast.AST:
    """What a function's source says; nothing where that is not to be had."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _is_number(node: ast.AST) -> bool:
    """x.shape, x.shape[0], x.size(0)"""
    while isinstance(node, (ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.Attribute) and node.attr in _NO_VALUE - {"detach"}


def _is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) or getattr(node, "attr", None) in _SUMS


class _Value(NamedTuple):
    """Which values an expression was made of: those that it holds as they are, but for arithmetic, and those that went
    through a layer."""

    direct: frozenset[int] = frozenset()
    through: frozenset[int] = frozenset()
    shortcut: bool = False  # the result of a layer with such a name

    def __or__(self, other: _Value) -> _Value:  # type: ignore[override]
        return _Value(self.direct | other.direct, self.through | other.through)


class _Reader:
    """Reads a method from top to bottom; `found`: a value is added to what a layer made of it."""

    def __init__(self, kind: type, children: frozenset[str], name: str):
        self.kind, self.children, self.found = kind, children, False
        self.numbers = itertools.count()
        self.values: dict[str, _Value] = {}
        self.layers: set[str] = set()  # variables that hold some
        function = _function(kind, name)
        self.globals = function.__globals__
        method = _parsed(function)
        if isinstance(method, ast.FunctionDef):
            a = method.args
            for arg in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg):
                if arg is not None and arg.arg != "self":
                    self._bind(arg.arg, _Value())
            self._run(method.body)

    def _bind(self, name: str, value: _Value) -> None:
        self.layers.discard(name)
        self.values[name] = value._replace(direct=value.direct | {next(self.numbers)})

    def _run(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, s: ast.stmt) -> None:
        if isinstance(s, ast.AugAssign):
            left, right = self._value(s.target), self._value(s.value)
            self._assign(s.target, self._sum(left, right) if isinstance(s.op, ast.Add) else left | right)
        elif isinstance(s, (ast.Assign, ast.AnnAssign)):
            targets = s.targets if isinstance(s, ast.Assign) else [s.target]
            for target in targets:
                if s.value is not None and _is_number(s.value):
                    self._assign_numbers(target)
                elif s.value is not None:
                    self._assign(target, self._value(s.value), self._is_layer(s.value))
        elif isinstance(s, (ast.For, ast.AsyncFor)):
            self._assign(s.target, self._value(s.iter), any(map(self._is_layer, ast.walk(s.iter))))
            self._run(s.body)
        elif isinstance(s, ast.If):
            before = dict(self.values)
            self._value(s.test)
            self._run(s.body)
            after, self.values = self.values, before
            self._run(s.orelse)
            for name, value in after.items():
                self.values[name] = value | self.values.get(name, _Value())
        else:
            for child in ast.iter_child_nodes(s):
                if isinstance(child, ast.expr):
                    self._value(child)
                elif isinstance(child, ast.stmt):
                    self._statement(child)

    def _assign(self, target: ast.expr, value: _Value, is_layer: bool = False) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self._bind(node.id, value)
                if is_layer:
                    self.layers.add(node.id)

    def _assign_numbers(self, target: ast.expr) -> None:
        """Sizes are no values: no layer makes anything of them."""
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self.values[node.id] = _Value()

    def _value(self, node: ast.AST) -> _Value:
        if isinstance(node, ast.Name):
            return self.values.get(node.id, _Value())
        if isinstance(node, ast.Attribute) and node.attr in _NO_VALUE:
            return _Value()
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._sum(self._value(node.left), self._value(node.right))
        parts = [self._value(child) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Call):
            operands = parts[: 1 + len(node.args)]  # a.add(b), torch.add(a, b), gated_sum(a, b, gate)
            if self._adds(node.func):
                for a, b in itertools.combinations(operands, 2):
                    self._sum(a, b)
            if self._is_layer(node.func):
                whole = _union(parts)
                return _Value(frozenset(), whole.direct | whole.through, bool(_SHORTCUT.search(ast.unparse(node.func))))
        return _union(parts)

    def _sum(self, a: _Value, b: _Value) -> _Value:
        around = (a.shortcut or b.shortcut) and a.through & b.through
        self.found = self.found or bool(a.direct & b.through or b.direct & a.through or around)
        return a | b

    def _adds(self, function: ast.expr) -> bool:
        """Whether a call of it adds its operands: torch's own functions, and those of the model's module that do."""
        if isinstance(function, ast.Attribute):
            return function.attr in _SUMS
        found = self.globals.get(function.id) if isinstance(function, ast.Name) else None
        return inspect.isfunction(found) and any(map(_is_sum, ast.walk(_parsed(found))))

    def _is_layer(self, node: ast.AST) -> bool:
        """An expression that stands for one of the children, or for a method that uses them."""
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id == "self" and isinstance(node, ast.Attribute):
                return node.attr in self.children or _uses(self.kind, node.attr, self.children)
            node = owner
        return isinstance(node, ast.Name) and node.id in self.layers


def _union(values: Iterable[_Value]) -> _Value:
    result = _Value()
    for value in values:
        result = result | value
    return result
