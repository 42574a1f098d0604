"""group_norm_silu: y = silu(group_norm(x) * (1 + scale) + shift), x [N, C, *S] contiguous or channels-last.

math    fp32: the mean, then the centred squares together with the mean of the centred values, a rounding error by which
        both are corrected. mean and rstd [N, G] are saved for backward. Tiles: _group_tiles.py.
grid    held, for groups of up to 40960 numbers, channels-last 20480: `_one_read`, (N, groups / GROUPS); a program keeps
        its groups in registers. 2ns bytes.
        split: `_moments`, (parts, channel blocks, N), mean and centred squares of each group over a piece of it,
        [N, G, pieces]; `_apply`, the same grid from its end: every program combines the pieces of its groups and reads
        its part of x again. 3ns bytes, of which ns come from a cache that holds what was read last (a model: of 50 MB,
        all of them up to 40 MB of x).
        Channels-last rows of 64 bytes are several groups, which no register file holds at the large stages of a U-Net:
        320 channels at 64 x 64 are split (sectors 1.07 times the bytes; one group at a time is one read in 3.8 times as
        many). So are large groups of few samples, since a program each leaves most of a GPU idle.
order   pixels of a program first to last; pieces of a group first to last. No atomics.
zero    flag != 0 (the branch is zero): every program leaves at once, mean and rstd are set to 0, y is undefined.
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
from ._rows import defined_variance, is_skipped, power_of_2, silu

# (most numbers of a program, num_warps), contiguous and channels-last: 80 or 40 numbers of a thread, in tails 8 or more
# (spills and access widths: python -m tests.triton.static).
HELD = ((2560, 2), (5120, 4), (20480, 8), (40960, 16)), ((2560, 2), (5120, 4), (10240, 8), (20480, 16))
# Programs of a launch that splits: four on each of an H100's 132 SMs (resident blocks: python -m tests.triton.static).
PROGRAMS = 512
# Pieces that a program combines at a time, and numbers of them (registers: python -m tests.triton.static).
PIECES, PIECE_NUMBERS = 64, 2048


@triton.jit
def _inside(v, mask, EVEN: tl.constexpr):
    return v if EVEN else tl.where(mask, v, 0.0)


@triton.jit
def _one_read(
    x, weight, bias, scale, shift, y, mean, rstd, flag, C, HW, G, size, scale_n, shift_n, eps,
    CPG: tl.constexpr, SILU: tl.constexpr, AXIS: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, PIXELS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tile 1 has the program's first HEAD channels, tile 2 the others."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    group = n * G + tl.program_id(1) * GROUPS + slot
    owned = slot < GROUPS
    if flag is not None:
        if is_skipped(flag):
            tl.store(mean + group, tl.zeros([SLOTS], tl.float32), mask=owned)
            tl.store(rstd + group, tl.zeros([SLOTS], tl.float32), mask=owned)
            return
    first = tl.program_id(1) * (GROUPS * CPG)
    start = n * C * HW + first.to(tl.int64) * (HW if AXIS == 0 else 1)
    lane1 = tl.arange(0, HEAD)
    valid1 = lane1 < GROUPS * CPG
    at1, mask1 = tile_at(lane1, valid1, 0, C, HW, AXIS, PIXELS)
    v1 = tl.load(x + start + at1, mask=mask1, other=0.0).to(tl.float32)
    m = per_group(tl.sum(v1, 1 - AXIS), 0, CPG, SLOTS)
    if TAIL > 0:
        lane2 = HEAD + tl.arange(0, TAIL)
        valid2 = lane2 < GROUPS * CPG
        at2, mask2 = tile_at(lane2, valid2, 0, C, HW, AXIS, PIXELS)
        v2 = tl.load(x + start + at2, mask=mask2, other=0.0).to(tl.float32)
        m += per_group(tl.sum(v2, 1 - AXIS), HEAD, CPG, SLOTS)
    m /= size
    v1 = _inside(v1 - along_channels(per_lane(m, HEAD, 0, CPG), AXIS), mask1, EVEN)
    error = per_group(tl.sum(v1, 1 - AXIS), 0, CPG, SLOTS)
    squares = per_group(tl.sum(v1 * v1, 1 - AXIS), 0, CPG, SLOTS)
    if TAIL > 0:
        v2 = _inside(v2 - along_channels(per_lane(m, TAIL, HEAD, CPG), AXIS), mask2, EVEN)
        error += per_group(tl.sum(v2, 1 - AXIS), HEAD, CPG, SLOTS)
        squares += per_group(tl.sum(v2 * v2, 1 - AXIS), HEAD, CPG, SLOTS)
    # The squares are those about m; moving the mean by `error` takes error^2 from their average.
    error /= size
    r = tl.rsqrt(defined_variance(squares / size - error * error) + eps)
    tl.store(mean + group, m + error, mask=owned)
    tl.store(rstd + group, r, mask=owned)
    a, c = affine(weight, bias, scale, shift, n, first + lane1, valid1, scale_n, shift_n)
    a *= per_lane(r, HEAD, 0, CPG)
    c -= a * per_lane(error, HEAD, 0, CPG)
    z = v1 * along_channels(a, AXIS) + along_channels(c, AXIS)
    tl.store(y + start + at1, silu(z) if SILU else z, mask=mask1)
    if TAIL > 0:
        a, c = affine(weight, bias, scale, shift, n, first + lane2, valid2, scale_n, shift_n)
        a *= per_lane(r, TAIL, HEAD, CPG)
        c -= a * per_lane(error, TAIL, HEAD, CPG)
        z = v2 * along_channels(a, AXIS) + along_channels(c, AXIS)
        tl.store(y + start + at2, silu(z) if SILU else z, mask=mask2)


@triton.jit
def _moments(
    x, part_mean, part_squares, flag, C, HW, G, steps,
    CPG: tl.constexpr, AXIS: tl.constexpr, GROUPS: tl.constexpr, SUBS: tl.constexpr, SLOTS: tl.constexpr,
    LANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Of a piece of each group, from those of its lanes, which by turns take another tile in."""
    if flag is not None:
        if is_skipped(flag):
            return
    n = tl.program_id(2).to(tl.int64)
    first, lane, valid, group, owned = block_lanes(tl.program_id(1), C, CPG, GROUPS, SUBS, SLOTS, LANES)
    seen = 0
    m = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    x += n * C * HW
    for step in range(tl.program_id(0) * steps, (tl.program_id(0) + 1) * steps):
        block = tl.cast(step, tl.int64)
        start, at, mask = part_tile(first, lane, valid, block, C, HW, AXIS, PIXELS)
        v = tl.load(x + start + at, mask=mask, other=0.0).to(tl.float32)
        count = tl.maximum(tl.minimum(HW - block * PIXELS, PIXELS), 0).to(tl.int32)
        weight = tl.maximum(count, 1).to(tl.float32)
        mean = tl.sum(v, 1 - AXIS) / weight
        v = tl.where(mask, v - along_channels(mean, AXIS), 0.0)
        error = tl.sum(v, 1 - AXIS) / weight
        delta = mean + error - m
        part = count.to(tl.float32) / tl.maximum(seen + count, 1).to(tl.float32)
        squares += tl.sum(v * v, 1 - AXIS) - weight * error * error + delta * delta * part * seen.to(tl.float32)
        m += delta * part
        seen += count
    pixels = seen.to(tl.float32)
    lanes = tl.maximum(per_group(tl.where(valid, 1.0, 0.0), 0, CPG, SLOTS), 1.0)
    mean = per_group(tl.where(valid, m, 0.0), 0, CPG, SLOTS) / lanes
    d = tl.where(valid, m - per_lane(mean, LANES, 0, CPG), 0.0)
    error = per_group(d, 0, CPG, SLOTS) / lanes
    total = per_group(tl.where(valid, squares, 0.0) + pixels * d * d, 0, CPG, SLOTS) - pixels * lanes * error * error
    at = (n * G + group) * (tl.num_programs(0) * SUBS) + tl.program_id(0) * SUBS + tl.program_id(1) % SUBS
    tl.store(part_mean + at, mean + error, mask=owned)
    tl.store(part_squares + at, total, mask=owned)


@triton.jit
def _combined(
    part_mean, part_squares, n, G, group, owned, HW, size, pieces, part_pixels, eps,
    CPG: tl.constexpr, LANES: tl.constexpr, SUBS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(mean, rstd) [SLOTS] of these groups."""
    row = group * pieces
    part_mean += n * G * pieces
    part_squares += n * G * pieces
    m = tl.load(part_mean + row, mask=owned, other=0.0)
    for turn in tl.static_range(2):  # the mean, then the squares about it
        moved = tl.zeros([BLOCK, SLOTS], tl.float32)
        squares = tl.zeros([BLOCK, SLOTS], tl.float32)
        for p0 in range(0, pieces, BLOCK):
            p = p0 + tl.arange(0, BLOCK)
            pixels = tl.minimum(HW - (p // SUBS).to(tl.int64) * part_pixels, part_pixels)
            count = (pixels * tl.minimum(CPG - p % SUBS * LANES, LANES if SUBS > 1 else CPG)).to(tl.float32)[:, None]
            mask = (p < pieces)[:, None] & owned[None, :]
            at = row[None, :] + p[:, None]
            d = tl.where(mask, tl.load(part_mean + at, mask=mask, other=0.0) - m[None, :], 0.0)
            moved += count * d
            if turn == 1:
                squares += tl.load(part_squares + at, mask=mask, other=0.0) + count * d * d
        error = tl.sum(moved, 0) / size
        m += error
    variance = tl.sum(squares, 0) / size - error * error
    return m, tl.rsqrt(defined_variance(variance) + eps)


@triton.jit
def _apply(
    x, weight, bias, scale, shift, y, mean, rstd, flag, part_mean, part_squares, C, HW, G, steps, size,
    moments_hw, pieces, part_pixels, scale_n, shift_n, eps,
    CPG: tl.constexpr, SILU: tl.constexpr, AXIS: tl.constexpr, GROUPS: tl.constexpr, SUBS: tl.constexpr,
    SLOTS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr,
    PIECE_CPG: tl.constexpr, PIECE_LANES: tl.constexpr, PIECE_SUBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `_moments` read last is applied first, while a cache has it."""
    n = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first, lane, valid, group, owned = block_lanes(block, C, CPG, GROUPS, SUBS, SLOTS, LANES)
    stored = owned & (part == 0) & (block % SUBS == 0)
    mean += n * G
    rstd += n * G
    if flag is not None:
        if is_skipped(flag):
            tl.store(mean + group, tl.zeros([SLOTS], tl.float32), mask=stored)
            tl.store(rstd + group, tl.zeros([SLOTS], tl.float32), mask=stored)
            return
    m, r = _combined(
        part_mean, part_squares, n, G, group, owned, moments_hw, size, pieces, part_pixels, eps,
        PIECE_CPG, PIECE_LANES, PIECE_SUBS, SLOTS, BLOCK,
    )  # fmt: skip
    tl.store(mean + group, m, mask=stored)
    tl.store(rstd + group, r, mask=stored)
    a, c = affine(weight, bias, scale, shift, n, first + lane, valid, scale_n, shift_n)
    a = along_channels(a * per_lane(r, LANES, 0, CPG), AXIS)
    c = along_channels(c, AXIS)
    m = along_channels(per_lane(m, LANES, 0, CPG), AXIS)
    x += n * C * HW
    y += n * C * HW
    for step in range(part * steps, (part + 1) * steps):
        start, at, mask = part_tile(first, lane, valid, tl.cast(step, tl.int64), C, HW, AXIS, PIXELS)
        z = (tl.load(x + start + at, mask=mask, other=0.0).to(tl.float32) - m) * a + c
        tl.store(y + start + at, silu(z) if SILU else z, mask=mask)


def pieces_at_once(pieces: int, slots: int) -> int:
    return min(power_of_2(pieces), PIECES, max(1, PIECE_NUMBERS // slots))


def sample_stride(v: Tensor | None) -> int:
    return 0 if v is None else v.stride(0)


def norm_operands(
    x: Tensor,
    num_groups: int,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    flag: Tensor | None,
) -> dict[str, Any]:
    """What the kernels that read x have in common, forward and backward."""
    C = x.shape[1]
    return {
        **{"mean": mean, "rstd": rstd, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "flag": flag},
        **{"x": x, "C": C, "HW": math.prod(x.shape[2:]), "G": num_groups, "CPG": C // num_groups, "SILU": silu},
        **{"scale_n": sample_stride(scale), "shift_n": sample_stride(shift)},
    }


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    apply_silu: bool,
    last: bool,
    flag: Tensor | None = None,
    *,
    split: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of x dense in its layout (`last`: channels-last); scale, shift [N, C] with dense rows.
    split: None chooses by size, False holds every group that fits."""
    N, pixels, channels = x.shape[0], math.prod(x.shape[2:]), x.shape[1] // num_groups
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(N, num_groups, dtype=torch.float32) for _ in range(2))
    operands = norm_operands(x, num_groups, mean, rstd, weight, bias, scale, shift, apply_silu, flag)
    operands |= {"y": y, "size": channels * pixels, "eps": eps}
    sizes = pixels, num_groups, last, x.element_size()
    on_chip = None if split else held(N, channels, *sizes, HELD, ALONE if split is None else 1 << 31)
    if on_chip is not None:
        launch(_one_read, (N, num_groups // on_chip.GROUPS), **operands, **on_chip._asdict())
        return y, mean, rstd
    tiles = split_tiles(N, channels, *sizes, PROGRAMS)
    # Where a group is contiguous, its moments are those of one long channel.
    whole = tiles if last else split_tiles(N, 1, channels * pixels, *sizes[1:], PROGRAMS)
    part_mean, part_squares = (x.new_empty(N, num_groups, whole.pieces, dtype=torch.float32) for _ in range(2))
    parts = {"part_mean": part_mean, "part_squares": part_squares}
    C, HW, CPG = (x.shape[1], pixels, channels) if last else (num_groups, channels * pixels, 1)
    grid = whole.parts, whole.blocks, N
    launch(_moments, grid, **parts, **whole.options, x=x, flag=flag, C=C, HW=HW, G=num_groups, CPG=CPG)
    launch(
        _apply,
        (tiles.parts, tiles.blocks, N),
        **operands,
        **parts,
        **tiles.options,
        moments_hw=HW,
        pieces=whole.pieces,
        part_pixels=whole.steps * whole.PIXELS,
        PIECE_CPG=CPG,
        PIECE_LANES=whole.LANES,
        PIECE_SUBS=whole.SUBS,
        BLOCK=pieces_at_once(whole.pieces, tiles.SLOTS),
    )
    return y, mean, rstd


def _compile(C: int, side: int, dtype: torch.dtype, last: bool, split: bool) -> None:
    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x = new(8, C, side, side).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    film = new(8, 2 * C)[:, :C]
    flag = torch.empty(1, dtype=torch.int32, device="meta")
    forward(x, 32, new(C), new(C), 1e-5, film, film, True, last, flag, split=split)
    forward(x, 32, new(C), new(C), 1e-5, None, None, True, last, split=split)


# U-Net stages: channels x side of the image; the last one is too large for one read in either layout.
SHAPES = ((320, 64), (640, 32), (1280, 16), (1280, 8), (192, 64), (960, 64))


def compile_cases(op: str, compile_one):
    half = torch.bfloat16
    cases = [(C, side, half, last, False) for C, side in SHAPES for last in (False, True)]
    cases += [(320, 64, dtype, last, False) for dtype in (torch.float32, torch.float16) for last in (False, True)]
    cases += [(640, 32, dtype, last, True) for dtype in (half, torch.float32) for last in (False, True)]
    names = [
        f"{op}-{C}x{side}-{long_name(dtype)}-{'nhwc' if last else 'nchw'}{'-split' if split else ''}"
        for C, side, dtype, last, split in cases
    ]
    return {name: partial(compile_one, *case) for name, case in zip(names, cases, strict=True)}


COMPILE_CASES = compile_cases("group_norm_silu", _compile)
