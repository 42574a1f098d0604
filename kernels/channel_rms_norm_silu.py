"""channel_rms_norm_silu: the RMS norm over the channels of each pixel, x [N, C, *S] contiguous or channels-last.

math    xhat = x * |rstd|, y = silu((xhat * weight + bias) * (1 + scale) + shift) in fp32. rstd [N, *S], saved for
        backward, is 1 / sqrt(mean(x^2) + eps), or sqrt(C) / max(norm, eps), negative where that divisor is eps.
grid    (pixel blocks, N); a program takes `steps` tiles of PIXELS pixels and all channels, each read once and kept in
        registers. 2ns bytes (n numbers of s bytes). Tiles: _group_tiles.py.
zero    none, the kernel takes no flag.

Backward, 3ns bytes. With dz = dy * silu'(z) and g = dz * weight * (1 + scale): dx = |rstd| * (g - xhat * m), m the mean
of g * xhat over the channels of a pixel, or 0 where rstd is negative, for there it is a constant. The gradients of what
pixels share follow from the sums of dz and dz * xhat over the pixels of a sample (group_norm_silu_bwd.py).

order   channels of a pixel as a tree; a program adds its pixels in order into partial sums, [N, programs, C] in fp32;
        `_reduce.sum_partials` adds those of a sample, `_parameters` the samples. No atomics.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import long_name
from ._group_tiles import affine, along_channels, tile_at
from ._launch import launch
from ._reduce import parameter_gradients, sum_partials
from ._rows import PROGRAMS, cdiv, power_of_2, silu, silu_grad
from .group_norm_silu import sample_stride

# The most channels, numbers of a tile of few channels and of many, and numbers per thread: backward holds x and dy
# (spills: python -m tests.triton.static).
MAX_C, TILE = 1024, 4096
FORWARD_TILE, FORWARD_PER_THREAD = 16384, 32
BACKWARD_TILE, BACKWARD_PER_THREAD = 8192, 16
# Pixels of a program of backward at least: the partial sums, written and read again, then cost 3 % of its bytes (bytes:
# python -m tests.triton.traffic_cases). Tiles of a program at most. (guess)
LEAST_PIXELS, STEPS = 128, 64


@triton.jit
def along_pixels(v, AXIS: tl.constexpr):
    """Per-pixel numbers shaped to broadcast against a tile."""
    return tl.expand_dims(v, AXIS)


@triton.jit
def _forward(
    x, weight, bias, scale, shift, y, rstd, C, HW, steps, scale_n, shift_n, eps, root,
    INSIDE: tl.constexpr, SILU: tl.constexpr, AXIS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS).to(tl.int64)
    valid = channel < C
    a, c = affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n)
    for step in range(steps):
        block = tl.program_id(0).to(tl.int64) * steps + step
        at, mask = tile_at(channel, valid, block, C, HW, AXIS, PIXELS)
        at += n * C * HW
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        squares = tl.sum(value * value, AXIS)
        if INSIDE:
            r = 1.0 / tl.sqrt_rn(squares / C + eps)
        else:
            norm = tl.sqrt_rn(squares)
            r = root / tl.where(norm <= eps, eps, norm)  # a NaN is no less
        z = value * along_pixels(r, AXIS) * along_channels(a, AXIS) + along_channels(c, AXIS)
        tl.store(y + at, silu(z) if SILU else z, mask=mask)
        if not INSIDE:
            r = tl.where(norm <= eps, -r, r)
        pixel = block * PIXELS + tl.arange(0, PIXELS)
        tl.store(rstd + n * HW + pixel, r, mask=pixel < HW)


@triton.jit
def _backward(
    dy, x, rstd, weight, bias, scale, shift, dx, part_dz, part_dz_xhat, C, HW, steps, scale_n, shift_n,
    SILU: tl.constexpr, AXIS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS).to(tl.int64)
    valid = channel < C
    a, c = affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n)
    sum_dz = tl.zeros([CHANNELS], tl.float32)
    sum_dz_xhat = tl.zeros([CHANNELS], tl.float32)
    for step in range(steps):
        block = tl.program_id(0).to(tl.int64) * steps + step
        at, mask = tile_at(channel, valid, block, C, HW, AXIS, PIXELS)
        at += n * C * HW
        pixel = block * PIXELS + tl.arange(0, PIXELS)
        r = tl.load(rstd + n * HW + pixel, mask=pixel < HW, other=0.0)
        size = along_pixels(tl.abs(r), AXIS)
        xhat = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * size
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            g *= silu_grad(xhat * along_channels(a, AXIS) + along_channels(c, AXIS))
        if part_dz is not None:
            sum_dz += tl.sum(g, 1 - AXIS)
            sum_dz_xhat += tl.sum(g * xhat, 1 - AXIS)
        g *= along_channels(a, AXIS)
        m = tl.where(r < 0, 0.0, tl.sum(g * xhat, AXIS) / C)
        tl.store(dx + at, (g - xhat * along_pixels(m, AXIS)) * size, mask=mask)
    if part_dz is not None:
        at = (n * tl.num_programs(0) + tl.program_id(0)) * C + channel
        tl.store(part_dz + at, sum_dz, mask=valid)
        tl.store(part_dz_xhat + at, sum_dz_xhat, mask=valid)


def why_not_channels(C: int) -> str | None:
    """Why no program holds the channels of a pixel, else None."""
    return None if C <= MAX_C else f"{C} channels are more than the {MAX_C} that a program holds"


def _tiles(x: Tensor, last: bool, most: int, per_thread: int, least_pixels: int) -> tuple[int, dict[str, Any]]:
    """(programs of a sample, what both kernels are launched with). Rows of a contiguous tile fill 32 bytes where a tile
    of `most` numbers has them."""
    N, C, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    channels = power_of_2(C)
    row = 1 if last else min(32 // x.element_size(), most // channels)
    width = min(max(row, TILE // channels), power_of_2(pixels))
    blocks = cdiv(pixels, width)
    steps = max(1, cdiv(least_pixels, width), N * blocks // PROGRAMS)
    steps = min(steps, STEPS, blocks) if blocks else 1
    options = {"AXIS": int(last), "CHANNELS": channels, "PIXELS": width, "C": C, "HW": pixels, "steps": steps}
    warps = min(16, max(1, channels * width // (32 * per_thread)))
    return cdiv(blocks, steps), {**options, "num_warps": warps}


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    eps_inside: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    apply_silu: bool,
    last: bool,
) -> tuple[Tensor, Tensor]:
    """(y, rstd) of x dense in its layout (`last`: channels-last); scale, shift [N, C] with dense rows."""
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[0], *x.shape[2:], dtype=torch.float32)
    programs, tiles = _tiles(x, last, FORWARD_TILE, FORWARD_PER_THREAD, 1)
    launch(
        _forward,
        (programs, x.shape[0]),
        **tiles,
        x=x,
        weight=weight,
        bias=bias,
        scale=scale,
        shift=shift,
        y=y,
        rstd=rstd,
        scale_n=sample_stride(scale),
        shift_n=sample_stride(shift),
        eps=eps,
        root=math.sqrt(x.shape[1]),
        INSIDE=eps_inside,
        SILU=apply_silu,
    )
    return y, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    apply_silu: bool,
    last: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dscale, dshift), each in the dtype of its operand; dy and x dense in one layout."""
    N, C = x.shape[:2]
    programs, tiles = _tiles(x, last, BACKWARD_TILE, BACKWARD_PER_THREAD, LEAST_PIXELS)
    dx = torch.empty_like(x)
    shared = any(v is not None for v in (weight, bias, scale, shift))
    parts = [x.new_empty(N, programs, C, dtype=torch.float32) if shared else None for _ in range(2)]
    launch(
        _backward,
        (programs, N),
        **tiles,
        dy=dy,
        x=x,
        rstd=rstd,
        weight=weight,
        bias=bias,
        scale=scale,
        shift=shift,
        dx=dx,
        part_dz=parts[0],
        part_dz_xhat=parts[1],
        scale_n=sample_stride(scale),
        shift_n=sample_stride(shift),
        SILU=apply_silu,
    )
    sums = [part if part is None else sum_partials(part, torch.float32) for part in parts]
    return dx, *parameter_gradients(*sums, weight, bias, scale, shift)


def _compile(C: int, side: int, dtype: torch.dtype, last: bool) -> None:
    def new(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    x = new(2, C, side, side).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    film, rstd = new(2, 2 * C)[:, :C], new(2, side, side, of=torch.float32)
    for inside in (False, True):
        forward(x, new(C), new(C), 1e-6, inside, film, film, True, last)
    backward(x, x, rstd, new(C), new(C), film, film, True, last)
    backward(x, x, rstd, None, None, None, None, True, last)


def _cases():
    half, full = torch.bfloat16, torch.float32
    for last in (False, True):
        yield from ((C, side, half, last) for C, side in ((96, 128), (384, 64), (1024, 32)))
        yield from ((C, side, full, last) for C, side in ((96, 128), (1024, 32)))
        yield 192, 64, torch.float16, last


COMPILE_CASES = {
    f"channel_rms_norm_silu-{C}x{side}-{long_name(dtype)}-{'nhwc' if last else 'nchw'}": partial(
        _compile, C, side, dtype, last
    )
    for C, side, dtype, last in _cases()
}
