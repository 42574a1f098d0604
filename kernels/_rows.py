"""What the kernels on rows of tokens share: operands, statistics and the norm's gradient; and block-size arithmetic.

Names of all row kernels: x is [B, T, D]; b, t, d are indices along its dimensions, `at` the offsets of a tile of ROWS
tokens x BLOCK_D columns, `mask` what of it lies inside. An operand (shift, scale, gate) is a pointer, its strides
`*_b`, `*_t`, and its kind below; `*_row` is the row that all tokens of a sample share.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The kind of an operand (SHIFT, SCALE, GATE of a kernel): absent, one row per sample, one row per token. Kernels write
# the numbers, since Triton takes no globals.
NONE, PER_SAMPLE, PER_TOKEN = 0, 1, 2
# Programs that fill a GPU: about eight on each of an H100's 132 SMs (resident blocks: python -m tests.triton.static).
PROGRAMS = 1024


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
    """Whether zero_flag found the branch that a kernel belongs to zero; without a flag the branch always runs."""
    if flag is None:
        return False
    else:
        return tl.load(flag) != 0


@triton.jit
def sample_row(p, b, stride_b, d, D, KIND: tl.constexpr):
    """[1, BLOCK_D] fp32: the row of sample b of a per-sample operand; 0 for the other kinds."""
    if KIND == 1:
        return tl.load(p + b * stride_b + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    else:
        return 0.0


@triton.jit
def operand_rows(p, row, b, t, stride_b, stride_t, d, mask, KIND: tl.constexpr):
    """An operand for the rows t of sample b: `row` from sample_row, or [ROWS, BLOCK_D] of a per-token operand."""
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
def defined_variance(v):
    """Not below 0, where rounding may bring it; NaN where it is beyond fp32: its rstd, 0, would hide that."""
    return tl.where(v < 0, 0.0, v) + 0.0 * v


@triton.jit
def saved_statistics(mean, rstd, b, block, T, ROWS: tl.constexpr, RMS: tl.constexpr):
    """(mean, rstd) of row block `block` of sample b as forward saved them; RMSNorm has no mean."""
    t = block * ROWS + tl.arange(0, ROWS)
    row_rstd = tl.load(rstd + b * T + t, mask=t < T, other=0.0)
    if RMS:
        return row_rstd, row_rstd
    else:
        return tl.load(mean + b * T + t, mask=t < T, other=0.0), row_rstd


@triton.jit
def saved_xhat(x, row_mean, row_rstd, at, mask, RMS: tl.constexpr):
    """xhat of rows by the statistics that forward saved; 0 where masked."""
    xhat = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    xhat = xhat if RMS else xhat - row_mean[:, None]
    return tl.where(mask, xhat * row_rstd[:, None], 0.0)


@triton.jit
def cached_row(p, d, D, steps):
    """[1, BLOCK_D] fp32 of a dense [D], read again by every one of `steps` tiles, from cache: without the condition,
    always true, the loop's pipeline would take it for one of the streams and copy it to shared memory."""
    row = tl.zeros([1, d.shape[0]], tl.float32)
    if steps > 0:
        row = tl.load(p + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return row


# A row lies in one or two parts, tiles of BLOCK_D and of TAIL columns, whose sum is nearer to D than a power
# of 2 (TAIL 0: there is one). A tuple has an entry for each part.
@triton.jit
def part_columns(i: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr):
    if i == 0:
        return tl.arange(0, BLOCK_D)
    else:
        return BLOCK_D + tl.arange(0, TAIL)


@triton.jit
def in_fp32(row, TAIL: tl.constexpr):
    if TAIL > 0:
        return row[0].to(tl.float32), row[1].to(tl.float32)
    else:
        return (row[0].to(tl.float32),)


@triton.jit
def sum_of_parts(row, TAIL: tl.constexpr):
    total = tl.sum(row[0], 1)
    if TAIL > 0:
        total += tl.sum(row[1], 1)
    return total


@triton.jit
def sum_of_squares(row, TAIL: tl.constexpr):
    total = tl.sum(row[0] * row[0], 1)
    if TAIL > 0:
        total += tl.sum(row[1] * row[1], 1)
    return total


@triton.jit
def centred_parts(row, mean, D, BLOCK_D: tl.constexpr, TAIL: tl.constexpr):
    centred = ()
    for i in tl.static_range(2 if TAIL > 0 else 1):
        inside = part_columns(i, BLOCK_D, TAIL) < D
        centred = centred + (tl.where(inside[None, :], row[i] - mean[:, None], 0.0),)
    return centred


@triton.jit
def row_statistics(row, D, eps, RMS: tl.constexpr, EXACT: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr):
    """(mean, rstd, centred) of rows in parts, fp32 and 0 beyond D: mean first, then the centred squares.

    EXACT: x is of 16 bits, so that equal numbers are summed without rounding and their mean is that number. In fp32 the
    centred values have a mean of their own, by which both are corrected.
    """
    if RMS:
        mean = tl.zeros([row[0].shape[0]], tl.float32)
        centred = row
        variance = sum_of_squares(row, TAIL) / D
    else:
        mean = tl.div_rn(sum_of_parts(row, TAIL), D * 1.0)
        centred = centred_parts(row, mean, D, BLOCK_D, TAIL)
        variance = sum_of_squares(centred, TAIL) / D
        if not EXACT:
            missed = sum_of_parts(centred, TAIL) / D
            mean += missed
            variance -= missed * missed
            centred = centred_parts(row, mean, D, BLOCK_D, TAIL)
        variance = defined_variance(variance)
    return mean, tl.rsqrt(variance + eps), centred


@triton.jit
def zeros_of_parts(ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr):
    if TAIL > 0:
        return tl.zeros([ROWS, BLOCK_D], tl.float32), tl.zeros([ROWS, TAIL], tl.float32)
    else:
        return (tl.zeros([ROWS, BLOCK_D], tl.float32),)


@triton.jit
def added(total, row, TAIL: tl.constexpr):
    if TAIL > 0:
        return total[0] + row[0], total[1] + row[1]
    else:
        return (total[0] + row[0],)


@triton.jit
def row_norm_grad(g, xhat, rstd, D, RMS: tl.constexpr, TAIL: tl.constexpr):
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) along rows in parts; RMSNorm has no mean, and no mean(g)."""
    gxhat = tl.sum(g[0] * xhat[0], 1)
    if TAIL > 0:
        gxhat += tl.sum(g[1] * xhat[1], 1)
    gxhat = (gxhat / D)[:, None]
    mean = (sum_of_parts(g, TAIL) / D)[:, None]
    dx = ()
    for i in tl.static_range(2 if TAIL > 0 else 1):
        v = g[i]
        if not RMS:
            v -= mean  # first: of one element nothing is left
        dx = dx + ((v - xhat[i] * gxhat) * rstd[:, None],)
    return dx


@triton.jit
def store_sums(part, total, at, D, BLOCK_D: tl.constexpr, TAIL: tl.constexpr):
    """The partial sums of a program, over the rows of its tiles; `at`: where they begin."""
    if part is not None:
        for i in tl.static_range(2 if TAIL > 0 else 1):
            d = part_columns(i, BLOCK_D, TAIL)
            tl.store(part + at + d, tl.sum(total[i], 0), mask=d < D)
