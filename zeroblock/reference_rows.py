"""The two halves of residual_norm_modulate in plain PyTorch, with every operand that it takes: a part of the
specification (`reference.py`), by the same rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtypes import cast
from .reference import compute_dtype, modulation, row_moments


def flat_index(index: Tensor, rows: int) -> Tensor:
    """Of rows [B, K, D] seen as [B K, D]; the nearest row of an index that is out of range."""
    return index.long().clamp(0, rows - 1) + rows * torch.arange(index.shape[0], device=index.device)[:, None]


def operand_rows(rows: Tensor | None, table: Tensor | None, index: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """rows + table as they broadcast against [B, T, D]: [D], [B, D], [B, T, D] or, with an index [B, T], [B, K, D]."""
    if rows is None:
        return None if table is None else cast(table, dtype)
    rows = cast(rows, dtype)
    if rows.dim() == 3 and index is not None:
        rows = F.embedding(flat_index(index, rows.shape[1]), rows.flatten(0, 1))  # sums gradients in a fixed order
    rows = modulation(rows)
    return rows if table is None else rows + cast(table, dtype)


def rms_rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row of [..., D]."""
    return (cast(x, compute_dtype(x)).square().mean(dim=-1) + eps).rsqrt()


def gated_branch(
    branch: Tensor,
    gate: Tensor | None,
    gate_table: Tensor | None,
    index: Tensor | None,
    tanh: bool,
    rms: bool,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    """act(gate + gate_table) * norm_b(branch), not rounded: fp32 or fp64."""
    wide = cast(branch, compute_dtype(branch))
    if rms:
        wide = wide * rms_rstd(branch, eps)[..., None]
    if weight is not None:
        wide = wide * cast(weight, wide.dtype)
    factor = operand_rows(gate, gate_table, index, wide.dtype)
    if factor is None:
        return wide
    return (factor.tanh() if tanh else factor) * wide


def norm_modulate(
    x: Tensor,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    shift_table: Tensor | None,
    scale: Tensor | None,
    scale_table: Tensor | None,
    index: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """norm(x) [* weight + bias] * (1 + scale + scale_table) + shift + shift_table, rounded once to `dtype`."""
    wide = cast(x, compute_dtype(x))
    mean, rstd = (None, rms_rstd(x, eps)) if rms else row_moments(x, eps)
    y = (wide if mean is None else wide - mean[..., None]) * rstd[..., None]
    if weight is not None:
        y = y * cast(weight, y.dtype)
    if bias is not None:
        y = y + cast(bias, y.dtype)
    factor, offset = (operand_rows(*v, index, y.dtype) for v in ((scale, scale_table), (shift, shift_table)))
    y = y if factor is None else y * (1 + factor)
    return cast(y if offset is None else y + offset, dtype)
