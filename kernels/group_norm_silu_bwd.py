"""Backward of group_norm_silu: xhat = (x - mean) * rstd, z = (xhat * weight + bias) * (1 + scale) + shift (tiles:
_images.py).

dz = dy * silu'(z), g = dz * weight * (1 + scale), dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with means over the
group. Everything else follows from two sums per channel of each sample, A = sum of dz and B = sum of dz * xhat [N, C]:
the group's means are sums of A and B times weight * (1 + scale); dshift = A, dscale = weight * B + bias * A, and
dweight (dbias) is the sum over the samples of (1 + scale) * B (A). Sums are taken in a fixed order, no atomics.

One read (`_one_read`): grid (N, groups / GROUPS); a program holds x and dy of its groups. 3ns.
Split (`_sums`, `_combine`, `_apply`): partial A and B [N, parts, C]; combined; x and dy are read again. 5ns.
`_parameters` ends both. Zero path: where `flag` says that the branch is zero every gradient is 0, nothing is read.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, is_skipped, power_of_2, silu_grad
from ._images import affine, along_channels, by_group, flat, group_lanes, over_group, tile_at
from ._launch import launch
from .group_norm_silu import COMBINE, TILES, compile_cases, sample_stride

# (most elements of a program, elements of a tile, num_warps), channels-last and contiguous by element size.
ONE_READ_LAST = ((2048, 2048, 4), (4096, 2048, 4), (8192, 4096, 8))
ONE_READ = {size: (*ONE_READ_LAST, (most, 4096, 16)) for size, most in ((2, 20480), (4, 16384))}
# Channels of a program of `_parameters`.
COLUMNS = 64


@triton.jit
def _dz(dy, xhat, a, c, AXIS: tl.constexpr, SILU: tl.constexpr):
    if SILU:
        dz = dy * silu_grad(xhat * along_channels(a, AXIS) + along_channels(c, AXIS))
    else:
        dz = dy
    return dz


@triton.jit
def _one_read(
    dy, x, mean, rstd, weight, bias, scale, shift, dx, sum_a, sum_b, flag, C, HW, G, size, scale_n, shift_n,
    CPG: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr, PIXEL_BLOCKS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * GROUPS
    first_channel = first_group * CPG
    start = n * C * HW + first_channel.to(tl.int64) * (HW if AXIS == 0 else 1)
    dy += start
    x += start
    dx += start
    LANES: tl.constexpr = ROWS if AXIS == 0 else COLS
    if flag is not None:
        if is_skipped(flag):
            for i in tl.static_range(CHANNEL_BLOCKS):
                channel, group, valid = group_lanes(i, CPG, AXIS, ROWS, COLS, GROUPS)
                for j in tl.static_range(PIXEL_BLOCKS):
                    at, mask = tile_at(channel, valid, j, C, HW, AXIS, ROWS, COLS)
                    tl.store(dx + at, tl.zeros([ROWS, COLS], tl.float32), mask=mask)
                tl.store(sum_a + n * C + first_channel + channel, tl.zeros([LANES], tl.float32), mask=valid)
                tl.store(sum_b + n * C + first_channel + channel, tl.zeros([LANES], tl.float32), mask=valid)
            return
    group_a = tl.zeros([LANES], tl.float32)
    group_b = tl.zeros([LANES], tl.float32)
    xs = ()
    dys = ()
    for i in tl.static_range(CHANNEL_BLOCKS):
        channel, group, valid = group_lanes(i, CPG, AXIS, ROWS, COLS, GROUPS)
        a, c = affine(weight, bias, scale, shift, n, first_channel + channel, valid, scale_n, shift_n)
        m = tl.load(mean + n * G + first_group + group)
        r = tl.load(rstd + n * G + first_group + group)
        lane_a = tl.zeros([LANES], tl.float32)
        lane_b = tl.zeros([LANES], tl.float32)
        for j in tl.static_range(PIXEL_BLOCKS):
            at, mask = tile_at(channel, valid, j, C, HW, AXIS, ROWS, COLS)
            v = tl.load(x + at, mask=mask, other=0.0)
            g = tl.load(dy + at, mask=mask, other=0.0)
            xs = xs + (v,)
            dys = dys + (g,)
            xhat = (v.to(tl.float32) - along_channels(m, AXIS)) * along_channels(r, AXIS)
            dz = _dz(g.to(tl.float32), xhat, a, c, AXIS, SILU)
            lane_a += tl.sum(dz, 1 - AXIS)
            lane_b += tl.sum(dz * xhat, 1 - AXIS)
        tl.store(sum_a + n * C + first_channel + channel, lane_a, mask=valid)
        tl.store(sum_b + n * C + first_channel + channel, lane_b, mask=valid)
        group_a += lane_a * a
        group_b += lane_b * a
    group_a = over_group(group_a, GROUPS) / size
    group_b = over_group(group_b, GROUPS) / size
    for i in tl.static_range(CHANNEL_BLOCKS):
        channel, group, valid = group_lanes(i, CPG, AXIS, ROWS, COLS, GROUPS)
        a, c = affine(weight, bias, scale, shift, n, first_channel + channel, valid, scale_n, shift_n)
        m = tl.load(mean + n * G + first_group + group)
        r = tl.load(rstd + n * G + first_group + group)
        for j in tl.static_range(PIXEL_BLOCKS):
            at, mask = tile_at(channel, valid, j, C, HW, AXIS, ROWS, COLS)
            xhat = (xs[i * PIXEL_BLOCKS + j].to(tl.float32) - along_channels(m, AXIS)) * along_channels(r, AXIS)
            g = _dz(dys[i * PIXEL_BLOCKS + j].to(tl.float32), xhat, a, c, AXIS, SILU) * along_channels(a, AXIS)
            g -= along_channels(group_a, AXIS) + xhat * along_channels(group_b, AXIS)
            tl.store(dx + at, g * along_channels(r, AXIS), mask=mask)


@triton.jit
def _sums(
    dy, x, mean, rstd, weight, bias, scale, shift, part_a, part_b, flag, C, HW, G, steps, scale_n, shift_n,
    CPG: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Partial A and B; grid (parts, channel blocks, N)."""
    if flag is not None:
        if is_skipped(flag):
            return
    n = tl.program_id(2).to(tl.int64)
    LANES: tl.constexpr = ROWS if AXIS == 0 else COLS
    channel = tl.program_id(1).to(tl.int64) * LANES + tl.arange(0, LANES)
    valid = channel < C
    a, c = affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n)
    r = tl.load(rstd + n * G + channel // CPG, mask=valid, other=0.0)
    m = tl.load(mean + n * G + channel // CPG, mask=valid, other=0.0)
    lane_a = tl.zeros([LANES], tl.float32)
    lane_b = tl.zeros([LANES], tl.float32)
    for step in range(steps):
        block = tl.program_id(0).to(tl.int64) * steps + step
        at, mask = tile_at(channel, valid, block, C, HW, AXIS, ROWS, COLS)
        at += n * C * HW
        xhat = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - along_channels(m, AXIS)
        xhat *= along_channels(r, AXIS)
        dz = _dz(tl.load(dy + at, mask=mask, other=0.0).to(tl.float32), xhat, a, c, AXIS, SILU)
        lane_a += tl.sum(dz, 1 - AXIS)
        lane_b += tl.sum(dz * xhat, 1 - AXIS)
    at = (n * tl.num_programs(0) + tl.program_id(0)) * C + channel
    tl.store(part_a + at, lane_a, mask=valid)
    tl.store(part_b + at, lane_b, mask=valid)


@triton.jit
def _combine(
    part_a, part_b, weight, scale, sum_a, sum_b, group_a, group_b, flag, C, G, size, parts, scale_n,
    CPG: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A and B of one group's channels, and the group's means of g and g * xhat; grid (G, N)."""
    n = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    channel = tl.program_id(0) * CPG + lane
    inside = lane < CPG
    total_a = tl.zeros([BLOCK, WIDTH], tl.float32)
    total_b = tl.zeros([BLOCK, WIDTH], tl.float32)
    skipped = is_skipped(flag)
    for p0 in range(0, parts, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        mask = (p < parts)[:, None] & inside[None, :] & (not skipped)
        at = (n * parts + p)[:, None] * C + channel[None, :]
        total_a += tl.load(part_a + at, mask=mask, other=0.0)
        total_b += tl.load(part_b + at, mask=mask, other=0.0)
    lane_a = tl.sum(total_a, 0)
    lane_b = tl.sum(total_b, 0)
    tl.store(sum_a + n * C + channel, lane_a, mask=inside)
    tl.store(sum_b + n * C + channel, lane_b, mask=inside)
    a, c = affine(weight, None, scale, None, n, channel, inside, scale_n, 0)
    tl.store(group_a + n * G + tl.program_id(0), tl.sum(lane_a * a, 0) / size)
    tl.store(group_b + n * G + tl.program_id(0), tl.sum(lane_b * a, 0) / size)


@triton.jit
def _apply(
    dy, x, mean, rstd, weight, bias, scale, shift, dx, group_a, group_b, flag, C, HW, G, scale_n, shift_n,
    CPG: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx; grid (pixel blocks, channel blocks, N)."""
    n = tl.program_id(2).to(tl.int64)
    LANES: tl.constexpr = ROWS if AXIS == 0 else COLS
    channel = tl.program_id(1).to(tl.int64) * LANES + tl.arange(0, LANES)
    valid = channel < C
    at, mask = tile_at(channel, valid, tl.program_id(0).to(tl.int64), C, HW, AXIS, ROWS, COLS)
    at += n * C * HW
    if flag is not None:
        if is_skipped(flag):
            tl.store(dx + at, tl.zeros([ROWS, COLS], tl.float32), mask=mask)
            return
    a, c = affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n)
    group = n * G + channel // CPG
    r = tl.load(rstd + group, mask=valid, other=0.0)
    m = tl.load(mean + group, mask=valid, other=0.0)
    mean_g = tl.load(group_a + group, mask=valid, other=0.0)
    mean_gx = tl.load(group_b + group, mask=valid, other=0.0)
    xhat = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - along_channels(m, AXIS)
    xhat *= along_channels(r, AXIS)
    g = _dz(tl.load(dy + at, mask=mask, other=0.0).to(tl.float32), xhat, a, c, AXIS, SILU) * along_channels(a, AXIS)
    g -= along_channels(mean_g, AXIS) + xhat * along_channels(mean_gx, AXIS)
    tl.store(dx + at, g * along_channels(r, AXIS), mask=mask)


@triton.jit
def _parameters(
    sum_a, sum_b, weight, bias, scale, dweight, dbias, dscale, dshift, N, C, scale_n, BLOCK: tl.constexpr
):  # fmt: skip
    """From A and B: dscale and dshift of every sample, dweight and dbias summed over the samples in their order."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < C
    w = tl.where(valid, 1.0, 0.0)
    b = tl.zeros_like(w)
    if weight is not None:
        w = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)
    total_w = tl.zeros_like(w)
    total_b = tl.zeros_like(w)
    for sample in range(N):
        n = tl.cast(sample, tl.int64)
        lane_a = tl.load(sum_a + n * C + channel, mask=valid, other=0.0)
        lane_b = tl.load(sum_b + n * C + channel, mask=valid, other=0.0)
        gain = tl.where(valid, 1.0, 0.0)
        if scale is not None:
            gain += tl.load(scale + n * scale_n + channel, mask=valid, other=0.0).to(tl.float32)
            tl.store(dscale + n * C + channel, w * lane_b + b * lane_a, mask=valid)
        if dshift is not None:
            tl.store(dshift + n * C + channel, lane_a, mask=valid)
        total_w += gain * lane_b
        total_b += gain * lane_a
    if weight is not None:
        tl.store(dweight + channel, total_w, mask=valid)
    if bias is not None:
        tl.store(dbias + channel, total_b, mask=valid)


def _like(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.new_empty(v.shape)


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, num_groups: int, apply_silu: bool, last: bool,
    flag: Tensor | None = None, *, split: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dweight, dbias, dscale, dshift), each in the dtype of its operand; dy and x dense in one layout."""
    N, C = x.shape[:2]
    pixels, channels = math.prod(x.shape[2:]), C // num_groups
    dx = torch.empty_like(x)
    sum_a, sum_b = (x.new_empty(N, C, dtype=torch.float32) for _ in range(2))
    scale_n, shift_n = sample_stride(scale), sample_stride(shift)
    operands = {
        "dy": dy, "x": x, "mean": mean, "rstd": rstd, "weight": weight, "bias": bias, "scale": scale, "shift": shift,
        "flag": flag, "C": C, "HW": pixels, "G": num_groups, "CPG": channels, "SILU": apply_silu, "scale_n": scale_n,
        "shift_n": shift_n,
    }  # fmt: skip
    held = None
    if not split:
        held = by_group(
            channels, pixels, num_groups, last, ONE_READ_LAST if last else ONE_READ[x.element_size()], TILES
        )
    if held is not None:
        launch(
            _one_read, (N, num_groups // held.GROUPS), **vars(held), **operands, dx=dx, sum_a=sum_a, sum_b=sum_b,
            size=channels * pixels,
        )  # fmt: skip
    else:
        cut = flat(N, C, pixels, last)
        shape = {"AXIS": cut.AXIS, "ROWS": cut.ROWS, "COLS": cut.COLS, "num_warps": cut.num_warps}
        part_a, part_b = (x.new_empty(N, cut.parts, C, dtype=torch.float32) for _ in range(2))
        launch(
            _sums, (cut.parts, cut.channel_blocks, N), **operands, part_a=part_a, part_b=part_b, steps=cut.steps,
            **shape,
        )  # fmt: skip
        group_a, group_b = (x.new_empty(N, num_groups, dtype=torch.float32) for _ in range(2))
        width = power_of_2(channels)
        launch(
            _combine, (num_groups, N), part_a=part_a, part_b=part_b, weight=weight, scale=scale, sum_a=sum_a,
            sum_b=sum_b, group_a=group_a, group_b=group_b, flag=flag, C=C, G=num_groups, size=channels * pixels,
            parts=cut.parts, scale_n=scale_n, CPG=channels, WIDTH=width, BLOCK=max(1, min(COMBINE, 2048 // width)),
        )  # fmt: skip
        launch(
            _apply, (cut.pixel_blocks, cut.channel_blocks, N), **operands, dx=dx, group_a=group_a, group_b=group_b,
            **shape,
        )  # fmt: skip
    dweight, dbias, dscale, dshift = (_like(v) for v in (weight, bias, scale, shift))
    if any(v is not None for v in (weight, bias, scale, shift)):
        launch(
            _parameters, (cdiv(C, COLUMNS),), num_warps=2, sum_a=sum_a, sum_b=sum_b, weight=weight, bias=bias,
            scale=scale, dweight=dweight, dbias=dbias, dscale=dscale, dshift=dshift, N=N, C=C, scale_n=scale_n,
            BLOCK=COLUMNS,
        )  # fmt: skip
    return dx, dweight, dbias, dscale, dshift


def _compile(C: int, side: int, dtype: torch.dtype, last: bool, split: bool) -> None:
    def new(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    x = new(2, C, side, side).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    film, stat = new(2, 2 * C)[:, :C], new(2, 32, of=torch.float32)
    backward(x, x, stat, stat, new(C), new(C), film, film, 32, True, last, new(1, of=torch.int32), split=split)
    backward(x, x, stat, stat, new(C), new(C), None, None, 32, True, last, split=split)


COMPILE_CASES = compile_cases("group_norm_silu_bwd", _compile)
