"""The floor plan: what may import what, how long a file may be, and words that would bring the old ways back.

`python -m tests.tools.test_layers` lists all that does not hold.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..support import ROOT

# Lowest first. A room is a folder or a file of the root of zeroblock/; two files of `backends` are rooms of their
# own. A file imports from its own room and from rooms of lower rows; what stands in one row does not import each other.
ROWS = (
    ("_version", "_dtypes", "_padding", "kernels"),
    ("reference", "_layout", "_checks", "_autocast"),
    ("reference_rows",),
    ("plan",),
    ("backends.residual_norm",),
    ("backends.base_norms",),
    ("backends.base",),
    ("steps",),
    ("backends",),
    ("zero",),
    ("ops",),
    ("functional",),
    ("blocks",),
    ("nn", "convert", "_freeze", "_explain", "doctor"),
    ("testing",),
    ("tools",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}

ROOT_FILES = 15
KERNEL_LINES, LINES = 400, 300
FMT_SKIPS = 25
WORDS = ("hasattr(", ".NAME ==")
WORDLESS = ("ops", "steps", "backends")


class Arrow(NamedTuple):
    source: str  # a module, from the root of zeroblock/: "plan.store", "kernels._rows"; a package is "plan.__init__"
    target: str
    line: int


@functools.cache
def modules() -> dict[str, Path]:
    """{name: file} of zeroblock/ and kernels/."""
    found = {}
    for folder, prefix in ((ROOT / "zeroblock", ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            found[".".join((*prefix, *path.relative_to(folder).with_suffix("").parts))] = path
    return found


def room(module: str) -> str:
    return module if module in RANK else module.split(".")[0]


def resolve(module: str) -> str | None:
    """The file that `module` is; a folder is its __init__."""
    package = f"{module}.__init__".lstrip(".")
    return module if module in modules() else package if package in modules() else None


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All of them, in functions too, but not what type checkers alone read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from imports(ast.Module(node.orelse, []))
        else:
            yield from imports(node)


def targets(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The files of ours that an import of `module` names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.level:
        package = module.split(".")[: -node.level]
        names = [".".join((*package, *([node.module] if node.module else []), alias.name)) for alias in node.names]
    else:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        if not (isinstance(node, ast.ImportFrom) and node.level):
            if name.split(".")[0] != "zeroblock":
                continue
            name = name.partition(".")[2]
        if isinstance(node, ast.ImportFrom):  # a module, or something in the module before the last dot
            found = resolve(name) or resolve(name.rpartition(".")[0])
        else:
            found = resolve(name)
        if found is not None and found != module:
            yield found


@functools.cache
def arrows() -> list[Arrow]:
    found = []
    for module, path in modules().items():
        for node in imports(ast.parse(path.read_text())):
            found += [Arrow(module, target, node.lineno) for target in dict.fromkeys(targets(module, node))]
    return found


def upward() -> list[str]:
    found = []
    for arrow in arrows():
        source, target = room(arrow.source), room(arrow.target)
        if source == target:
            continue
        unknown = [r for r in (source, target) if r not in RANK]
        if unknown or RANK[target] >= RANK[source]:
            what = f"{arrow.source}:{arrow.line} imports {arrow.target}"
            found.append(f"{what} (no room: {', '.join(unknown)})" if unknown else what)
    return found


def circles() -> list[list[str]]:
    """The sets of files that all reach each other."""
    after: dict[str, set[str]] = {}
    for arrow in arrows():
        after.setdefault(arrow.source, set()).add(arrow.target)

    @functools.cache
    def reached(start: str) -> frozenset[str]:
        seen, todo = set(), [start]
        while todo:
            for module in after.get(todo.pop(), ()):
                if module not in seen:
                    seen.add(module)
                    todo.append(module)
        return frozenset(seen)

    knots = {frozenset(m for m in reached(start) if start in reached(m)) for start in after if start in reached(start)}
    return sorted(sorted(knot) for knot in knots)


def sources(*folders: str, suffixes: tuple[str, ...] = (".py", ".h", ".cpp", ".cu", ".cuh")) -> Iterator[Path]:
    for folder in folders:
        yield from (p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in suffixes)


def too_long() -> list[str]:
    kernels = [ROOT / folder for folder in ("kernels", "csrc/cpu", "csrc/cuda")]
    found = []
    for path in sources("zeroblock", "kernels", "csrc", "benchmarks", "tests"):
        lines = len(path.read_text().splitlines())
        most = KERNEL_LINES if any(path.is_relative_to(folder) for folder in kernels) else LINES
        if lines > most:
            found.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {most}")
    return found


def root_files() -> list[str]:
    return sorted(p.name for p in (ROOT / "zeroblock").iterdir() if p.is_file() and not p.name.startswith("_C."))


def fmt_skips() -> list[str]:
    found = []
    for path in [ROOT / "setup.py", *sources("zeroblock", "kernels", "benchmarks", "tests", suffixes=(".py",))]:
        count = sum("  # fmt: skip" in line for line in path.read_text().splitlines())
        found += [str(path.relative_to(ROOT))] * (count if path != Path(__file__) else 0)
    return found


def forbidden_words() -> list[str]:
    found = []
    for path in sources(*(f"zeroblock/{folder}" for folder in WORDLESS), suffixes=(".py",)):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}: {word}" for word in WORDS if word in line]
    return found


def lines(found: list[str]) -> str:
    return "\n".join(["", *found])


def test_imports_point_downward():
    assert (found := upward()) == [], lines(found)


def test_no_files_import_each_other():
    assert (found := circles()) == [], lines([" ".join(knot) for knot in found])


def test_the_parser_sees_every_kind_of_import():
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from .. import cli\nelse:\n    from .. import reference\n"
        "def f():\n    from .store import Store\n"
        "import torch, zeroblock.functional\nfrom zeroblock import nn, gate_residual\nfrom ..zero import counters\n"
    )
    found = [target for node in imports(tree) for target in targets("plan.planned", node)]
    assert found == ["reference", "plan.store", "functional.__init__", "nn.__init__", "__init__", "zero"]


def test_few_files_stand_in_the_root():
    assert len(found := root_files()) <= ROOT_FILES, lines(found)


def test_files_fit_on_a_few_screens():
    assert (found := too_long()) == [], lines(found)


def test_the_formatter_is_rarely_overruled():
    found = fmt_skips()
    counts = [f"{found.count(path)} {path}" for path in dict.fromkeys(found)]
    assert len(found) <= FMT_SKIPS, lines([f"{len(found)} in all", *counts])


def test_backends_are_told_apart_by_their_class():
    assert (found := forbidden_words()) == [], lines(found)


if __name__ == "__main__":
    for title, found in (
        ("upward", upward()),
        ("circles", [" ".join(knot) for knot in circles()]),
        (f"root ({len(root_files())})", root_files()),
        ("too long", too_long()),
        ("words", forbidden_words()),
        (f"fmt: skip ({len(fmt_skips())})", []),
    ):
        print(f"{title}:", *found, sep="\n  ")
