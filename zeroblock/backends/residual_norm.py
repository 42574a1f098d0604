"""The operands and results of residual_norm_modulate, as backends take them.

x_new = residual + act(gate) * norm_b(branch); y = norm(x_new) [* weight + bias] * (1 + scale) + shift.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """rows + table of a shift, scale or gate; without both there is none. The number of dimensions says what rows are:
    [D], one row for all; [B, D], one of each sample; [B, T, D], one of each token or, where the call has an index
    [B, T] (int32, contiguous), [B, K, D], of which token (b, t) takes row index[b, t]. Any strides with a dense last
    dimension. A table comes beside rows only."""

    rows: Tensor | None = None
    table: Tensor | None = None  # [D], added in the dtype of the arithmetic


class Branch(NamedTuple):
    """act(gate) * norm_b(branch): act is tanh or nothing, norm_b a RMS norm or nothing."""

    branch: Tensor  # [B, T, D]
    gate: Rows
    tanh: bool
    rms: bool
    weight: Tensor | None  # [D], of norm_b
    eps: float
    dtype: torch.dtype  # of x_new


class Norm(NamedTuple):
    """The layer norm or RMS norm of a row, and what modulates it."""

    rms: bool
    weight: Tensor | None  # [D]
    bias: Tensor | None  # [D]
    shift: Rows
    scale: Rows
    eps: float
    dtype: torch.dtype  # of y


class Stats(NamedTuple):
    """[B, T] each, in the dtype of the arithmetic; None where there is no such norm, and for the mean of a RMS norm."""

    mean: Tensor | None
    rstd: Tensor | None
    branch_rstd: Tensor | None


class ResidualNorm(NamedTuple):
    x_new: Tensor | None  # None without a branch: the norm is then of the residual
    y: Tensor | None  # None without a norm
    stats: Stats


class Needed(NamedTuple):
    """Of which operands a gradient is wanted."""

    residual: bool
    branch: bool
    gate: bool
    gate_table: bool
    branch_weight: bool
    weight: bool
    bias: bool
    shift: bool
    shift_table: bool
    scale: bool
    scale_table: bool


class ResidualNormGrads(NamedTuple):
    """In the shapes and dtypes of the operands, dense; None where there is no operand. One that is not wanted may be
    None too."""

    residual: Tensor | None = None
    branch: Tensor | None = None
    gate: Tensor | None = None
    gate_table: Tensor | None = None
    branch_weight: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    shift: Tensor | None = None
    shift_table: Tensor | None = None
    scale: Tensor | None = None
    scale_table: Tensor | None = None
