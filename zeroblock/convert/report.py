"""What accelerate() did: a row for every residual branch and one for every block it left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .. import zero


@dataclasses.dataclass(frozen=True)
class Branch:
    """One residual branch of an accelerated block. `zero`: whether it is skipped now; None where that cannot be told
    (weights on meta, sharded or quantised)."""

    path: str
    family: str
    zero: bool | None
    backend: str


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """A block that looks like one of the families and was not touched."""

    path: str
    block: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `accelerate`; prints as a table. `blocks` counts the blocks converted by this call."""

    branches: tuple[Branch, ...]
    left_alone: tuple[LeftAlone, ...]
    blocks: int

    def counters(self) -> dict[str, tuple[int, int]]:
        """{family: (branches executed, branches skipped)} of the whole process since `zeroblock.testing.
        reset_counters`."""
        names = {b.family for b in self.branches}
        return {name: counts for name, counts in zero.counters().items() if name in names}

    def __str__(self) -> str:
        zeros = sum(b.zero is True for b in self.branches)
        lines = [
            f"zeroblock: {self.blocks} blocks accelerated, {len(self.branches)} residual branches, {zeros} zero now, "
            f"{len(self.left_alone)} blocks left alone"
        ]
        words = {True: "yes", False: "no", None: "unknown"}
        if self.branches:
            rows = [(b.path, b.family, words[b.zero], b.backend) for b in self.branches]
            lines += ["", *_table(("branch", "family", "zero now", "backend"), rows)]
        if self.left_alone:
            reasons = [(b.path, b.block, b.reason) for b in self.left_alone]
            lines += ["", *_table(("left alone", "class", "why"), reasons)]
        return "\n".join(lines)

    __repr__ = __str__


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]
