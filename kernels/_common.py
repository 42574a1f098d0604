"""Device functions shared by the kernels, and block-size arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl

# How an operand of a row kernel varies: absent, one row per sample, one row per token.
NONE, PER_SAMPLE, PER_TOKEN = 0, 1, 2


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of 2, at least 1."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def silu_grad(z):
    s = tl.sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def is_skipped(flag):
    """The verdict of zero_flag on the branch that a kernel belongs to; flag None: the branch is executed."""
    if flag is None:
        return False
    else:
        return tl.load(flag) != 0


@triton.jit
def sample_row(p, b, stride_b, d, D, KIND: tl.constexpr):
    """[1, BLOCK] fp32: the row of sample b of a per-sample operand; 0 for the other kinds."""
    if KIND == 1:
        return tl.load(p + b * stride_b + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    else:
        return 0.0


@triton.jit
def operand_rows(p, row, b, t, stride_b, stride_t, d, mask, KIND: tl.constexpr):
    """An operand for the rows t of sample b: `row` from sample_row, or [ROWS, BLOCK] of a per-token operand."""
    if KIND == 2:
        return tl.load(p + b * stride_b + t[:, None] * stride_t + d[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        return row


@triton.jit
def token_rows(b, block, T, d, D, ROWS: tl.constexpr):
    """(t, mask, offsets) of row block `block` (int64) of sample b of a dense [B, T, D], columns d."""
    t = block * ROWS + tl.arange(0, ROWS)
    return t, (t < T)[:, None] & (d < D)[None, :], (b * T + t)[:, None] * D + d[None, :]


@triton.jit
def modulated(z, shift, shift_row, shift_b, shift_t, scale, scale_row, scale_b, scale_t, b, t, d, mask,
              SHIFT: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """z * (1 + scale) + shift"""
    z *= 1.0 + operand_rows(scale, scale_row, b, t, scale_b, scale_t, d, mask, SCALE)
    return z + operand_rows(shift, shift_row, b, t, shift_b, shift_t, d, mask, SHIFT)


@triton.jit
def row_statistics(x, mask, D, eps, RMS: tl.constexpr):
    """(mean, rstd, xhat) of the rows of x [ROWS, BLOCK], 0 where masked: mean first, then the centred squares."""
    if RMS:
        mean = tl.zeros([x.shape[0]], tl.float32)
        centred = x
    else:
        mean = tl.sum(x, 1) / D
        centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    return mean, rstd, centred * rstd[:, None]


@triton.jit
def row_norm_grad(g, xhat, rstd, D, RMS: tl.constexpr):
    """rstd * (g - mean(g) - xhat * mean(g * xhat)) along the rows; without the mean(g) of a mean that is not taken."""
    dx = g - xhat * (tl.sum(g * xhat, 1) / D)[:, None]
    if not RMS:
        dx -= (tl.sum(g, 1) / D)[:, None]
    return dx * rstd[:, None]
