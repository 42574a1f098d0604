"""The operands and results of residual_norm_modulate, as backends take them.

x_new = residual + act(gate) * norm_b(branch); y = norm(x_new) [* weight + bias] * (1 + scale) + shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._dtypes import KERNELS
from .._layout import dense_rows

DTYPE_IDS = {dtype: i for i, dtype in enumerate(KERNELS)}  # their places in ZB_DTYPES (csrc/zeroblock.h)


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


# ---- as the native kernels take them --------------------------------------------------------------------------------


def native_rows(a: Rows) -> tuple[Tensor | None, Tensor | None]:
    return dense_rows(a.rows), a.table


def native_branch(
    branch: Branch | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool, bool, Tensor | None]:
    """branch, gate, table, tanh, rms, weight"""
    if branch is None:
        return None, None, None, False, False, None
    return branch.branch.contiguous(), *native_rows(branch.gate), branch.tanh, branch.rms, branch.weight


def native_norm(norm: Norm | None) -> tuple[Tensor | None, ...]:
    """weight, bias, shift, its table, scale, its table"""
    if norm is None:
        return (None,) * 6
    return norm.weight, norm.bias, *native_rows(norm.shift), *native_rows(norm.scale)


def row_dtypes(branch: Branch | None, norm: Norm | None) -> list[torch.dtype]:
    rows = [branch.branch, branch.gate.rows] if branch is not None else []
    rows += [norm.shift.rows, norm.scale.rows] if norm is not None else []
    return [t.dtype for t in rows if t is not None]


def takes(*dtypes: torch.dtype) -> bool:
    """Whether the native kernels have all of these."""
    return DTYPE_IDS.keys() >= set(dtypes)


def native_forward(
    op: Callable[..., tuple[Tensor, ...]],
    residual: Tensor,
    branch: Branch | None,
    norm: Norm | None,
    index: Tensor | None,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> ResidualNorm:
    x_new, y, *stats = op(
        residual.contiguous(),
        *native_branch(branch),
        0.0 if branch is None else branch.eps,
        0 if norm is None else 2 if norm.rms else 1,
        *native_norm(norm),
        index,
        0.0 if norm is None else norm.eps,
        DTYPE_IDS[x_dtype],
        DTYPE_IDS[y_dtype],
    )
    return ResidualNorm(x_new, y, Stats(*stats))


def native_backward(
    op: Callable[..., tuple[Tensor, ...]],
    dx_new: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    stats: Stats,
    branch: Branch | None,
    norm: Norm | None,
    index: Sequence[Tensor | None],
    residual_dtype: torch.dtype,
    needed: Needed,
) -> ResidualNormGrads:
    """index: with what a backend makes of it."""
    bits = 0
    for i, wanted in enumerate(needed):
        if wanted:
            bits |= 1 << i
    grads = op(
        None if dx_new is None else dx_new.contiguous(),
        None if dy is None else dy.contiguous(),
        x.contiguous(),
        *stats,
        *native_branch(branch),
        *native_norm(norm),
        *index,
        DTYPE_IDS[residual_dtype],
        bits,
    )
    return ResidualNormGrads(*grads)
