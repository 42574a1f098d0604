"""One branch of a block by description at one call: what it is computed of, whether it is skipped, and its value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...blocks.broadcast import fits_gate, may_grow
from ...blocks.decision import NOT_ALLOWED, RUN, SKIP_BY_GATE, SKIPS, Answer, decide, op_policy
from ...blocks.layers import may_draw
from ...blocks.one_pass import copy_of_residual
from ...blocks.residual import skip_residual
from ...plan.mode import rounds_as_eager
from .adaln import DIFFUSERS, is_plain, is_plain_linear, projected
from .description import GatedBranch, Row
from .operands import Gate, norm_of, submodule
from .streams import Stream


class Step:
    """A branch, the streams that it changes, and its norms, rows and gates for each."""

    def __init__(
        self, block: Any, branch: GatedBranch, streams: list[Stream], rows: Sequence[Row], layers: dict[str, Any]
    ):
        self.block, self.branch, self.rows, self.layers = block, branch, rows, layers
        self.streams: list[Stream] = []
        self.norms: list[Any] = []
        self.modulations: list[tuple[Row | None, Row | None]] = []
        self.gates: list[Gate] = []
        part: GatedBranch | None = branch
        while part is not None:
            stream, shift, scale, gate, after = streams[part.stream], part.shift, part.scale, part.gate, part.after
            self.streams.append(stream)
            self.norms.append(norm_of(block, part.norm, stream.x))
            self.modulations.append((None if shift is None else rows[shift], None if scale is None else rows[scale]))
            norm = None if after is None else submodule(block, after)
            self.gates.append(Gate(None if gate is None else rows[gate], part.tanh, norm))
            part = part.context
        self.read = self.streams if branch.reads is None else [streams[branch.reads]]
        self.last = None if branch.last is None else submodule(block, branch.last)

    def modules(self) -> list[nn.Module]:
        found = [submodule(self.block, path) for path in (*self.branch.paths(), *self.branch.others)]
        return [m for m in found if m is not None]

    def fuses(self) -> bool:
        """Whether every norm is computed in one pass with what waits to be added."""
        for s, norm, rows in zip(self.read, self.norms, self.modulations, strict=True):
            if not s.fuses(norm, *rows):
                return False
        return len(self.read) == len(self.streams)

    def normed(self) -> list[Tensor]:
        return [s.normed(norm, *rows) for s, norm, rows in zip(self.read, self.norms, self.modulations, strict=True)]

    def run(self, name: str, policy: str, h: Sequence[Tensor] | None = None, waits: bool = False) -> None:
        """h: the norms, where they were computed before; waits: a norm may follow what the branch adds."""
        answer = NOT_ALLOWED if self.read is not self.streams or is_compiling() else self._answer(name, policy)
        if answer in SKIPS:
            return self._skip(answer)
        h = self.normed() if h is None else h
        for s, gate, y in zip(self.streams, self.gates, self._called(h, self.layers), strict=True):
            if y is None:  # at this call there is no such branch
                continue
            waits = waits and answer is RUN
            takes = gate.is_plain() and s.index is None and not (waits or rounds_as_eager())
            if self.last is not None and takes:
                rows = gate.row.rows  # type: ignore[union-attr]
                s.x = projected(s.settled(), rows, y, self.last, op_policy(answer, policy))  # type: ignore[arg-type]
            else:
                s.add(y if self.last is None else self.last(y), gate)
        return None

    def _called(self, h: Sequence[Tensor], layers: dict[str, Any]) -> Sequence[Tensor]:
        """What the branch's layer returns, for each of its streams."""
        block, branch = self.block, self.branch
        if branch.call is not None:
            y = branch.call(block, h[0] if len(h) == 1 else tuple(h), layers)
            return [y] if len(h) == 1 else y
        layer, more = submodule(block, branch.layer), layers.get(branch.layer, {})
        if len(h) == 1:
            return [layer(h[0], **more)]
        return layer(hidden_states=h[0], encoder_hidden_states=h[1], **more)

    # ---- zero branches -------------------------------------------------------------------------------------------

    def _answer(self, name: str, policy: str) -> Answer:
        """Whether the branch is skipped: all of its gates are zero, or its last layer."""
        judged: list[Tensor] = []
        if len(self.streams) > 1 and len({s.x.shape[-1] for s in self.streams}) > 1:
            return NOT_ALLOWED  # `_skip` makes one stream of them
        for s, gate in zip(self.streams, self.gates, strict=True):
            row = gate.row
            if row is None or s.index is not None:
                return NOT_ALLOWED
            fits = s.fits_rows(row)
            if not fits and not is_plain(s.x, *row):
                return NOT_ALLOWED
            for t in row:
                if t is not None:
                    judged.append(t)
                    if not fits and (may_grow(s.x, (t,)) or not fits_gate(t, s.x.shape)):
                        return NOT_ALLOWED
        last: Any = self.last
        weights: tuple[Tensor, ...] = ()
        if last is not None and is_plain_linear(last) and self.streams[0].x.shape[-1] == last.weight.shape[0]:
            weights = (last.weight,)
        return decide(name, policy, weights, tuple(judged), _Lazily(self))

    def _skip(self, answer: Answer) -> None:
        """Streams without the branch; in training what holds it at zero gets its gradients."""
        xs = [stream.settled() for stream in self.streams]
        tail = self.last if is_plain_linear(self.last) and len(xs) == 1 and self.gates[0].norm is None else None
        modules = tuple(m for m in self.modules() if m is not tail)
        if answer is SKIP_BY_GATE and not torch.is_grad_enabled() and not any(may_draw(m, DIFFUSERS) for m in modules):
            for s, x in zip(self.streams, xs, strict=True):
                s.x = copy_of_residual(x)
            return
        leaves, spec = tree_flatten(
            (xs, [[None if r is None else list(r) for r in m] for m in self.modulations], self.layers)
        )
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def body(*operands: Tensor) -> Tensor:
            values = list(leaves)
            for i, operand in zip(tensors, operands, strict=True):
                values[i] = operand
            xs, modulations, layers = tree_unflatten(values, spec)
            h = [
                Stream(x, s.fp32).normed(norm, *(r and Row(*r) for r in rows))
                for s, x, norm, rows in zip(self.streams, xs, self.norms, modulations, strict=True)
            ]
            found = self._called(h, layers)
            found = [y if self.last is tail else self.last(y) for y in found]  # type: ignore[misc]
            found = [y if gate.norm is None else gate.norm(y) for y, gate in zip(found, self.gates, strict=True)]
            return found[0] if len(found) == 1 else torch.cat(found, dim=1)

        # As one stream, so that the layer runs once and all gates get their gradients of it.
        values = [gate.value(None, s.fp32) for gate, s in zip(self.gates, self.streams, strict=True)]
        wide = [v.to(x.dtype).expand_as(x) for v, x in zip(values, xs, strict=True)]  # type: ignore[union-attr]
        x, gate = (xs[0], values[0]) if len(xs) == 1 else (torch.cat(xs, dim=1), torch.cat(wide, dim=1))
        operands = tuple(leaves[i] for i in tensors)
        y = skip_residual(answer, x, body, tail, gate.to(x.dtype), operands, modules, DIFFUSERS)  # type: ignore[union-attr]
        for s, part in zip(self.streams, y.split([t.shape[1] for t in xs], dim=1), strict=True):
            s.x = part.contiguous()


class _Lazily:
    """The modules of a step, looked up when somebody asks for them: a branch that is not zero needs none."""

    def __init__(self, step: Step):
        self.step = step

    def __iter__(self) -> Any:
        return iter(self.step.modules())
