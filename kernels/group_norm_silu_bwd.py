"""Backward of group_norm_silu: xhat = (x - mean) * rstd, z = (xhat * weight + bias) * (1 + scale) + shift (tiles:
_images.py).

dz = dy * silu'(z), g = dz * weight * (1 + scale), dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with means over the
group. Everything else follows from two sums per channel of each sample, A = sum of dz and B = sum of dz * xhat [N, C]:
the group's means are sums of A and B times weight * (1 + scale); dshift = A, dscale = weight * B + bias * A, and
dweight (dbias) is the sum over the samples of (1 + scale) * B (A). Sums are taken in a fixed order, no atomics.

One read (`_one_read`): grid (N, groups / GROUPS); a program holds x and dy of its groups. 3ns.
Split (`_sums`, `_combine`, `_apply`): partial A and B [N, parts, C]; combined; x and dy are read again. 5ns. For groups
of more than 40960 16-bit numbers or 20480 in fp32: 164 of the 256 KB of registers hold x and dy.
`_parameters` ends both. Zero path: where `flag` says that the branch is zero every gradient is 0, nothing is read.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, is_skipped, power_of_2, silu_grad
from ._images import (
    NUMBERS,
    affine,
    affines,
    again,
    along_channels,
    by_group,
    channel_row,
    flat,
    flat_lanes,
    group_lanes,
    group_row,
    halves_of,
    item,
    number,
    per_group,
    per_lane,
    tile_at,
    word,
    words_of,
)
from ._launch import launch
from .group_norm_silu import COMBINE, compile_cases, sample_stride

# (most words of x in a program, num_warps)
ONE_READ = ((2048, 4), (20480, 8))
# Channels of a program of `_parameters`.
COLUMNS = 64


@triton.jit
def _terms(x, dy, m, r, a, c, SILU: tl.constexpr):
    """(xhat, dz)"""
    xhat = (x - m) * r
    if SILU:
        dy *= silu_grad(xhat * a + c)
    return xhat, dy


@triton.jit
def _added(totals, i: tl.constexpr, v):
    """A pair with v added to number i."""
    if i == 0:
        return (totals[0] + v, totals[1])
    else:
        return (totals[0], totals[1] + v)


@triton.jit
def _one_read(
    dy, x, mean, rstd, weight, bias, scale, shift, dx, sum_a, sum_b, flag, HW, G, size, scale_n, shift_n, zero,
    C: tl.constexpr, CPG: tl.constexpr, T: tl.constexpr, SILU: tl.constexpr, AXIS: tl.constexpr, HALVES: tl.constexpr,
    GROUPS: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PIXELS: tl.constexpr, COUNTS: tl.constexpr,
    FIRST: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """dy, x and dx in words, HW of them along the pixels; what is held of x and dy serves two passes."""
    n = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * GROUPS
    STEP: tl.constexpr = HALVES if AXIS == 1 else 1  # channels of a word
    first_channel = first_group * CPG
    start = n * (C // STEP) * HW + first_group.to(tl.int64) * (CPG // STEP) * (HW if AXIS == 0 else 1)
    dy += start
    x += start
    dx += start
    sum_a += n * C + first_channel
    sum_b += n * C + first_channel
    if flag is not None:
        if is_skipped(flag):
            for i in tl.static_range(BLOCKS):
                lane, valid = group_lanes(STARTS[i], WIDTHS[i], CPG // STEP, GROUPS)
                for j in tl.static_range(item(COUNTS, i)):
                    at, mask = tile_at(lane, valid, j, C // STEP, HW, AXIS, PIXELS[i])
                    tl.store(dx + at, tl.zeros_like(at), mask=mask)
                for s in tl.static_range(STEP):
                    tl.store(sum_a + lane * STEP + s, tl.zeros([WIDTHS[i]], tl.float32), mask=valid)
                    tl.store(sum_b + lane * STEP + s, tl.zeros([WIDTHS[i]], tl.float32), mask=valid)
            return
    m = tl.load(mean + n * G + first_group + tl.arange(0, GROUPS))
    r = tl.load(rstd + n * G + first_group + tl.arange(0, GROUPS))
    mean_a = tl.zeros([GROUPS], tl.float32)
    mean_b = tl.zeros([GROUPS], tl.float32)
    xs = ()
    dys = ()
    for i in tl.static_range(BLOCKS):
        lane, valid = group_lanes(STARTS[i], WIDTHS[i], CPG // STEP, GROUPS)
        gains, offsets = affines(weight, bias, scale, shift, n, first_channel, lane, valid, scale_n, shift_n, STEP)
        totals_a = (0.0, 0.0)
        totals_b = (0.0, 0.0)
        for j in tl.static_range(item(COUNTS, i)):
            at, mask = tile_at(lane, valid, j, C // STEP, HW, AXIS, PIXELS[i])
            x_words = tl.load(x + at, mask=mask, other=0)
            dy_words = tl.load(dy + at, mask=mask, other=0)
            xs = xs + (x_words,)
            dys = dys + (dy_words,)
            for h in tl.static_range(HALVES):
                xhat, dz = _terms(
                    number(x_words, h, HALVES, T), number(dy_words, h, HALVES, T), per_lane(m, WIDTHS[i], AXIS),
                    per_lane(r, WIDTHS[i], AXIS), along_channels(gains[h % STEP], AXIS),
                    along_channels(offsets[h % STEP], AXIS), SILU,
                )  # fmt: skip
                totals_a = _added(totals_a, h % STEP, dz)
                totals_b = _added(totals_b, h % STEP, dz * xhat)
        for s in tl.static_range(STEP):
            lane_a = tl.sum(totals_a[s], 1 - AXIS)
            lane_b = tl.sum(totals_b[s], 1 - AXIS)
            tl.store(sum_a + lane * STEP + s, lane_a, mask=valid)
            tl.store(sum_b + lane * STEP + s, lane_b, mask=valid)
            mean_a += per_group(lane_a * gains[s], GROUPS)
            mean_b += per_group(lane_b * gains[s], GROUPS)
    mean_a /= size
    mean_b /= size
    for i in tl.static_range(BLOCKS):
        lane, valid = group_lanes(STARTS[i], WIDTHS[i], CPG // STEP, GROUPS)
        gains, offsets = affines(weight, bias, scale, shift, n, first_channel, lane, valid, scale_n, shift_n, STEP)
        for j in tl.static_range(item(COUNTS, i)):
            at, mask = tile_at(lane, valid, j + zero, C // STEP, HW + zero, AXIS, PIXELS[i])
            x_words = again(xs[item(FIRST, i) + j], zero)
            dy_words = again(dys[item(FIRST, i) + j], zero)
            out = tl.zeros_like(x_words)
            for h in tl.static_range(HALVES):
                xhat, dz = _terms(
                    number(x_words, h, HALVES, T), number(dy_words, h, HALVES, T), per_lane(m, WIDTHS[i], AXIS),
                    per_lane(r, WIDTHS[i], AXIS), along_channels(gains[h % STEP], AXIS),
                    along_channels(offsets[h % STEP], AXIS), SILU,
                )  # fmt: skip
                g = dz * along_channels(gains[h % STEP], AXIS) - per_lane(mean_a, WIDTHS[i], AXIS)
                g -= xhat * per_lane(mean_b, WIDTHS[i], AXIS)
                out |= word(g * per_lane(r, WIDTHS[i], AXIS), h, HALVES, T)
            tl.store(dx + at, out, mask=mask)


@triton.jit
def _sums(
    dy, x, mean, rstd, weight, bias, scale, shift, part_a, part_b, flag, C, HW, G, steps, scale_n, shift_n,
    CPG: tl.constexpr, AXIS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Partial A and B; grid (parts, channel blocks, N)."""
    if flag is not None:
        if is_skipped(flag):
            return
    n = tl.program_id(2).to(tl.int64)
    channel, valid = flat_lanes(C, LANES)
    a, c = affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n)
    r = group_row(rstd, n, G, channel, valid, CPG, AXIS)
    m = group_row(mean, n, G, channel, valid, CPG, AXIS)
    lane_a = tl.zeros([LANES], tl.float32)
    lane_b = tl.zeros([LANES], tl.float32)
    for step in range(steps):
        block = tl.program_id(0).to(tl.int64) * steps + step
        at, mask = tile_at(channel, valid, block, C, HW, AXIS, PIXELS)
        at += n * C * HW
        xhat, dz = _terms(
            tl.load(x + at, mask=mask, other=0.0).to(tl.float32), tl.load(dy + at, mask=mask, other=0.0).to(tl.float32),
            m, r, along_channels(a, AXIS), along_channels(c, AXIS), SILU,
        )  # fmt: skip
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
    CPG: tl.constexpr, AXIS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx; grid (pixel blocks, channel blocks, N)."""
    n = tl.program_id(2).to(tl.int64)
    channel, valid = flat_lanes(C, LANES)
    at, mask = tile_at(channel, valid, tl.program_id(0).to(tl.int64), C, HW, AXIS, PIXELS)
    at += n * C * HW
    if flag is not None:
        if is_skipped(flag):
            tl.store(dx + at, tl.zeros_like(at), mask=mask)
            return
    a, c = affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n)
    a = along_channels(a, AXIS)
    r = group_row(rstd, n, G, channel, valid, CPG, AXIS)
    xhat, dz = _terms(
        tl.load(x + at, mask=mask, other=0.0).to(tl.float32), tl.load(dy + at, mask=mask, other=0.0).to(tl.float32),
        group_row(mean, n, G, channel, valid, CPG, AXIS), r, a, along_channels(c, AXIS), SILU,
    )  # fmt: skip
    g = dz * a - group_row(group_a, n, G, channel, valid, CPG, AXIS)
    g -= xhat * group_row(group_b, n, G, channel, valid, CPG, AXIS)
    tl.store(dx + at, g * r, mask=mask)


@triton.jit
def _parameters(
    sum_a, sum_b, weight, bias, scale, dweight, dbias, dscale, dshift, N, C, scale_n, BLOCK: tl.constexpr
):  # fmt: skip
    """From A and B: dscale and dshift of every sample, dweight and dbias summed over the samples in their order."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < C
    w = channel_row(weight, channel, valid, 1.0)
    b = channel_row(bias, channel, valid, 0.0)
    total_w = tl.zeros_like(w)
    total_b = tl.zeros_like(w)
    for sample in range(N):
        n = tl.cast(sample, tl.int64)
        lane_a = tl.load(sum_a + n * C + channel, mask=valid, other=0.0)
        lane_b = tl.load(sum_b + n * C + channel, mask=valid, other=0.0)
        gain = tl.where(valid, 1.0, 0.0)
        if scale is not None:
            gain += channel_row(scale + n * scale_n, channel, valid, 0.0)
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
        "mean": mean, "rstd": rstd, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "flag": flag,
        "G": num_groups, "CPG": channels, "SILU": apply_silu, "C": C, "scale_n": scale_n, "shift_n": shift_n,
    }  # fmt: skip
    halves = halves_of(channels, pixels, last, x, dy)
    held = None if split else by_group(channels, pixels, num_groups, last, halves, ONE_READ)
    if held is not None:
        words = {name: words_of(t, halves) for name, t in (("dy", dy), ("x", x), ("dx", dx))}
        launch(
            _one_read, (N, num_groups // held.GROUPS), **vars(held), **operands, **words, sum_a=sum_a, sum_b=sum_b,
            HW=pixels if last else pixels // halves, size=channels * pixels, zero=0, T=NUMBERS[x.dtype],
        )  # fmt: skip
    else:
        cut = flat(N, C, pixels, last)
        shape = {"AXIS": cut.AXIS, "LANES": cut.LANES, "PIXELS": cut.PIXELS, "num_warps": cut.num_warps}
        operands |= {"dy": dy, "x": x, "HW": pixels}
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
