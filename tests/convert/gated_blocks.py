"""The gated block classes of the installed diffusers, found in its source: new ones show up by themselves."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
from collections.abc import Iterator

# A factor that went through one of these is half of a gated linear unit.
_ACTIVATION = re.compile("silu|gelu|relu|swish|act")


def gated_blocks() -> dict[str, str]:
    """{class: file} of the classes that multiply by something named a gate and add what comes of it."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None and spec.origin is not None
    home = pathlib.Path(spec.origin).parent / "models"
    found = {}
    for path in sorted(home.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "gate" in text and "flax" not in path.name:
            classes = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
            found |= {c.name: str(path.relative_to(home)) for c in classes if _is_gated(c)}
    return found


def _is_gated(kind: ast.ClassDef) -> bool:
    nodes = [n for f in kind.body if isinstance(f, ast.FunctionDef) and f.name != "__init__" for n in ast.walk(f)]
    return any(map(_adds, nodes)) and any(any(map(_is_gate, _factors(n))) for n in nodes)


def _adds(node: ast.AST) -> bool:
    return isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Add) or _is_helper(node)


def _is_helper(node: ast.AST) -> bool:
    """apply_gate(x, y, gate), addcmul(x, y, gate)"""
    return isinstance(node, ast.Call) and re.search(r"apply_\w*gate|addcmul", ast.unparse(node.func)) is not None


def _factors(node: ast.AST) -> Iterator[ast.AST]:
    """What a node multiplies by, or gives a function that does: a * b, apply_gate(x, y, gate), x + norm(y, gate)."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        yield from (node.left, node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from (arg for side in (node.left, node.right) if isinstance(side, ast.Call) for arg in side.args[1:])
    if isinstance(node, ast.Call) and _is_helper(node):
        yield from node.args[1:]


def _is_gate(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and _ACTIVATION.search(ast.unparse(node.func).lower()):
        return False
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        return False
    names = (getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node))
    return any(isinstance(name, str) and "gate" in name.lower() for name in names)
