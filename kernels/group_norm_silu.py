"""y = silu(group_norm(x) * (1 + scale) + shift), forward; x [N, C, *S] contiguous or channels-last (_images.py).

One read (`_one_read`): grid (N, groups / GROUPS); a program holds its groups in registers: the mean, the centred
squares and the mean of what is left, which corrects both, then the result. 2ns.
Split (`_moments`, `_combine`, `_apply`): grids (pixel parts, channel blocks, N): mean and centred squares of each
channel over a part of the pixels, [N, parts, C]; combined per group in a fixed order (Chan et al. 1983); x is read
again. 3ns. For groups of more than 40960 numbers.
Zero path: a program whose branch is zero (`flag`) leaves at once; mean and rstd are then 0, y is undefined.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import is_skipped, power_of_2, silu
from ._images import (
    NUMBERS,
    affine,
    affines,
    again,
    along_channels,
    by_group,
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

# (most words of a program, num_warps) by numbers of a word. Twice as many words of two numbers still fit, but take the
# compiler a minute.
ONE_READ = {1: ((2048, 4), (40960, 8)), 2: ((2048, 4), (20480, 8))}
COMBINE = 64


@triton.jit
def _one_read(
    x, weight, bias, scale, shift, y, mean, rstd, flag, HW, G, size, scale_n, shift_n, eps, zero, C: tl.constexpr,
    CPG: tl.constexpr, T: tl.constexpr, SILU: tl.constexpr, AXIS: tl.constexpr, HALVES: tl.constexpr,
    GROUPS: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PIXELS: tl.constexpr, COUNTS: tl.constexpr,
    FIRST: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """x and y in words, HW of them along the pixels; the first pass loads, two more work on what is held, each with
    offsets and masks of its own (`again`)."""
    n = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * GROUPS
    groups = n * G + first_group + tl.arange(0, GROUPS)
    if flag is not None:
        if is_skipped(flag):
            tl.store(mean + groups, tl.zeros([GROUPS], tl.float32))
            tl.store(rstd + groups, tl.zeros([GROUPS], tl.float32))
            return
    STEP: tl.constexpr = HALVES if AXIS == 1 else 1  # channels of a word
    first_channel = first_group * CPG
    start = n * (C // STEP) * HW + first_group.to(tl.int64) * (CPG // STEP) * (HW if AXIS == 0 else 1)
    x += start
    y += start
    tiles = ()
    m = tl.zeros([GROUPS], tl.float32)
    for i in tl.static_range(BLOCKS):
        lane, valid = group_lanes(STARTS[i], WIDTHS[i], CPG // STEP, GROUPS)
        total = 0.0
        for j in tl.static_range(item(COUNTS, i)):
            at, mask = tile_at(lane, valid, j, C // STEP, HW, AXIS, PIXELS[i])
            words = tl.load(x + at, mask=mask, other=0)
            tiles = tiles + (words,)
            for h in tl.static_range(HALVES):
                total += number(words, h, HALVES, T)
        m += per_group(tl.sum(total, 1 - AXIS), GROUPS)
    m /= size
    left = tl.zeros([GROUPS], tl.float32)
    squares = tl.zeros([GROUPS], tl.float32)
    held = ()
    for i in tl.static_range(BLOCKS):
        lane, valid = group_lanes(STARTS[i], WIDTHS[i], CPG // STEP, GROUPS)
        total = 0.0
        square = 0.0
        for j in tl.static_range(item(COUNTS, i)):
            at, mask = tile_at(lane, valid, j + zero, C // STEP, HW + zero, AXIS, PIXELS[i])
            words = again(tiles[item(FIRST, i) + j], zero)
            held = held + (words,)
            for h in tl.static_range(HALVES):
                v = tl.where(mask, number(words, h, HALVES, T) - per_lane(m, WIDTHS[i], AXIS), 0.0)
                total += v
                square += v * v
        left += per_group(tl.sum(total, 1 - AXIS), GROUPS)
        squares += per_group(tl.sum(square, 1 - AXIS), GROUPS)
    # The squares are those about m; moving the mean by `left` takes left^2 from their average.
    left /= size
    m += left
    r = tl.rsqrt(tl.maximum(squares / size - left * left, 0.0) + eps)
    for i in tl.static_range(BLOCKS):
        lane, valid = group_lanes(STARTS[i], WIDTHS[i], CPG // STEP, GROUPS)
        gains, offsets = affines(weight, bias, scale, shift, n, first_channel, lane, valid, scale_n, shift_n, STEP)
        for j in tl.static_range(item(COUNTS, i)):
            at, mask = tile_at(lane, valid, j + zero + zero, C // STEP, HW + zero + zero, AXIS, PIXELS[i])
            words = again(held[item(FIRST, i) + j], zero)
            out = tl.zeros_like(words)
            for h in tl.static_range(HALVES):
                z = (number(words, h, HALVES, T) - per_lane(m, WIDTHS[i], AXIS)) * per_lane(r, WIDTHS[i], AXIS)
                z = z * along_channels(gains[h % STEP], AXIS) + along_channels(offsets[h % STEP], AXIS)
                out |= word(silu(z) if SILU else z, h, HALVES, T)
            tl.store(y + at, out, mask=mask)
    tl.store(mean + groups, m)
    tl.store(rstd + groups, r)


@triton.jit
def _moments(
    x, part_mean, part_squares, flag, C, HW, steps,
    AXIS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    if flag is not None:
        if is_skipped(flag):
            return
    n = tl.program_id(2).to(tl.int64)
    channel, valid = flat_lanes(C, LANES)
    seen = 0
    m = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    for step in range(steps):
        block = tl.program_id(0).to(tl.int64) * steps + step
        at, mask = tile_at(channel, valid, block, C, HW, AXIS, PIXELS)
        v = tl.load(x + n * C * HW + at, mask=mask, other=0.0).to(tl.float32)
        count = tl.maximum(tl.minimum(HW - block * PIXELS, PIXELS), 0)
        weight = tl.maximum(count, 1).to(tl.float32)
        mean = tl.sum(v, 1 - AXIS) / weight
        v = tl.where(mask, v - along_channels(mean, AXIS), 0.0)
        left = tl.sum(v, 1 - AXIS) / weight
        d = mean + left - m
        part = count.to(tl.float32) / tl.maximum(seen + count, 1).to(tl.float32)
        squares += tl.sum(v * v, 1 - AXIS) - weight * left * left + d * d * part * seen.to(tl.float32)
        m += d * part
        seen += count.to(tl.int32)
    at = (n * tl.num_programs(0) + tl.program_id(0)) * C + channel
    tl.store(part_mean + at, m, mask=valid)
    tl.store(part_squares + at, squares, mask=valid)


@triton.jit
def _combine(
    part_mean, part_squares, mean, rstd, flag, C, HW, G, size, parts, part_pixels, eps,
    CPG: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean and rstd of one group; grid (G, N)."""
    n = tl.program_id(1).to(tl.int64)
    if flag is not None:
        if is_skipped(flag):
            tl.store(mean + n * G + tl.program_id(0), 0.0)
            tl.store(rstd + n * G + tl.program_id(0), 0.0)
            return
    lane = tl.arange(0, WIDTH)
    channel = tl.program_id(0) * CPG + lane
    base = tl.load(part_mean + n * parts * C + tl.program_id(0) * CPG)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    squares = tl.zeros([BLOCK, WIDTH], tl.float32)
    for p0 in range(0, parts, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        mask = (p < parts)[:, None] & (lane < CPG)[None, :]
        at = (n * parts + p)[:, None] * C + channel[None, :]
        count = tl.minimum(HW - p * part_pixels, part_pixels).to(tl.float32)[:, None]
        d = tl.where(mask, tl.load(part_mean + at, mask=mask, other=0.0) - base, 0.0)
        total += count * d
        squares += tl.load(part_squares + at, mask=mask, other=0.0) + count * d * d
    m = tl.sum(tl.sum(total, 0), 0) / size
    var = tl.sum(tl.sum(squares, 0), 0) / size - m * m
    tl.store(mean + n * G + tl.program_id(0), base + m)
    tl.store(rstd + n * G + tl.program_id(0), tl.rsqrt(tl.maximum(var, 0.0) + eps))


@triton.jit
def _apply(
    x, weight, bias, scale, shift, y, mean, rstd, flag, C, HW, G, scale_n, shift_n,
    CPG: tl.constexpr, AXIS: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    if flag is not None:
        if is_skipped(flag):
            return
    n = tl.program_id(2).to(tl.int64)
    channel, valid = flat_lanes(C, LANES)
    at, mask = tile_at(channel, valid, tl.program_id(0).to(tl.int64), C, HW, AXIS, PIXELS)
    at += n * C * HW
    z = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    a, c = affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n)
    z = (z - group_row(mean, n, G, channel, valid, CPG, AXIS)) * group_row(rstd, n, G, channel, valid, CPG, AXIS)
    z = z * along_channels(a, AXIS) + along_channels(c, AXIS)
    tl.store(y + at, silu(z) if SILU else z, mask=mask)


def sample_stride(v: Tensor | None) -> int:
    return 0 if v is None else v.stride(0)


def forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None,
    shift: Tensor | None, apply_silu: bool, last: bool, flag: Tensor | None = None, *, split: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean, rstd) of x dense in its layout (`last`: channels-last); scale, shift [N, C] with dense rows."""
    N, C = x.shape[:2]
    pixels, channels = math.prod(x.shape[2:]), C // num_groups
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(N, num_groups, dtype=torch.float32) for _ in range(2))
    operands = {
        "weight": weight, "bias": bias, "scale": scale, "shift": shift, "mean": mean, "rstd": rstd, "flag": flag,
        "G": num_groups, "CPG": channels, "SILU": apply_silu, "C": C, "scale_n": sample_stride(scale),
        "shift_n": sample_stride(shift),
    }  # fmt: skip
    halves = halves_of(channels, pixels, last, x, y)
    held = None if split else by_group(channels, pixels, num_groups, last, halves, ONE_READ[halves])
    if held is not None:
        launch(
            _one_read, (N, num_groups // held.GROUPS), **vars(held), **operands, x=words_of(x, halves),
            y=words_of(y, halves), HW=pixels if last else pixels // halves, size=channels * pixels, eps=eps, zero=0,
            T=NUMBERS[x.dtype],
        )  # fmt: skip
        return y, mean, rstd
    cut = flat(N, C, pixels, last)
    shape = {"AXIS": cut.AXIS, "LANES": cut.LANES, "PIXELS": cut.PIXELS, "num_warps": cut.num_warps}
    part_mean, part_squares = (x.new_empty(N, cut.parts, C, dtype=torch.float32) for _ in range(2))
    launch(
        _moments, (cut.parts, cut.channel_blocks, N), x=x, part_mean=part_mean, part_squares=part_squares, flag=flag,
        C=C, HW=pixels, steps=cut.steps, **shape,
    )  # fmt: skip
    width = power_of_2(channels)
    launch(
        _combine, (num_groups, N), part_mean=part_mean, part_squares=part_squares, mean=mean, rstd=rstd, flag=flag,
        C=C, HW=pixels, G=num_groups, size=channels * pixels, parts=cut.parts, part_pixels=cut.PIXELS * cut.steps,
        eps=eps, CPG=channels, WIDTH=width, BLOCK=max(1, min(COMBINE, 2048 // width)),
    )  # fmt: skip
    launch(_apply, (cut.pixel_blocks, cut.channel_blocks, N), **operands, **shape, x=x, y=y, HW=pixels)
    return y, mean, rstd


def _compile(C: int, side: int, dtype: torch.dtype, last: bool, split: bool) -> None:
    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x = new(2, C, side, side).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    film = new(2, 2 * C)[:, :C]
    flag = torch.empty(1, dtype=torch.int32, device="meta")
    forward(x, 32, new(C), new(C), 1e-5, film, film, True, last, flag, split=split)
    forward(x, 32, new(C), new(C), 1e-5, None, None, True, last, split=split)


# U-Net stages: channels x side of the image; the last one is too large for one read.
SHAPES = ((320, 64), (640, 32), (1280, 16), (1280, 8), (192, 64), (960, 64))


def compile_cases(op: str, compile_one):
    """One read where a group fits; channels-last groups of C / 32 channels seldom allow 16-byte accesses there."""
    half = torch.bfloat16
    cases = [(C, side, half, last, False) for C, side in SHAPES for last in (False, True)]
    cases += [(320, 64, dtype, last, False) for dtype in (torch.float32, torch.float16) for last in (False, True)]
    cases += [(640, 32, dtype, last, True) for dtype in (half, torch.float32) for last in (False, True)]
    names = [
        f"{op}-{C}x{side}-{str(dtype)[6:]}-{'nhwc' if last else 'nchw'}{'-split' * split}"
        f"{'-unaligned' * (last and not split and C // 32 % 8 > 0)}"
        for C, side, dtype, last, split in cases
    ]
    return {name: partial(compile_one, *case) for name, case in zip(names, cases, strict=True)}


COMPILE_CASES = compile_cases("group_norm_silu", _compile)
