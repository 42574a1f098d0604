"""group_norm_silu_conv_residual: residual + conv(silu(group_norm(x))) + bias, channels-last, without storing the norm.

math    group_norm(x) * (1 + scale) + shift = x * a[n, c] + b[n, c] once mean and rstd are known, so the convolution's
        tile loader computes h = silu(x * a + b) as it reads x (`conv_residual`, `fold`); h never reaches memory.
grid    1. `_tile_moments`, one program per tile of pixels x channels: mean and centred squares, one read of x. It is
           skipped when the convolution that wrote x left its `partial` behind.
        2. `_fold`, one program per (sample, group): moments of tiles -> mean, rstd -> a, b. A few kilobytes.
        3. `_conv_residual` with `fold`.
order   tile after tile, combined from means and centred squares (Chan et al. 1983), never from sums of squares.
zero    flag != 0: 1 and 2 leave at once (mean and rstd are set to 0), 3 writes residual + bias.

When it pays (`why_not`; a model, no GPU has measured it): bytes are 2ns here (1ns with `partial`), and 3ns for the norm
kernel and then the convolution. But here each element is activated once per tap and tile column, there once, at two
special-function operations each. By an H100's data sheet (3.6 T special-function op/s, 3.35 TB/s) every further
activation costs 0.56 ps and the saved pass 0.6 ps in bf16: folding wins up to two activations, which is a 1x1
convolution to at most two tile columns. Everything else, and dropout between the two, goes through the norm kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _gemm, conv_residual
from ._dtypes import DTYPES, NAMES
from ._gemm import Config
from ._launch import launch
from ._rows import cdiv, defined_variance, is_skipped
from .conv_residual import NHWC

# A tile of `_tile_moments`, and moments that `_fold` combines at a time; no spills (python -m tests.triton.static).
TILE_PIXELS, TILE_CHANNELS = 128, 64
FOLD_ELEMENTS = 2048


@triton.jit
def _tile_moments(x, partial, flag, pixels, C, BM: tl.constexpr, BC: tl.constexpr):
    """partial [N, tiles, 2, C]: mean and centred squares of each channel over BM pixels of x [N, pixels, C]."""
    if not is_skipped(flag):
        tiles = tl.cdiv(pixels, BM)
        tile = tl.program_id(0)
        m = tile % tiles * BM + tl.arange(0, BM)
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        mask = (m < pixels)[:, None] & (c < C)[None, :]
        row = (tile // tiles).to(tl.int64) * pixels + m
        v = tl.load(x + row[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(v, 0) / tl.minimum(pixels - tile % tiles * BM, BM)
        centred = tl.where(mask, v - mean[None, :], 0.0)
        at = partial + tile.to(tl.int64) * 2 * C + c
        tl.store(at, mean, mask=c < C)
        tl.store(at + C, tl.sum(centred * centred, 0), mask=c < C)


@triton.jit
def _fold(
    partial,
    weight,
    bias,
    scale,
    shift,
    scale_row,
    shift_row,
    flag,
    mean,
    rstd,
    fold,
    pixels,
    C,
    G,
    eps,
    CPG: tl.constexpr,
    BM: tl.constexpr,
    TILES: tl.constexpr,
    BC: tl.constexpr,
):
    """Moments of the tiles of one (sample, group) -> mean, rstd and the rows a, b of fold [N, 2, C]."""
    n, g = tl.program_id(0) // G, tl.program_id(0) % G
    c = g * CPG + tl.arange(0, BC)
    c_mask = tl.arange(0, BC) < CPG
    tiles = tl.cdiv(pixels, BM)
    count, centre, squares = 0.0, 0.0, 0.0
    for first in range(0, tiles * (1 - is_skipped(flag)), TILES):
        t = first + tl.arange(0, TILES)
        mask = (t < tiles)[:, None] & c_mask[None, :]
        at = partial + ((n * tiles + t).to(tl.int64) * 2 * C)[:, None] + c[None, :]
        means = tl.load(at, mask=mask, other=0.0)
        inner = tl.load(at + C, mask=mask, other=0.0)
        members = tl.where(mask, tl.minimum(pixels - t * BM, BM)[:, None], 0).to(tl.float32)
        total = tl.sum(members)
        middle = tl.sum(members * means) / total
        between = tl.where(mask, means - middle, 0.0)
        part = tl.sum(inner) + tl.sum(members * between * between)
        delta = middle - centre
        squares += part + delta * delta * (count * total / (count + total))
        count += total
        centre += delta * (total / count)
    if not is_skipped(flag):
        inverse = tl.rsqrt(defined_variance(squares / count) + eps)
        a = tl.zeros((BC,), tl.float32) + inverse
        if weight is not None:
            a *= tl.load(weight + c, mask=c_mask, other=0.0).to(tl.float32)
        b = -centre * a
        if bias is not None:
            b += tl.load(bias + c, mask=c_mask, other=0.0).to(tl.float32)
        if scale is not None:
            step = 1.0 + tl.load(scale + n.to(tl.int64) * scale_row + c, mask=c_mask, other=0.0).to(tl.float32)
            a *= step
            b *= step
        if shift is not None:
            b += tl.load(shift + n.to(tl.int64) * shift_row + c, mask=c_mask, other=0.0).to(tl.float32)
        at = fold + n.to(tl.int64) * 2 * C + c
        tl.store(at, a, mask=c_mask)
        tl.store(at + C, b, mask=c_mask)
        tl.store(mean + tl.program_id(0), centre)
        tl.store(rstd + tl.program_id(0), inverse)
    else:
        tl.store(mean + tl.program_id(0), 0.0)
        tl.store(rstd + tl.program_id(0), 0.0)


def why_not(x: Tensor, weight: Tensor, residual: Tensor | None = None, keep: Tensor | None = None) -> str | None:
    """None when folding the norm into the convolution is possible and, by count, not slower; else the reason."""
    if keep is not None:
        return "dropout lies between the norm and the convolution"
    reason = conv_residual.why_not(x, weight, residual)
    if reason is not None:
        return reason
    kernel, columns = weight.shape[2] * weight.shape[3], cdiv(weight.shape[0], 128)
    if kernel * columns > 2:  # (model: above)
        return f"every element would be activated {kernel * columns} times (taps x tile columns), which costs more"
    return None


def tile_moments(x: Tensor, flag: Tensor | None = None) -> Tensor:
    """partial [N, tiles, 2, C] fp32 of x [N, C, H, W], channels-last; tiles are TILE_PIXELS pixels of one image."""
    x = x.contiguous(memory_format=NHWC)
    (N, C), pixels = x.shape[:2], x.shape[2] * x.shape[3]
    tiles = cdiv(pixels, TILE_PIXELS)
    partial = torch.empty((N, tiles, 2, C), dtype=torch.float32, device=x.device)
    launch(
        _tile_moments,
        (N * tiles, cdiv(C, TILE_CHANNELS)),
        num_warps=4,
        x=x,
        partial=partial,
        flag=flag,
        pixels=pixels,
        C=C,
        BM=TILE_PIXELS,
        BC=TILE_CHANNELS,
    )
    return partial


def statistics(
    partial: Tensor,
    tile_pixels: int,
    pixels: int,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [N, G], rstd [N, G], fold [N, 2, C]) from a `partial` of tiles of `tile_pixels` pixels."""
    N, _, _, C = partial.shape
    mean, rstd = (partial.new_empty((N, num_groups)) for _ in range(2))
    fold = partial.new_empty((N, 2, C))
    dense = [None if t is None else t.contiguous() for t in (weight, bias)]
    scale, shift = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (scale, shift))
    scale_row, shift_row = (0 if t is None else t.stride(0) for t in (scale, shift))
    channels = C // num_groups
    BC = triton.next_power_of_2(channels)
    launch(
        _fold,
        (N * num_groups,),
        num_warps=4,
        partial=partial,
        weight=dense[0],
        bias=dense[1],
        scale=scale,
        shift=shift,
        scale_row=scale_row,
        shift_row=shift_row,
        flag=flag,
        mean=mean,
        rstd=rstd,
        fold=fold,
        pixels=pixels,
        C=C,
        G=num_groups,
        eps=eps,
        CPG=channels,
        BM=tile_pixels,
        TILES=max(1, FOLD_ELEMENTS // BC),
        BC=BC,
    )
    return mean, rstd, fold


def group_norm_silu_conv_residual(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: list[int],
    flag: Tensor | None = None,
    silu: bool = True,
    partial: tuple[Tensor, int] | None = None,
    plan: tuple[Config, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd); partial: what `conv_residual.run(want_partial=True)` left of x, and its tile's pixels."""
    x = x.contiguous(memory_format=NHWC)
    pixels = x.shape[2] * x.shape[3]
    moments, tile_pixels = (tile_moments(x, flag), TILE_PIXELS) if partial is None else partial
    mean, rstd, fold = statistics(
        moments, tile_pixels, pixels, num_groups, norm_weight, norm_bias, eps, scale, shift, flag
    )
    y, _ = conv_residual.run(x, weight, bias, residual, padding, flag, fold=fold, silu=silu, plan=plan)
    return y, mean, rstd


def _case(dtype: torch.dtype, config: Config):
    def case() -> object:
        empty = lambda *size: torch.empty(size, dtype=dtype, device="meta")  # noqa: E731
        x, residual = (empty(2, c, 64, 64).contiguous(memory_format=NHWC) for c in (320, 192))
        flag = torch.empty(1, dtype=torch.bool, device="meta")
        scale, shift = empty(2, 640).chunk(2, dim=1)
        return group_norm_silu_conv_residual(
            x,
            32,
            empty(320),
            empty(320),
            1e-5,
            scale,
            shift,
            empty(192, 320, 1, 1),
            empty(192),
            residual,
            [0, 0],
            flag,
            plan=(config, 1),
        )

    return case


COMPILE_CASES = {
    f"group_norm_silu_conv_residual-{config.BM}x{config.BN}-{NAMES[dtype]}": _case(dtype, config)
    for dtype in DTYPES
    for config in _gemm.folding_configs(dtype)
}
