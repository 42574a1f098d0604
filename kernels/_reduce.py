"""The second stage of a sum over programs, in a fixed order and without atomics; and what the norms of images have from
such sums, the gradients of their operands (`parameter_gradients`).

math    out[b, d] = sum over p of parts[b, p, d]; the first stage wrote one partial sum per program, [B, P, D] in fp32.
grid    (blocks of D, B).
order   LANES partial sums side by side, each every LANES-th one from first to last; then the lanes as a tree.
zero    none, the kernel takes no flag.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import DTYPES, long_name
from ._group_tiles import channel_row
from ._launch import launch
from ._rows import cdiv

# Partial sums side by side, and columns of a program: rows of 256 bytes, no spills (python -m tests.triton.static).
LANES, COLUMNS = 16, 64


@triton.jit
def column_sums(parts, b, P, D, d, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_D] sums over P of parts[b, :, d]."""
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & (d < D)[None, :]
        total += tl.load(parts + (b * P + p[:, None]) * D + d[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _sum_partials(parts, out, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(out + b * D + d, column_sums(parts, b, P, D, d, BLOCK_P, BLOCK_D), mask=d < D)


def sum_partials(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, D] of parts [B, P, D], fp32."""
    B, P, D = parts.shape
    out = parts.new_empty(B, D, dtype=dtype)
    launch(_sum_partials, (cdiv(D, COLUMNS), B), parts=parts, out=out, P=P, D=D, BLOCK_P=LANES, BLOCK_D=COLUMNS)
    return out


# Channels and warps of a program of `_parameters`: one per thread (registers: python -m tests.triton.static).
CHANNELS, CHANNEL_WARPS = 64, 2


@triton.jit
def _parameters(
    sum_dz, sum_dz_xhat, weight, bias, scale, dweight, dbias, dscale, dshift, N, C, scale_n, BLOCK: tl.constexpr
):  # fmt: skip
    """From the sums: dscale and dshift of every sample, dweight and dbias added over the samples in their order."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < C
    w = channel_row(weight, channel, valid, 1.0)
    b = channel_row(bias, channel, valid, 0.0)
    total_w = tl.zeros_like(w)
    total_b = tl.zeros_like(w)
    for sample in range(N):
        n = tl.cast(sample, tl.int64)
        lane_dz = tl.load(sum_dz + n * C + channel, mask=valid, other=0.0)
        lane_dz_xhat = tl.load(sum_dz_xhat + n * C + channel, mask=valid, other=0.0)
        gain = tl.where(valid, 1.0, 0.0)
        if scale is not None:
            gain += channel_row(scale + n * scale_n, channel, valid, 0.0)
            tl.store(dscale + n * C + channel, w * lane_dz_xhat + b * lane_dz, mask=valid)
        if dshift is not None:
            tl.store(dshift + n * C + channel, lane_dz, mask=valid)
        total_w += gain * lane_dz_xhat
        total_b += gain * lane_dz
    if weight is not None:
        tl.store(dweight + channel, total_w, mask=valid)
    if bias is not None:
        tl.store(dbias + channel, total_b, mask=valid)


def _like(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.new_empty(v.shape)


def parameter_gradients(
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dweight, dbias, dscale, dshift) of the sums [N, C], which are not needed where no operand is given."""
    dweight, dbias, dscale, dshift = (_like(v) for v in (weight, bias, scale, shift))
    if sum_dz is not None and any(v is not None for v in (weight, bias, scale, shift)):
        N, C = sum_dz.shape
        launch(
            _parameters,
            (cdiv(C, CHANNELS),),
            num_warps=CHANNEL_WARPS,
            sum_dz=sum_dz,
            sum_dz_xhat=sum_dz_xhat,
            weight=weight,
            bias=bias,
            scale=scale,
            dweight=dweight,
            dbias=dbias,
            dscale=dscale,
            dshift=dshift,
            N=N,
            C=C,
            scale_n=0 if scale is None else scale.stride(0),
            BLOCK=CHANNELS,
        )
    return dweight, dbias, dscale, dshift


COMPILE_CASES = {
    f"sum_partials-{long_name(dtype)}": lambda dtype=dtype: sum_partials(torch.empty(8, 32, 1152, device="meta"), dtype)
    for dtype in DTYPES
}
