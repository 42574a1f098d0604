"""What accelerate() did: a row for every residual branch and one for every block it left alone."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

from .. import zero


@dataclasses.dataclass(frozen=True)
class Branch:
    """One residual branch of an accelerated block. `zero`: whether it is skipped now; None where that cannot be told
    (weights on meta, sharded or quantised). `fused`: not so where the original forward runs it while it is not zero."""

    path: str
    family: str
    zero: bool | None
    backend: str
    fused: bool = True


class Reason(enum.Enum):
    """Why blocks are left alone: a name, and what can be done. They run as they did before, in every case."""

    UNKNOWN = "unknown block", "zeroblock has no family for it; write one (docs/extending.md, Adding a family)"
    PARTS = (
        "only parts",
        "zeroblock runs some of its layers (or skips them while they are zero), the original forward calls them; the "
        "block itself takes a family of its own (docs/extending.md, Adding a family)",
    )
    NAMESAKE = (
        "another block",
        "its class has the name of a block that zeroblock knows, and is another one, as far as zeroblock is concerned "
        "unknown; nothing is wrong with it. Rename the class to be rid of this row, or write a family for it",
    )
    VARIANT = (
        "another variant",
        "zeroblock has no forward for this option of the block; build it without, or keep it so",
    )
    FORK = (
        "another formula",
        "its code, or a patch of it, computes something else than the block zeroblock knows; take the patch away, or "
        "write a family for it",
    )
    LAYERS = (
        "other layers",
        "the fused forward takes torch's own norms and layers with padding_mode 'zeros': remove parametrizations "
        "(torch.nn.utils.parametrize.remove_parametrizations, weight_norm, pruning), put plain layers in",
    )
    WATCHED = (
        "watched",
        "hooks (or a forward replaced on the instance) on modules inside it would not be called: remove them, hook the "
        "block itself, or call accelerate before offloading and casting are switched on",
    )
    STORAGE = (
        "storage",
        "its weights are kept in another type than they are computed in: call accelerate before "
        "enable_layerwise_casting or quantisation",
    )
    DISTRIBUTED = (
        "distributed",
        "its weights are still DTensors when it is called (tensor parallelism): zeroblock computes with whole weights. "
        "Data parallelism (DDP, fully_shard) is no obstacle; accelerate the model that fully_shard was given",
    )
    ROUNDING = (
        "rounding",
        "with rounding='eager' zeroblock takes the blocks whose bits it gives: this one runs as before, and its zero "
        "layers are skipped all the same. Accelerate with rounding='once' to have it fused",
    )
    RANDOM = (
        "random numbers",
        "it draws random numbers where the known block does not, and skipping it would shift the stream; take the "
        "noise out of the block",
    )
    UNTRIED = (
        "not tried",
        "zeroblock tries every block on a copy with small inputs before it touches it, and could not; use a class "
        "whose objects can be copied and which takes inputs of any size",
    )
    CLASS = (
        "class",
        "its class cannot be exchanged: accelerate before torch.jit.script; restore before another library derives a "
        "class of the block's (fully_shard), then accelerate again",
    )

    @property
    def title(self) -> str:
        return self.value[0]

    @property
    def advice(self) -> str:
        return self.value[1]


class Obstacle(NamedTuple):
    """Why a family cannot have a block: one of the reasons, and what was found."""

    reason: Reason
    found: str


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """A residual block that runs as before, or of which zeroblock runs parts only. `kind.advice` says what can be
    done."""

    path: str
    block: str
    reason: str
    kind: Reason


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `accelerate`; prints as a table. `blocks` counts what was converted by this call: blocks that are
    `fused`, blocks that are `only_skipped` while zero, and parts of blocks that are left alone, as their norms."""

    branches: tuple[Branch, ...]
    left_alone: tuple[LeftAlone, ...]
    blocks: int
    fused: int
    only_skipped: int

    def counters(self) -> dict[str, tuple[int, int]]:
        """{family: (branches executed, branches skipped)} of the whole process since `zeroblock.testing.
        reset_counters`."""
        names = {b.family for b in self.branches}
        return {name: counts for name, counts in zero.counters().items() if name in names}

    def __str__(self) -> str:
        zeros = sum(b.zero is True for b in self.branches)
        fused = [b for b in self.branches if b.fused]
        skipped = [b for b in self.branches if not b.fused]
        parts = self.blocks - self.fused - self.only_skipped
        lines = [
            f"zeroblock: {self.fused} of {self.fused + self.only_skipped + len(self.left_alone)} blocks fused, "
            f"{self.only_skipped} only skipped while zero, {len(self.left_alone)} left alone",
            f"residual branches: {len(self.branches)}, zero now: {zeros}" + f"; parts of blocks: {parts}" * bool(parts),
        ]
        words = {True: "yes", False: "no", None: "unknown"}
        if fused:
            rows = [(b.path, b.family, words[b.zero], b.backend) for b in fused]
            lines += ["", *_table(("branch", "family", "zero now", "backend"), rows)]
        if skipped:
            pairs = [(b.path, b.family, words[b.zero]) for b in skipped]
            lines += ["", *_table(("only skipped", "family", "zero now"), pairs)]
        if self.left_alone:
            rows = [(b.path, b.block, b.kind.title, b.reason) for b in self.left_alone]
            lines += ["", *_table(("left alone", "class", "reason", "what was found"), rows), ""]
            lines += [f"{kind.title}: {kind.advice}" for kind in Reason if any(b.kind is kind for b in self.left_alone)]
        return "\n".join(lines)

    __repr__ = __str__


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]
