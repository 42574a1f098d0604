"""What a family by description is put down in: the streams of a block, the rows of its modulation, and the branches
that are added to the streams one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..seam import Prepared
from .stand_in import StandIns


class Row(NamedTuple):
    """A vector of a modulation, of each sample (and token), and what is added to all of it, [D] (a block's table)."""

    rows: Tensor | None
    table: Tensor | None = None


class Joined(NamedTuple):
    """Tokens before others, as one stream."""

    first: Tensor
    rest: Tensor

    def whole(self) -> Tensor:
        return torch.cat(self, dim=1)

    def are_parts_of(self, x: Tensor) -> bool:
        """Whether x, dense, is this stream."""
        a, b = self
        if a._base is not x or b._base is not x or a.stride() != x.stride() or b.stride() != x.stride():
            return False
        start, rows = x.storage_offset(), a.shape[1]
        at = start == a.storage_offset() and b.storage_offset() == start + rows * x.stride(1)
        return bool(at and a.shape[0] == b.shape[0] == x.shape[0] and rows + b.shape[1] == x.shape[1])


def joined(streams: Sequence[Tensor | Joined], prepared: Prepared | None) -> tuple[tuple[Tensor, ...], Prepared | None]:
    """The streams as tensors, and what the block before prepared, if it is of these."""
    if prepared is not None:
        theirs = [find() for find in prepared.streams]
        for x, y in zip(streams, theirs, strict=True):
            if x is not y and (y is None or not isinstance(x, Joined) or not x.are_parts_of(y)):
                prepared = None
                break
        else:
            return tuple(theirs), prepared  # type: ignore[arg-type]
    return tuple([x.whole() if isinstance(x, Joined) else x for x in streams]), prepared


class Given(NamedTuple):
    """What a call of a block gave.

    Args:
        streams: what the branches are added to, [B, T, D] each; a `Joined` of what becomes one stream.
        rows: the vectors of the modulation, [B, D], [B, 1, D] or [B, T, D], or a `Row` of such a vector and a table.
        layers: {name of a branch's layer: keyword arguments that it takes beside the streams}.
        more: whatever `GatedBlock.finish` needs.
        which: of each stream, which row serves which token ([B, T], int): its rows are then [K, D] or [B, K, D];
            None: one row for all.
    """

    streams: tuple[Tensor | Joined, ...]
    rows: Sequence[Tensor | Row] = ()
    layers: dict[str, Any] = {}  # noqa: RUF012
    more: Any = None
    which: Sequence[Tensor | None] = ()


@dataclasses.dataclass(frozen=True)
class GatedBranch:
    """x = x + gate * layer(norm(x) * (1 + scale) + shift), a part of `GatedBlock`.

    Args:
        layer: where the block has the module that is the branch ("attn", "mlp.0").
        norm: where it has the norm, a LayerNorm or RMSNorm, or the eps of a layer norm without parameters that is no
            module; None: the layer is given x as it is.
        shift, scale, gate: which of the block's rows; None: without.
        call: call(block, h, *args, **kwargs) for a layer that takes more than h, args and kwargs being what the block
            was called with beside x. It may call that layer, nothing else of the block. Of a block with `given`:
            call(block, h, layers), `Given.layers` (h: a tuple where there is a `context`).
        tanh: whether the gate is the row's tanh.
        after: where the block has the RMSNorm of what the layer returns.
        stream: the number of the stream that the branch belongs to.
        context: what the same call of the layer does to another stream: its norm, rows and stream. The layer is then
            called as layer(hidden_states=h, encoder_hidden_states=h of the context) and returns both branches.
        reads: the number of the stream whose norm the layer is given, where that is another.
        optional: whether the block may be without the layer (an attribute that is None, or missing).
        last: where the block has the linear that ends the branch; `call` returns what it is given.
        others: where the block has further modules that `call` uses; it may be without them.
    """

    layer: str
    norm: str | float | None = None
    shift: int | None = None
    scale: int | None = None
    gate: int | None = None
    tanh: bool = False
    after: str | None = None
    call: Callable[..., Any] | None = None
    stream: int = 0
    context: GatedBranch | None = None
    reads: int | None = None
    optional: bool = False
    last: str | None = None
    others: tuple[str, ...] = ()

    def parts(self) -> tuple[GatedBranch, ...]:
        """The branch, of each stream that it changes."""
        return (self,) if self.context is None else (self, self.context)

    def paths(self) -> list[str]:
        """Where the block has its modules, `others` aside."""
        paths = (self.layer, self.last, *(path for part in self.parts() for path in (part.norm, part.after)))
        return [path for path in dict.fromkeys(paths) if isinstance(path, str)]


@dataclasses.dataclass(frozen=True)
class GatedBlock:
    """A transformer block of gated branches, one after the other, for `register_family`.

    Each function is given the block and what it was called with beside x.

    Args:
        name: of the family, in reports.
        branches: in the order in which they change x.
        rows: rows(block, *args, **kwargs): the vectors of the modulation, [B, D] or [B, 1, D], in a sequence. Its
            parameters are named as the block's own; those with a default are optional.
        example: example(block, side): arguments of a call, x first, for side ** 2 tokens and two samples; float32
            tensors on the CPU with random values.
        options: options(block): {optional argument: values that fit the example}. An optional argument that is not
            proved with a value of these or of the example goes to the original, unless it is the default.
        classes: the names of the classes that may be this block; () stands for `name`.
        linear: where the block has the linear whose output is the rows, as many equal parts as the branches use: which
            gates are zero then shows in the report. Of several linears, one after the other.
        gates: gates(block, i): in the place of `linear`, the tensors that hold row i at zero together; first part of a
            parameter, a meta tensor standing for what is not known before the call.
        first: first(block, x, *args, **kwargs): x as the branches get it.
        unless: unless(block): where the description does not hold (active stochastic depth), the original runs.
        variant: variant(block): an option of the block for which there is no description, in words; None: it is known.
        fp32: whether norms and gates are computed in float32 and rounded to the dtype of x.
        method: the method that computes the block, where forward only calls it (checkpointing).
        about: where the block comes from.
        given: in the place of `rows` for a block of several streams, or whose tokens are not its first argument:
            given(block, *args, **kwargs) is a `Given` of all that the block was called with; None: the original runs.
            With `rows` beside it, of the same arguments, `Given.rows` stays empty. The rows must then not depend on the
            streams: they may be asked for while the block before still runs, to compute the first norm with its end.
        finish: finish(block, streams, more): what the block returns of its streams; by default x, or all as a tuple.
        has: further attributes that tell the block from others of its name.
        stand_ins: {name of a layer of the block, or of a function that its method calls: what computes in its place for
            a proof}, where that need not run on a CPU (stand_in.py). `call` finds such functions in `home(block)`.
    """

    name: str
    branches: tuple[GatedBranch, ...]
    rows: Callable[..., Sequence[Tensor]] | None = None
    example: Callable[[Any, int], tuple] | None = None
    options: Callable[[Any], dict[str, tuple]] | None = None
    classes: tuple[str, ...] = ()
    linear: str | tuple[str, ...] | None = None
    gates: Callable[[Any, int], tuple[Tensor, ...]] | None = None
    first: Callable[..., Tensor] | None = None
    unless: Callable[[Any], bool] | None = None
    variant: Callable[[Any], str | None] | None = None
    fp32: bool = False
    method: str = "forward"
    about: str = ""
    given: Callable[..., Given | None] | None = None
    finish: Callable[..., Any] | None = None
    has: tuple[str, ...] = ()
    stand_ins: StandIns | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"GatedBlock: name must be an identifier, got {self.name!r}")
        if not self.branches or not all(isinstance(b, GatedBranch) for b in self.branches):
            raise TypeError(f"GatedBlock: branches must be a tuple of GatedBranch, got {self.branches!r}")
        for argument in ("given" if self.rows is None and self.given is not None else "rows", "example"):
            if not callable(getattr(self, argument)):
                kind = type(getattr(self, argument)).__name__
                raise TypeError(f"GatedBlock: {argument} must be a function, got {kind}")

    @property
    def linears(self) -> tuple[str, ...]:
        return (self.linear,) if isinstance(self.linear, str) else self.linear or ()

    @property
    def rows_used(self) -> int:
        parts = [part for branch in self.branches for part in branch.parts()]
        return 1 + max((i for p in parts for i in (p.shift, p.scale, p.gate) if i is not None), default=-1)

    def formula(self) -> str:
        """The branches in words."""
        found = []
        for branch in self.branches:
            for b in branch.parts():
                x = "xyzw"[b.stream]
                h = x if b.norm is None else f"{'norm' if isinstance(b.norm, float) else b.norm} {x}"
                h = h if b.scale is None and b.shift is None else f"modulate({h})"
                gate = "" if b.gate is None else "tanh(gate) * " if b.tanh else "gate * "
                y = f"{branch.layer}({h})"
                found.append(f"{x} + {gate}{y if b.after is None else f'{b.after} {y}'}")
        return ", then ".join(found)
