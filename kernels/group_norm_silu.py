"""group_norm_silu: y = silu(group_norm(x) * (1 + scale) + shift), x [N, C, *S] contiguous or channels-last.

math    fp32: the mean, then the centred squares together with the mean of the centred values, a rounding error by which
        both are corrected. mean and rstd [N, G] are saved for backward. Tiles: _group_tiles.py.
grid    one read, for groups of up to 40960 values: `_one_read`, (N, groups / GROUPS); a program keeps its groups in
        registers. 2ns bytes.
        split, for larger groups: `_moments`, (pixel parts, channel blocks, N), mean and centred squares of each channel
        over a part of the pixels, [N, parts, C]; `_combine`, (G, N), mean and rstd; `_apply`, (pixel blocks, channel
        blocks, N), reads x again. 3ns bytes.
order   tiles of a group first to last; parts of a group by Chan et al. 1983, first to last. No atomics.
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

from ._dtypes import float_of, long_name
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
from ._rows import defined_variance, is_skipped, power_of_2, silu

# (most words of a program, num_warps) by values in a word. Twice as many words of two values still fit, but take the
# compiler a minute (compile time and registers: python -m tests.triton.static).
ONE_READ = {1: ((2048, 4), (40960, 8)), 2: ((2048, 4), (20480, 8))}
# Parts that `_combine` takes at a time, and elements of them (registers: python -m tests.triton.static).
COMBINE_PARTS, COMBINE_ELEMENTS = 64, 2048


@triton.jit
def _one_read(
    x, weight, bias, scale, shift, y, mean, rstd, flag, HW, G, size, scale_n, shift_n, eps, zero,
    C: tl.constexpr, CPG: tl.constexpr, DTYPE: tl.constexpr, SILU: tl.constexpr, AXIS: tl.constexpr,
    PER_WORD: tl.constexpr, GROUPS: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr, PIXELS: tl.constexpr,
    COUNTS: tl.constexpr, FIRST: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """x and y in words, HW of them along the pixels; the first pass loads, two more work on what is kept, each with
    offsets and masks of its own (`again`)."""
    n = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * GROUPS
    groups = n * G + first_group + tl.arange(0, GROUPS)
    if flag is not None:
        if is_skipped(flag):
            tl.store(mean + groups, tl.zeros([GROUPS], tl.float32))
            tl.store(rstd + groups, tl.zeros([GROUPS], tl.float32))
            return
    CPW: tl.constexpr = PER_WORD if AXIS == 1 else 1  # channels of a word
    first_channel = first_group * CPG
    start = n * (C // CPW) * HW + first_group.to(tl.int64) * (CPG // CPW) * (HW if AXIS == 0 else 1)
    x += start
    y += start
    loaded = ()
    m = tl.zeros([GROUPS], tl.float32)
    for i in tl.static_range(BLOCKS):
        lane, valid = group_lanes(item(STARTS, i), item(WIDTHS, i), CPG // CPW, GROUPS)
        total = 0.0
        for j in tl.static_range(item(COUNTS, i)):
            at, mask = tile_at(lane, valid, j, C // CPW, HW, AXIS, item(PIXELS, i))
            words = tl.load(x + at, mask=mask, other=0)
            loaded = loaded + (words,)
            for h in tl.static_range(PER_WORD):
                total += unpack(words, h, PER_WORD, DTYPE)
        m += per_group(tl.sum(total, 1 - AXIS), GROUPS)
    m /= size
    error = tl.zeros([GROUPS], tl.float32)
    squares = tl.zeros([GROUPS], tl.float32)
    kept = ()
    for i in tl.static_range(BLOCKS):
        lane, valid = group_lanes(item(STARTS, i), item(WIDTHS, i), CPG // CPW, GROUPS)
        total = 0.0
        square = 0.0
        for j in tl.static_range(item(COUNTS, i)):
            at, mask = tile_at(lane, valid, j + zero, C // CPW, HW + zero, AXIS, item(PIXELS, i))
            words = opaque(loaded[item(FIRST, i) + j], zero)
            kept = kept + (words,)
            for h in tl.static_range(PER_WORD):
                v = tl.where(mask, unpack(words, h, PER_WORD, DTYPE) - per_lane(m, item(WIDTHS, i), AXIS), 0.0)
                total += v
                square += v * v
        error += per_group(tl.sum(total, 1 - AXIS), GROUPS)
        squares += per_group(tl.sum(square, 1 - AXIS), GROUPS)
    # The squares are those about m; moving the mean by `error` takes error^2 from their average.
    error /= size
    m += error
    r = tl.rsqrt(defined_variance(squares / size - error * error) + eps)
    for i in tl.static_range(BLOCKS):
        lane, valid = group_lanes(item(STARTS, i), item(WIDTHS, i), CPG // CPW, GROUPS)
        all_a, all_c = affines(weight, bias, scale, shift, n, first_channel, lane, valid, scale_n, shift_n, CPW)
        for j in tl.static_range(item(COUNTS, i)):
            at, mask = tile_at(lane, valid, j + zero + zero, C // CPW, HW + zero + zero, AXIS, item(PIXELS, i))
            words = opaque(kept[item(FIRST, i) + j], zero)
            out = tl.zeros_like(words)
            for h in tl.static_range(PER_WORD):
                z = unpack(words, h, PER_WORD, DTYPE) - per_lane(m, item(WIDTHS, i), AXIS)
                z *= per_lane(r, item(WIDTHS, i), AXIS)
                z = z * along_channels(all_a[h % CPW], AXIS) + along_channels(all_c[h % CPW], AXIS)
                out |= pack(silu(z) if SILU else z, h, PER_WORD, DTYPE)
            tl.store(y + at, out, mask=mask)
    tl.store(mean + groups, m)
    tl.store(rstd + groups, r)


@triton.jit
def _moments(
    x,
    part_mean,
    part_squares,
    flag,
    C,
    HW,
    steps,
    AXIS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
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
        error = tl.sum(v, 1 - AXIS) / weight
        delta = mean + error - m
        part = count.to(tl.float32) / tl.maximum(seen + count, 1).to(tl.float32)
        squares += tl.sum(v * v, 1 - AXIS) - weight * error * error + delta * delta * part * seen.to(tl.float32)
        m += delta * part
        seen += count.to(tl.int32)
    at = (n * tl.num_programs(0) + tl.program_id(0)) * C + channel
    tl.store(part_mean + at, m, mask=valid)
    tl.store(part_squares + at, squares, mask=valid)


@triton.jit
def _combine(
    part_mean,
    part_squares,
    mean,
    rstd,
    flag,
    C,
    HW,
    G,
    size,
    parts,
    part_pixels,
    eps,
    CPG: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """mean and rstd of one group."""
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
    tl.store(rstd + n * G + tl.program_id(0), tl.rsqrt(defined_variance(var) + eps))


@triton.jit
def _apply(
    x,
    weight,
    bias,
    scale,
    shift,
    y,
    mean,
    rstd,
    flag,
    C,
    HW,
    G,
    scale_n,
    shift_n,
    CPG: tl.constexpr,
    AXIS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    SILU: tl.constexpr,
):
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


def combine_parts(width: int) -> int:
    """Parts that `_combine` takes at a time, of groups padded to `width` channels."""
    return max(1, min(COMBINE_PARTS, COMBINE_ELEMENTS // width))


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
    return {
        **{"mean": mean, "rstd": rstd, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "flag": flag},
        **{"C": x.shape[1], "G": num_groups, "CPG": x.shape[1] // num_groups, "SILU": silu},
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
    split: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of x dense in its layout (`last`: channels-last); scale, shift [N, C] with dense rows."""
    N, C = x.shape[:2]
    pixels, channels = math.prod(x.shape[2:]), C // num_groups
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(N, num_groups, dtype=torch.float32) for _ in range(2))
    operands = norm_operands(x, num_groups, mean, rstd, weight, bias, scale, shift, apply_silu, flag)
    per_word = values_per_word(channels, pixels, last, x, y)
    on_chip = None if split else by_group(channels, pixels, num_groups, last, per_word, ONE_READ[per_word])
    if on_chip is not None:
        launch(
            _one_read,
            (N, num_groups // on_chip.GROUPS),
            **vars(on_chip),
            **operands,
            x=as_words(x, per_word),
            y=as_words(y, per_word),
            HW=pixels if last else pixels // per_word,
            size=channels * pixels,
            eps=eps,
            zero=0,
            DTYPE=float_of(x.dtype),
        )
        return y, mean, rstd
    tiles = flat(N, C, pixels, last)
    part_mean, part_squares = (x.new_empty(N, tiles.parts, C, dtype=torch.float32) for _ in range(2))
    launch(
        _moments,
        (tiles.parts, tiles.channel_blocks, N),
        x=x,
        part_mean=part_mean,
        part_squares=part_squares,
        flag=flag,
        C=C,
        HW=pixels,
        steps=tiles.steps,
        **tiles.options,
    )
    width = power_of_2(channels)
    launch(
        _combine,
        (num_groups, N),
        part_mean=part_mean,
        part_squares=part_squares,
        mean=mean,
        rstd=rstd,
        flag=flag,
        C=C,
        HW=pixels,
        G=num_groups,
        size=channels * pixels,
        parts=tiles.parts,
        part_pixels=tiles.PIXELS * tiles.steps,
        eps=eps,
        CPG=channels,
        WIDTH=width,
        BLOCK=combine_parts(width),
    )
    launch(_apply, (tiles.pixel_blocks, tiles.channel_blocks, N), **operands, **tiles.options, x=x, y=y, HW=pixels)
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
        f"{op}-{C}x{side}-{long_name(dtype)}-{'nhwc' if last else 'nchw'}{'-split' if split else ''}"
        f"{'-unaligned' if last and not split and C // 32 % 8 else ''}"
        for C, side, dtype, last, split in cases
    ]
    return {name: partial(compile_one, *case) for name, case in zip(names, cases, strict=True)}


COMPILE_CASES = compile_cases("group_norm_silu", _compile)
