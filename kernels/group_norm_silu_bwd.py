"""Backward of group_norm_silu: xhat = (x - mean) * rstd, z = (xhat * weight + bias) * (1 + scale) + shift.

math    dz = dy * silu'(z), g = dz * weight * (1 + scale), dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), means over
        the group. All else follows from two sums per sample and channel, [N, C]:

          sum_dz = sum of dz                dshift = sum_dz
          sum_dz_xhat = sum of dz * xhat    dscale = weight * sum_dz_xhat + bias * sum_dz
                                            dweight, dbias = (1 + scale) * sum_dz_xhat, sum_dz, added over the samples

        and the group's means are sums of these two times weight * (1 + scale). Tiles: _group_tiles.py.
grid    held, for groups of up to 20480 numbers, channels-last 10240: `_one_read`, (N, groups / GROUPS); a program keeps
        xhat and dz of its groups in registers. 3ns bytes.
        split: `_sums`, (parts, channel blocks, N), the two sums over a part of the pixels, [N, parts, C], and the means
        over a piece of the group, [N, G, pieces]; `_apply`, the same grid from its end: every program adds up the
        pieces of its groups and reads its part of x and dy again, those of part 0 add up the parts. 5ns bytes, of which
        2ns come from a cache that holds what was read last (a model: of 50 MB, all of them up to 20 MB of x).
        `_reduce.parameter_gradients` ends both:
        dweight, dbias, dscale and dshift follow from the two sums and from the operands alone, by one small kernel
        that adds dweight and dbias over the samples.
order   pixels of a program, parts, pieces and samples first to last. No atomics.
zero    flag != 0 (the branch is zero): every gradient is 0, x and dy are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._group_tiles import (
    ALONE,
    affine,
    along_channels,
    block_lanes,
    held,
    part_tile,
    per_group,
    per_lane,
    split_tiles,
    tile_at,
)
from ._launch import launch
from ._reduce import column_sums, parameter_gradients
from ._rows import is_skipped, power_of_2, silu_grad
from .group_norm_silu import PIECE_NUMBERS, compile_cases, norm_operands, pieces_at_once

# (most numbers of x in a program, num_warps), contiguous and channels-last: 40 of a thread, which keeps xhat and dz, in
# tails 8 or more (spills and access widths: python -m tests.triton.static).
HELD = ((2560, 2), (5120, 4), (10240, 8), (20480, 16)), ((2560, 2), (5120, 4), (10240, 8))
# Programs of a launch that splits: two on each of an H100's 132 SMs (resident blocks: python -m tests.triton.static).
PROGRAMS = 256


@triton.jit
def _statistic(p, n, G, channel, valid, CPG: tl.constexpr, AXIS: tl.constexpr):
    """mean or rstd [N, G] of the groups of these channels, shaped to broadcast against a tile."""
    return along_channels(tl.load(p + n * G + channel // CPG, mask=valid, other=0.0), AXIS)


@triton.jit
def _terms(x, dy, at, mask, m, r, a, c, SILU: tl.constexpr, AXIS: tl.constexpr):
    """(xhat, dz)"""
    xhat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - m) * r
    dz = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        dz *= silu_grad(xhat * along_channels(a, AXIS) + along_channels(c, AXIS))
    return xhat, dz


@triton.jit
def _store_rows(p, q, at, v, w, mask):
    """v at p and w at q, rows [C] of numbers that nothing may need."""
    if p is not None:
        tl.store(p + at, v, mask=mask)
        tl.store(q + at, w, mask=mask)


@triton.jit
def _one_read(
    dy, x, mean, rstd, weight, bias, scale, shift, dx, sum_dz, sum_dz_xhat, flag, C, HW, G, size, scale_n, shift_n,
    CPG: tl.constexpr, SILU: tl.constexpr, AXIS: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Tile 1 has the program's first HEAD channels, tile 2 the others."""
    n = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (GROUPS * CPG)
    start = n * C * HW + first.to(tl.int64) * (HW if AXIS == 0 else 1)
    lane1 = tl.arange(0, HEAD)
    valid1 = lane1 < GROUPS * CPG
    at1, mask1 = tile_at(lane1, valid1, 0, C, HW, AXIS, PIXELS)
    if TAIL > 0:
        lane2 = HEAD + tl.arange(0, TAIL)
        valid2 = lane2 < GROUPS * CPG
        at2, mask2 = tile_at(lane2, valid2, 0, C, HW, AXIS, PIXELS)
    if flag is not None:
        if is_skipped(flag):
            none = tl.zeros([HEAD], tl.float32)
            tl.store(dx + start + at1, tl.zeros_like(at1), mask=mask1)
            _store_rows(sum_dz, sum_dz_xhat, n * C + first + lane1, none, none, valid1)
            if TAIL > 0:
                nothing = tl.zeros([TAIL], tl.float32)
                tl.store(dx + start + at2, tl.zeros_like(at2), mask=mask2)
                _store_rows(sum_dz, sum_dz_xhat, n * C + first + lane2, nothing, nothing, valid2)
            return
    m1 = _statistic(mean, n, G, first + lane1, valid1, CPG, AXIS)
    r1 = _statistic(rstd, n, G, first + lane1, valid1, CPG, AXIS)
    a1, c1 = affine(weight, bias, scale, shift, n, first + lane1, valid1, scale_n, shift_n)
    xhat1, dz1 = _terms(x + start, dy + start, at1, mask1, m1, r1, a1, c1, SILU, AXIS)
    lane_dz = tl.sum(dz1, 1 - AXIS)
    lane_dz_xhat = tl.sum(dz1 * xhat1, 1 - AXIS)
    _store_rows(sum_dz, sum_dz_xhat, n * C + first + lane1, lane_dz, lane_dz_xhat, valid1)
    mean_g = per_group(lane_dz * a1, 0, CPG, SLOTS)
    mean_g_xhat = per_group(lane_dz_xhat * a1, 0, CPG, SLOTS)
    if TAIL > 0:
        m2 = _statistic(mean, n, G, first + lane2, valid2, CPG, AXIS)
        r2 = _statistic(rstd, n, G, first + lane2, valid2, CPG, AXIS)
        a2, c2 = affine(weight, bias, scale, shift, n, first + lane2, valid2, scale_n, shift_n)
        xhat2, dz2 = _terms(x + start, dy + start, at2, mask2, m2, r2, a2, c2, SILU, AXIS)
        lane_dz = tl.sum(dz2, 1 - AXIS)
        lane_dz_xhat = tl.sum(dz2 * xhat2, 1 - AXIS)
        _store_rows(sum_dz, sum_dz_xhat, n * C + first + lane2, lane_dz, lane_dz_xhat, valid2)
        mean_g += per_group(lane_dz * a2, HEAD, CPG, SLOTS)
        mean_g_xhat += per_group(lane_dz_xhat * a2, HEAD, CPG, SLOTS)
    mean_g /= size
    mean_g_xhat /= size
    g = dz1 * along_channels(a1, AXIS) - along_channels(per_lane(mean_g, HEAD, 0, CPG), AXIS)
    g -= xhat1 * along_channels(per_lane(mean_g_xhat, HEAD, 0, CPG), AXIS)
    tl.store(dx + start + at1, g * r1, mask=mask1)
    if TAIL > 0:
        g = dz2 * along_channels(a2, AXIS) - along_channels(per_lane(mean_g, TAIL, HEAD, CPG), AXIS)
        g -= xhat2 * along_channels(per_lane(mean_g_xhat, TAIL, HEAD, CPG), AXIS)
        tl.store(dx + start + at2, g * r2, mask=mask2)


@triton.jit
def _sums(
    dy, x, mean, rstd, weight, bias, scale, shift, part_dz, part_dz_xhat, part_g, part_g_xhat, flag, C, HW, G, steps,
    scale_n, shift_n,
    CPG: tl.constexpr, SILU: tl.constexpr, AXIS: tl.constexpr, GROUPS: tl.constexpr, SUBS: tl.constexpr,
    SLOTS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The sums of a part of the pixels."""
    if flag is not None:
        if is_skipped(flag):
            return
    n = tl.program_id(2).to(tl.int64)
    first, lane, valid, group, owned = block_lanes(tl.program_id(1), C, CPG, GROUPS, SUBS, SLOTS, LANES)
    channel = first + lane
    a, c = affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n)
    m = _statistic(mean, n, G, channel, valid, CPG, AXIS)
    r = _statistic(rstd, n, G, channel, valid, CPG, AXIS)
    lane_dz = tl.zeros([LANES], tl.float32)
    lane_dz_xhat = tl.zeros([LANES], tl.float32)
    x += n * C * HW
    dy += n * C * HW
    for step in range(tl.program_id(0) * steps, (tl.program_id(0) + 1) * steps):
        start, at, mask = part_tile(first, lane, valid, tl.cast(step, tl.int64), C, HW, AXIS, PIXELS)
        xhat, dz = _terms(x + start, dy + start, at, mask, m, r, a, c, SILU, AXIS)
        lane_dz += tl.sum(dz, 1 - AXIS)
        lane_dz_xhat += tl.sum(dz * xhat, 1 - AXIS)
    at = (n * tl.num_programs(0) + tl.program_id(0)) * C + channel
    _store_rows(part_dz, part_dz_xhat, at, lane_dz, lane_dz_xhat, valid)
    at = (n * G + group) * (tl.num_programs(0) * SUBS) + tl.program_id(0) * SUBS + tl.program_id(1) % SUBS
    tl.store(part_g + at, per_group(lane_dz * a, 0, CPG, SLOTS), mask=owned)
    tl.store(part_g_xhat + at, per_group(lane_dz_xhat * a, 0, CPG, SLOTS), mask=owned)


@triton.jit
def _total(parts, row, owned, pieces, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """[SLOTS] sums of the pieces of these groups, whose first ones are at `row`."""
    total = tl.zeros([BLOCK, SLOTS], tl.float32)
    for p0 in range(0, pieces, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        mask = (p < pieces)[:, None] & owned[None, :]
        total += tl.load(parts + row[None, :] + p[:, None], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _apply(
    dy, x, mean, rstd, weight, bias, scale, shift, part_dz, part_dz_xhat, part_g, part_g_xhat, flag,
    dx, sum_dz, sum_dz_xhat, C, HW, G, steps, size, scale_n, shift_n,
    CPG: tl.constexpr, SILU: tl.constexpr, AXIS: tl.constexpr, GROUPS: tl.constexpr, SUBS: tl.constexpr,
    SLOTS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """What `_sums` read last is applied first, while a cache has it."""
    n = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first, lane, valid, group, owned = block_lanes(block, C, CPG, GROUPS, SUBS, SLOTS, LANES)
    channel = first + lane
    skipped = is_skipped(flag)
    if part == 0 and sum_dz is not None:
        parts = tl.num_programs(0) * (0 if skipped else 1)
        lane_dz = column_sums(part_dz + n * tl.num_programs(0) * C, 0, parts, C, channel, BLOCK_P, LANES)
        lane_dz_xhat = column_sums(part_dz_xhat + n * tl.num_programs(0) * C, 0, parts, C, channel, BLOCK_P, LANES)
        _store_rows(sum_dz, sum_dz_xhat, n * C + channel, lane_dz, lane_dz_xhat, valid)
    if skipped:
        for step in range(steps):
            start, at, mask = part_tile(first, lane, valid, part.to(tl.int64) * steps + step, C, HW, AXIS, PIXELS)
            tl.store(dx + (n * C * HW + start) + at, tl.zeros_like(at), mask=mask)
    else:
        pieces = tl.num_programs(0) * SUBS
        row = (n * G + group) * pieces
        mean_g = _total(part_g, row, owned, pieces, SLOTS, BLOCK) / size
        mean_g_xhat = _total(part_g_xhat, row, owned, pieces, SLOTS, BLOCK) / size
        mean_g = along_channels(per_lane(mean_g, LANES, 0, CPG), AXIS)
        mean_g_xhat = along_channels(per_lane(mean_g_xhat, LANES, 0, CPG), AXIS)
        a, c = affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n)
        m = _statistic(mean, n, G, channel, valid, CPG, AXIS)
        r = _statistic(rstd, n, G, channel, valid, CPG, AXIS)
        for step in range(steps):
            start, at, mask = part_tile(first, lane, valid, part.to(tl.int64) * steps + step, C, HW, AXIS, PIXELS)
            start += n * C * HW
            xhat, dz = _terms(x + start, dy + start, at, mask, m, r, a, c, SILU, AXIS)
            g = dz * along_channels(a, AXIS) - mean_g - xhat * mean_g_xhat
            tl.store(dx + start + at, g * r, mask=mask)


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
    split: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dscale, dshift), each in the dtype of its operand; dy and x dense in one layout.
    split: None chooses by size, False holds every group that fits."""
    N, C = x.shape[:2]
    dx = torch.empty_like(x)
    operands = norm_operands(x, num_groups, mean, rstd, weight, bias, scale, shift, apply_silu, flag)
    pixels, channels = operands["HW"], operands["CPG"]
    operands |= {"dy": dy, "size": channels * pixels}
    shared = any(v is not None for v in (weight, bias, scale, shift))

    def rows(*size: int) -> Tensor | None:
        return x.new_empty(*size, dtype=torch.float32) if shared else None

    sums = {"sum_dz": rows(N, C), "sum_dz_xhat": rows(N, C)}
    sizes = N, channels, pixels, num_groups, last, x.element_size()
    on_chip = None if split else held(*sizes, HELD, ALONE // 2 if split is None else 1 << 31)
    if on_chip is not None:
        tiles = on_chip._asdict()
        del tiles["EVEN"]  # what lies outside is 0 in every sum
        launch(_one_read, (N, num_groups // on_chip.GROUPS), **operands, **tiles, **sums, dx=dx)
    else:
        cut = split_tiles(*sizes, PROGRAMS)
        pieces = x.new_empty(2, N, num_groups, cut.pieces, dtype=torch.float32)
        partials = {
            "part_dz": rows(N, cut.parts, C),
            "part_dz_xhat": rows(N, cut.parts, C),
            "part_g": pieces[0],
            "part_g_xhat": pieces[1],
        }
        size, grid = operands.pop("size"), (cut.parts, cut.blocks, N)
        launch(_sums, grid, **operands, **partials, **cut.options)
        launch(
            _apply,
            grid,
            **operands,
            **partials,
            **sums,
            **cut.options,
            dx=dx,
            size=size,
            BLOCK=pieces_at_once(cut.pieces, cut.SLOTS),
            BLOCK_P=min(power_of_2(cut.parts), PIECE_NUMBERS // cut.LANES),
        )
    return dx, *parameter_gradients(*sums.values(), weight, bias, scale, shift)


def _compile(C: int, side: int, dtype: torch.dtype, last: bool, split: bool) -> None:
    def new(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    x = new(8, C, side, side).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    film, stat = new(8, 2 * C)[:, :C], new(8, 32, of=torch.float32)
    backward(x, x, stat, stat, new(C), new(C), film, film, 32, True, last, new(1, of=torch.int32), split=split)
    backward(x, x, stat, stat, new(C), new(C), None, None, 32, True, last, split=split)


COMPILE_CASES = compile_cases("group_norm_silu_bwd", _compile)
