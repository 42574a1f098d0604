"""The picture of the rooms, docs/architecture.svg, drawn from the imports.

`python -m tests.tools.test_architecture` renews it. Rooms stand in the rows of
test_layers.py. An arrow is an import; those that follow from others are left out.
"""

from __future__ import annotations

from ..support import ROOT
from . import test_layers
from .test_layers import ROWS, arrows

PICTURE = ROOT / "docs/architecture.svg"
WIDTH, ROW, HEIGHT, GAP, LETTER, MARGIN = 760, 50, 28, 22, 7.4, 14
COLOURS = {"kernels": "#fde8d0", "backends": "#fde8d0", "steps": "#fde8d0", "zero": "#dcefdc", "blocks": "#dcefdc"}


def imports() -> set[tuple[str, str]]:
    """The rooms of which one imports the other, but for what a way through a third room says already."""
    pairs = {(test_layers.room(a.source), test_layers.room(a.target)) for a in arrows()}
    after: dict[str, set[str]] = {}
    for source, target in pairs:
        if source != target:
            after.setdefault(source, set()).add(target)

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        todo = [start]
        while todo:
            new = after.get(todo.pop(), set()) - found
            found |= new
            todo += new
        return found

    return {
        (source, target)
        for source, targets in after.items()
        for target in targets
        if not any(target in reached(other) for other in targets)
    }


def places() -> dict[str, tuple[float, float, float]]:
    """{room: (centre, top, width)}"""
    found = {}
    for number, row in enumerate(reversed(ROWS)):
        widths = [LETTER * len(label(name)) + 24 for name in row]
        left = (WIDTH - sum(widths) - GAP * (len(row) - 1)) / 2
        for name, width in zip(row, widths, strict=True):
            found[name] = (left + width / 2, MARGIN + ROW * number, width)
            left += width + GAP
    return found


def label(room: str) -> str:
    return {"__init__": "zeroblock", "__main__": "python -m zeroblock"}.get(
        room, room.replace("backends.", "backends/")
    )


def _way(source: tuple[float, float, float], target: tuple[float, float, float], rows: int) -> str:
    """From the lower edge of one box to the upper of the other; round boxes that stand between them, on the left."""
    (x, y, width), (u, v, width_2) = source, target
    if rows > 1 and abs(x - u) < 60:
        x, u, y, v = x - width / 2, u - width_2 / 2 - 1, y + HEIGHT / 2, v + HEIGHT / 2
        out = min(x, u) - 14 - 16 * rows
        return f"M{x:.0f} {y:.0f}C{out:.0f} {y + 8:.0f} {out:.0f} {v - 8:.0f} {u:.0f} {v:.0f}"
    y, v = y + HEIGHT, v - 1
    bend = (0.5 if rows == 1 else 0.35) * (v - y)
    return f"M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {u:.0f} {v - bend:.0f} {u:.0f} {v:.0f}"


def drawing() -> str:
    at, level = places(), {name: number for number, row in enumerate(reversed(ROWS)) for name in row}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {MARGIN * 2 + ROW * (len(ROWS) - 1) + HEIGHT}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">',
        "<title>The rooms of zeroblock: each imports from lower rows alone</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#7a8494"/></marker></defs>',
        '<rect width="100%" height="100%" rx="8" fill="#ffffff"/>',
        '<g fill="none" stroke="#7a8494" stroke-width="1.2" marker-end="url(#tip)">',
    ]
    for source, target in sorted(imports()):
        way = _way(at[source], at[target], level[target] - level[source])
        lines.append(f'<path d="{way}"><title>{label(source)} imports {label(target)}</title></path>')
    lines.append("</g>")
    for name, (x, y, width) in at.items():
        lines.append(
            f'<rect x="{x - width / 2:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT}" rx="5" '
            f'fill="{COLOURS.get(name.split(".")[0], "#eef2f8")}" stroke="#7a8494"/>'
            f'<text x="{x:.0f}" y="{y + 18}" text-anchor="middle" fill="#1c2430">{label(name)}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def test_the_picture_is_that_of_the_imports():
    assert PICTURE.read_text() == drawing(), "python -m tests.tools.test_architecture"


def test_an_arrow_that_follows_from_others_is_left_out(monkeypatch):
    short = [test_layers.Arrow(a, b, 1) for a, b in (("nn.dit", "ops.x"), ("nn.dit", "zero"), ("ops.x", "zero"))]
    monkeypatch.setitem(globals(), "arrows", lambda: short)
    assert imports() == {("nn", "ops"), ("ops", "zero")}


if __name__ == "__main__":
    PICTURE.write_text(drawing())
