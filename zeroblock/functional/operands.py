"""Operands of tokens [B, T, D] (shift, scale, gate) in the forms that the ops take, [B, D] and [B, T, D]: views of what
the user has, through which autograd brings gradients back to the user's shape. A batch of 1 expands as in eager."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ..backends.base import MaybeTensor


def has_frames(tokens: int, *operands: MaybeTensor) -> bool:
    """Whether one of the operands has rows that serve some tokens each, [B, F, D]: they take `general.py`."""
    return any(v is not None and v.dim() == 3 and v.shape[1] not in (1, tokens) for v in operands)


def modulated(
    op: str, x: Tensor, shift: MaybeTensor, scale: MaybeTensor
) -> tuple[Tensor, MaybeTensor, MaybeTensor] | None:
    """The three for tokens x [B, T, D], or [1, T, D] beside operands of a batch; None where there are frames."""
    size = x.shape
    rows = (size[0], size[2])
    for v in (shift, scale):
        if v is not None and v.shape != rows and v.shape != size:
            break
    else:
        return x, shift, scale
    if has_frames(size[1], shift, scale):
        return None
    x = with_batch(x, _batch(x.shape[0], shift, scale))
    return x, _rows(op, "shift", shift, x.shape), _rows(op, "scale", scale, x.shape)


def gated(op: str, residual: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The three, of one batch, the gate as `gate_rows` has it; None where there are frames."""
    size = branch.shape
    if len(size) == 3 and residual.shape == size and gate.shape == (size[0], size[2]):
        return residual, gate, branch
    if len(size) == 3 and has_frames(size[1], gate):
        return None
    if residual.dim() == len(size) > 0:
        batch = _batch(max(residual.shape[0], size[0]), gate if len(size) == 3 else None)
        residual, branch = with_batch(residual, batch), with_batch(branch, batch)
    _checks.same_shape(op, "branch", branch, "residual", residual.shape)
    return residual, gate_rows(op, gate, branch.shape), branch


def around_linear(
    op: str, h: Tensor, out: int, gate: MaybeTensor, residual: MaybeTensor
) -> tuple[Tensor, MaybeTensor, MaybeTensor]:
    """The three of residual + gate * linear(h), whose result has `out` features."""
    batch, T, _ = h.shape
    size = (batch, T, out)
    if (residual is None or residual.shape == size) and (gate is None or gate.shape == (batch, out)):
        return h, gate, residual
    if batch == 1:
        batch = _batch(1, gate, residual)
        h = with_batch(h, batch)
        size = (batch, T, out)
    if residual is not None and residual.shape != size:
        if residual.dim() == 3:
            residual = with_batch(residual, batch)
        _checks.same_shape(op, "residual", residual, "the output", size)
    if gate is not None and gate.shape != (batch, out):
        gate = gate_rows(op, gate, size)
    return h, gate, residual


def gate_rows(op: str, gate: Tensor, size: Sequence[int]) -> Tensor:
    """A gate for a branch of this size: [1]; for tokens also [D], one row for all samples, [B, D] or [B, T, D]."""
    _checks.gate(op, gate, size)
    if gate.dim() == 1:
        return gate
    if gate.numel() == size[2] > 1:
        return gate.reshape(size[2])
    rows = _rows(op, "gate", gate, size)
    assert rows is not None
    return rows


def with_batch(t: Tensor, batch: int) -> Tensor:
    """t as often as there are samples, where it has one; nothing is copied."""
    return t if t.shape[0] == batch or t.shape[0] != 1 else t.expand(batch, *t.shape[1:])


def needs_fp64(x: Tensor, *operands: MaybeTensor) -> bool:
    """Whether an operand is wider than the arithmetic that x would have."""
    return x.dtype != torch.float64 and any(v is not None and v.dtype == torch.float64 for v in operands)


def _batch(batch: int, *operands: MaybeTensor) -> int:
    """That of the operands beside activations of a batch of 1."""
    if batch != 1:
        return batch
    return next((v.shape[0] for v in operands if v is not None and v.dim() > 1 and v.shape[0] != 1), 1)


def _rows(op: str, arg: str, v: MaybeTensor, size: Sequence[int]) -> MaybeTensor:
    B, T, D = size
    if v is None or v.shape == (B, D) or v.shape == (B, T, D):
        return v
    _checks.rows(op, arg, v, size)
    if v.dim() < 3:
        return v.expand(B, D)
    return v.squeeze(1).expand(B, D) if v.shape[1] == 1 else v.expand(B, T, D)
