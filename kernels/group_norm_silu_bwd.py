"""Backward of group_norm_silu: xhat = (x - mean) * rstd, z = (xhat * weight + bias) * (1 + scale) + shift.

math    dz = dy * silu'(z), g = dz * weight * (1 + scale), dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), means over
        the group. All else follows from two sums per sample and channel, [N, C]:

          sum_dz = sum of dz                dshift = sum_dz
          sum_dz_xhat = sum of dz * xhat    dscale = weight * sum_dz_xhat + bias * sum_dz
                                            dweight, dbias = (1 + scale) * sum_dz_xhat, sum_dz, added over the samples

        and the group's means are sums of these two times weight * (1 + scale). Tiles: _group_tiles.py.
grid    one read, for groups of up to 40960 16-bit or 20480 fp32 values: `_one_read`, (N, groups / GROUPS); a program
        keeps x and dy of its groups in registers. 3ns bytes.
        split, for larger groups: `_sums`, (pixel parts, channel blocks, N), partial sums [N, parts, C]; `_combine`,
        (G, N); `_apply`, (pixel blocks, channel blocks, N), reads x and dy again. 5ns bytes.
        `_reduce.parameter_gradients` ends both:
        dweight, dbias, dscale and dshift follow from the two sums and from the operands alone, by one small kernel
        that adds dweight and dbias over the samples.
order   tiles of a channel, parts and samples first to last. No atomics.
zero    flag != 0 (the branch is zero): every gradient is 0, x and dy are not read.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import float_of
from ._group_tiles import (
    affine,
    affines,
    along_channels,
    as_words,
    by_group,
    flat,
    flat_lanes,
    group_lanes,
    group_row,
    item,
    opaque,
    pack,
    per_group,
    per_lane,
    tile_at,
    unpack,
    values_per_word,
)
from ._launch import launch
from ._reduce import parameter_gradients
from ._rows import is_skipped, power_of_2, silu_grad
from .group_norm_silu import combine_parts, compile_cases, norm_operands, sample_stride

# (most words of x in a program, num_warps): x and dy take 164 of the 256 KB of registers
# (spills: python -m tests.triton.static).
ONE_READ = ((2048, 4), (20480, 8))


@triton.jit
def _terms(x, dy, m, r, a, c, SILU: tl.constexpr):
    """(xhat, dz)"""
    xhat = (x - m) * r
    if SILU:
        dy *= silu_grad(xhat * a + c)
    return xhat, dy


@triton.jit
def _added(totals, i: tl.constexpr, v):
    """A pair with v added to its entry i."""
    if i == 0:
        return (totals[0] + v, totals[1])
    else:
        return (totals[0], totals[1] + v)


@triton.jit
def _one_read(
    dy, x, mean, rstd, weight, bias, scale, shift, dx, sum_dz, sum_dz_xhat, flag, HW, G, size, scale_n, shift_n, zero,
    C: tl.constexpr, CPG: tl.constexpr, DTYPE: tl.constexpr, SILU: tl.constexpr, AXIS: tl.constexpr,
    PER_WORD: tl.constexpr, GROUPS: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PIXELS: tl.constexpr,
    COUNTS: tl.constexpr, FIRST: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """dy, x and dx in words, HW of them along the pixels; what is held of x and dy serves two passes."""
    n = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * GROUPS
    CPW: tl.constexpr = PER_WORD if AXIS == 1 else 1  # channels of a word
    first_channel = first_group * CPG
    start = n * (C // CPW) * HW + first_group.to(tl.int64) * (CPG // CPW) * (HW if AXIS == 0 else 1)
    dy += start
    x += start
    dx += start
    sum_dz += n * C + first_channel
    sum_dz_xhat += n * C + first_channel
    if flag is not None:
        if is_skipped(flag):
            for i in tl.static_range(BLOCKS):
                lane, valid = group_lanes(item(STARTS, i), item(WIDTHS, i), CPG // CPW, GROUPS)
                for j in tl.static_range(item(COUNTS, i)):
                    at, mask = tile_at(lane, valid, j, C // CPW, HW, AXIS, item(PIXELS, i))
                    tl.store(dx + at, tl.zeros_like(at), mask=mask)
                for s in tl.static_range(CPW):
                    tl.store(sum_dz + lane * CPW + s, tl.zeros([item(WIDTHS, i)], tl.float32), mask=valid)
                    tl.store(sum_dz_xhat + lane * CPW + s, tl.zeros([item(WIDTHS, i)], tl.float32), mask=valid)
            return
    m = tl.load(mean + n * G + first_group + tl.arange(0, GROUPS))
    r = tl.load(rstd + n * G + first_group + tl.arange(0, GROUPS))
    mean_g = tl.zeros([GROUPS], tl.float32)
    mean_g_xhat = tl.zeros([GROUPS], tl.float32)
    kept_x = ()
    kept_dy = ()
    for i in tl.static_range(BLOCKS):
        lane, valid = group_lanes(item(STARTS, i), item(WIDTHS, i), CPG // CPW, GROUPS)
        all_a, all_c = affines(weight, bias, scale, shift, n, first_channel, lane, valid, scale_n, shift_n, CPW)
        totals_dz = (0.0, 0.0)
        totals_dz_xhat = (0.0, 0.0)
        for j in tl.static_range(item(COUNTS, i)):
            at, mask = tile_at(lane, valid, j, C // CPW, HW, AXIS, item(PIXELS, i))
            x_words = tl.load(x + at, mask=mask, other=0)
            dy_words = tl.load(dy + at, mask=mask, other=0)
            kept_x = kept_x + (x_words,)
            kept_dy = kept_dy + (dy_words,)
            for h in tl.static_range(PER_WORD):
                xhat, dz = _terms(
                    unpack(x_words, h, PER_WORD, DTYPE),
                    unpack(dy_words, h, PER_WORD, DTYPE),
                    per_lane(m, item(WIDTHS, i), AXIS),
                    per_lane(r, item(WIDTHS, i), AXIS),
                    along_channels(all_a[h % CPW], AXIS),
                    along_channels(all_c[h % CPW], AXIS),
                    SILU,
                )
                totals_dz = _added(totals_dz, h % CPW, dz)
                totals_dz_xhat = _added(totals_dz_xhat, h % CPW, dz * xhat)
        for s in tl.static_range(CPW):
            lane_dz = tl.sum(totals_dz[s], 1 - AXIS)
            lane_dz_xhat = tl.sum(totals_dz_xhat[s], 1 - AXIS)
            tl.store(sum_dz + lane * CPW + s, lane_dz, mask=valid)
            tl.store(sum_dz_xhat + lane * CPW + s, lane_dz_xhat, mask=valid)
            mean_g += per_group(lane_dz * all_a[s], GROUPS)
            mean_g_xhat += per_group(lane_dz_xhat * all_a[s], GROUPS)
    mean_g /= size
    mean_g_xhat /= size
    for i in tl.static_range(BLOCKS):
        lane, valid = group_lanes(item(STARTS, i), item(WIDTHS, i), CPG // CPW, GROUPS)
        all_a, all_c = affines(weight, bias, scale, shift, n, first_channel, lane, valid, scale_n, shift_n, CPW)
        for j in tl.static_range(item(COUNTS, i)):
            at, mask = tile_at(lane, valid, j + zero, C // CPW, HW + zero, AXIS, item(PIXELS, i))
            x_words = opaque(kept_x[item(FIRST, i) + j], zero)
            dy_words = opaque(kept_dy[item(FIRST, i) + j], zero)
            out = tl.zeros_like(x_words)
            for h in tl.static_range(PER_WORD):
                xhat, dz = _terms(
                    unpack(x_words, h, PER_WORD, DTYPE),
                    unpack(dy_words, h, PER_WORD, DTYPE),
                    per_lane(m, item(WIDTHS, i), AXIS),
                    per_lane(r, item(WIDTHS, i), AXIS),
                    along_channels(all_a[h % CPW], AXIS),
                    along_channels(all_c[h % CPW], AXIS),
                    SILU,
                )
                g = dz * along_channels(all_a[h % CPW], AXIS) - per_lane(mean_g, item(WIDTHS, i), AXIS)
                g -= xhat * per_lane(mean_g_xhat, item(WIDTHS, i), AXIS)
                out |= pack(g * per_lane(r, item(WIDTHS, i), AXIS), h, PER_WORD, DTYPE)
            tl.store(dx + at, out, mask=mask)


@triton.jit
def _sums(
    dy, x, mean, rstd, weight, bias, scale, shift, part_dz, part_dz_xhat, flag, C, HW, G, steps, scale_n, shift_n,
    CPG: tl.constexpr, AXIS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The partial sums of a part of the pixels."""
    if flag is not None:
        if is_skipped(flag):
            return
    n = tl.program_id(2).to(tl.int64)
    channel, valid = flat_lanes(C, LANES)
    a, c = affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n)
    r = group_row(rstd, n, G, channel, valid, CPG, AXIS)
    m = group_row(mean, n, G, channel, valid, CPG, AXIS)
    lane_dz = tl.zeros([LANES], tl.float32)
    lane_dz_xhat = tl.zeros([LANES], tl.float32)
    for step in range(steps):
        block = tl.program_id(0).to(tl.int64) * steps + step
        at, mask = tile_at(channel, valid, block, C, HW, AXIS, PIXELS)
        at += n * C * HW
        xhat, dz = _terms(
            tl.load(x + at, mask=mask, other=0.0).to(tl.float32),
            tl.load(dy + at, mask=mask, other=0.0).to(tl.float32),
            m,
            r,
            along_channels(a, AXIS),
            along_channels(c, AXIS),
            SILU,
        )
        lane_dz += tl.sum(dz, 1 - AXIS)
        lane_dz_xhat += tl.sum(dz * xhat, 1 - AXIS)
    at = (n * tl.num_programs(0) + tl.program_id(0)) * C + channel
    tl.store(part_dz + at, lane_dz, mask=valid)
    tl.store(part_dz_xhat + at, lane_dz_xhat, mask=valid)


@triton.jit
def _combine(
    part_dz, part_dz_xhat, weight, scale, sum_dz, sum_dz_xhat, mean_g, mean_g_xhat, flag, C, G, size, parts, scale_n,
    CPG: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of one group's channels, and the group's means of g and g * xhat."""
    n = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    channel = tl.program_id(0) * CPG + lane
    inside = lane < CPG
    total_dz = tl.zeros([BLOCK, WIDTH], tl.float32)
    total_dz_xhat = tl.zeros([BLOCK, WIDTH], tl.float32)
    skipped = is_skipped(flag)
    for p0 in range(0, parts, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        mask = (p < parts)[:, None] & inside[None, :] & (not skipped)
        at = (n * parts + p)[:, None] * C + channel[None, :]
        total_dz += tl.load(part_dz + at, mask=mask, other=0.0)
        total_dz_xhat += tl.load(part_dz_xhat + at, mask=mask, other=0.0)
    lane_dz = tl.sum(total_dz, 0)
    lane_dz_xhat = tl.sum(total_dz_xhat, 0)
    tl.store(sum_dz + n * C + channel, lane_dz, mask=inside)
    tl.store(sum_dz_xhat + n * C + channel, lane_dz_xhat, mask=inside)
    a, c = affine(weight, None, scale, None, n, channel, inside, scale_n, 0)
    tl.store(mean_g + n * G + tl.program_id(0), tl.sum(lane_dz * a, 0) / size)
    tl.store(mean_g_xhat + n * G + tl.program_id(0), tl.sum(lane_dz_xhat * a, 0) / size)


@triton.jit
def _apply(
    dy, x, mean, rstd, weight, bias, scale, shift, dx, mean_g, mean_g_xhat, flag, C, HW, G, scale_n, shift_n,
    CPG: tl.constexpr, AXIS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx of a tile."""
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
        tl.load(x + at, mask=mask, other=0.0).to(tl.float32),
        tl.load(dy + at, mask=mask, other=0.0).to(tl.float32),
        group_row(mean, n, G, channel, valid, CPG, AXIS),
        r,
        a,
        along_channels(c, AXIS),
        SILU,
    )
    g = dz * a - group_row(mean_g, n, G, channel, valid, CPG, AXIS)
    g -= xhat * group_row(mean_g_xhat, n, G, channel, valid, CPG, AXIS)
    tl.store(dx + at, g * r, mask=mask)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    apply_silu: bool,
    last: bool,
    flag: Tensor | None = None,
    *,
    split: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dscale, dshift), each in the dtype of its operand; dy and x dense in one layout."""
    N, C = x.shape[:2]
    pixels, channels = math.prod(x.shape[2:]), C // num_groups
    dx = torch.empty_like(x)
    sums = {name: x.new_empty(N, C, dtype=torch.float32) for name in ("sum_dz", "sum_dz_xhat")}
    operands = norm_operands(x, num_groups, mean, rstd, weight, bias, scale, shift, apply_silu, flag)
    per_word = values_per_word(channels, pixels, last, x, dy)
    on_chip = None if split else by_group(channels, pixels, num_groups, last, per_word, ONE_READ)
    if on_chip is not None:
        words = {name: as_words(t, per_word) for name, t in (("dy", dy), ("x", x), ("dx", dx))}
        launch(
            _one_read,
            (N, num_groups // on_chip.GROUPS),
            **vars(on_chip),
            **operands,
            **words,
            **sums,
            HW=pixels if last else pixels // per_word,
            size=channels * pixels,
            zero=0,
            DTYPE=float_of(x.dtype),
        )
    else:
        tiles = flat(N, C, pixels, last)
        operands |= {"dy": dy, "x": x, "HW": pixels}
        names = ("part_dz", "part_dz_xhat")
        partials = {name: x.new_empty(N, tiles.parts, C, dtype=torch.float32) for name in names}
        grid = tiles.parts, tiles.channel_blocks, N
        launch(_sums, grid, **operands, **partials, steps=tiles.steps, **tiles.options)
        means = {name: x.new_empty(N, num_groups, dtype=torch.float32) for name in ("mean_g", "mean_g_xhat")}
        width = power_of_2(channels)
        launch(
            _combine,
            (num_groups, N),
            **partials,
            weight=weight,
            scale=scale,
            **sums,
            **means,
            flag=flag,
            C=C,
            G=num_groups,
            size=channels * pixels,
            parts=tiles.parts,
            scale_n=sample_stride(scale),
            CPG=channels,
            WIDTH=width,
            BLOCK=combine_parts(width),
        )
        grid = tiles.pixel_blocks, tiles.channel_blocks, N
        launch(_apply, grid, **operands, **means, dx=dx, **tiles.options)
    return dx, *parameter_gradients(sums["sum_dz"], sums["sum_dz_xhat"], weight, bias, scale, shift)


def _compile(C: int, side: int, dtype: torch.dtype, last: bool, split: bool) -> None:
    def new(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    x = new(2, C, side, side).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    film, stat = new(2, 2 * C)[:, :C], new(2, 32, of=torch.float32)
    backward(x, x, stat, stat, new(C), new(C), film, film, 32, True, last, new(1, of=torch.int32), split=split)
    backward(x, x, stat, stat, new(C), new(C), None, None, 32, True, last, split=split)


COMPILE_CASES = compile_cases("group_norm_silu_bwd", _compile)
