"""What residual_norm_modulate's two files share: its operands on the host and in kernels.

An operand (gate, shift, scale) is the sum of its rows, of one kind, and of a table [D]; either may be absent. Names as
in `_rows.py`; k is the row that a token takes of an INDEXED operand, the token's entry of the call's index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ._rows import NONE, PER_SAMPLE, PER_TOKEN, sample_row

# A kind beside those of `_rows.py`: rows [B, K, D], of which a token takes the one that the call's index [B, T] names.
INDEXED = 3


class Rows(NamedTuple):
    """rows [D], [B, D] or [B, T, D], beside an index [B, K, D] in place of it; the last dimension is dense."""

    rows: Tensor | None = None
    table: Tensor | None = None  # [D], dense


class Branch(NamedTuple):
    """act(gate) * norm_b(branch), added to a residual: x_new"""

    branch: Tensor  # [B, T, D], dense
    gate: Rows
    tanh: bool
    rms: bool
    weight: Tensor | None  # [D], of the branch's norm
    eps: float
    dtype: torch.dtype  # of x_new


class Norm(NamedTuple):
    """norm(x) * weight + bias, then * (1 + scale) + shift: y"""

    rms: bool
    weight: Tensor | None  # [D]
    bias: Tensor | None  # [D]
    shift: Rows
    scale: Rows
    eps: float
    dtype: torch.dtype  # of y


def kind_of(v: Rows, index: Tensor | None) -> int:
    """A row that all tokens share is of stride 0 between samples."""
    if v.rows is None:
        return NONE
    return PER_SAMPLE if v.rows.dim() < 3 else PER_TOKEN if index is None else INDEXED


def strides(v: Rows) -> tuple[int, int]:
    """(between samples, between tokens or the rows of a sample)"""
    if v.rows is None or v.rows.dim() == 1:
        return 0, 0
    return v.rows.stride(0), v.rows.stride(1) if v.rows.dim() == 3 else 0


def rows_of_a_sample(index: Tensor | None, *operands: Rows) -> int | None:
    """K, where an operand is indexed."""
    counts = [v.rows.shape[1] for v in operands if v.rows is not None and kind_of(v, index) == INDEXED]
    return min(counts, default=None)


@triton.jit
def vector(p, d, D):
    """[1, BLOCK_D] fp32 of a dense [D]."""
    return tl.load(p + d, mask=d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def shared_row(p, table, b, stride_b, d, D, KIND: tl.constexpr):
    """[1, BLOCK_D]: what all tokens of sample b take of an operand, the sample's row and the table; 0 without both."""
    row = sample_row(p, b, stride_b, d, D, KIND)
    if table is not None:
        row += vector(table, d, D)
    return row


@triton.jit
def of_tokens(p, row, b, t, k, stride_b, stride_t, d, mask, KIND: tl.constexpr):
    """An operand for the rows t of sample b: `row` from shared_row, and what tokens have of their own."""
    if KIND == 2:
        return row + tl.load(p + b * stride_b + t[:, None] * stride_t + d[None, :], mask=mask, other=0.0).to(tl.float32)
    elif KIND == 3:
        return row + tl.load(p + b * stride_b + k[:, None] * stride_t + d[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        return row


@triton.jit
def index_of(index, b, t, T, K, CHECK: tl.constexpr):
    """The rows that tokens t of sample b take, int64; one out of range takes the nearest, as does a token beyond T."""
    k = tl.load(index + b * T + tl.minimum(t, T - 1))
    if CHECK:
        tl.device_assert((k >= 0) & (k < K), "index out of range")
    return tl.minimum(tl.maximum(k, 0), K - 1).to(tl.int64)


@triton.jit
def activated(gate, TANH: tl.constexpr):
    if TANH:
        return libdevice.tanh(gate)
    else:
        return gate


@triton.jit
def cached_shared_row(p, table, b, stride_b, d, D, steps, KIND: tl.constexpr):
    """shared_row, read again by every one of `steps` tiles: see cached_row."""
    if KIND == 1 or table is not None:
        row = tl.zeros([1, d.shape[0]], tl.float32)
        if steps > 0:
            row += shared_row(p, table, b, stride_b, d, D, KIND)
        return row
    else:
        return 0.0
