"""y = silu(group_norm(x) * (1 + scale) + shift), forward; x [N, C, *S] contiguous or channels-last (tiles: _images.py).

One read (`_one_read`): grid (N, groups / GROUPS); a program holds all tiles of its groups in registers: the mean, the
centred squares and the mean of what is left, which corrects both, then the result. 2ns.
Split (`_moments`, `_combine`, `_apply`): grids (pixel parts, channel blocks, N): mean and centred squares of each
channel over a part of the pixels, [N, parts, C]; combined per group in a fixed order (Chan et al. 1983); x is read
again. 3ns.
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
from ._images import affine, along_channels, by_group, flat, group_lanes, over_group, tile_at
from ._launch import launch

# (most elements of a program, elements of a tile, num_warps); at most TILES tiles are unrolled. Channels-last tiles
# have narrow accesses, whose addresses take the registers that larger groups would need.
_SMALL = ((2048, 2048, 4), (8192, 2048, 4), (16384, 4096, 8))
ONE_READ = {2: (*_SMALL, (40960, 4096, 16)), 4: (*_SMALL, (32768, 4096, 16))}
ONE_READ_LAST = _SMALL
TILES = 16
COMBINE = 64


@triton.jit
def _one_read(
    x, weight, bias, scale, shift, y, mean, rstd, flag, C, HW, G, size, scale_n, shift_n, eps, CPG: tl.constexpr,
    AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr, PIXEL_BLOCKS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * GROUPS
    if flag is not None:
        if is_skipped(flag):
            group = n * G + first_group + tl.arange(0, GROUPS)
            tl.store(mean + group, tl.zeros([GROUPS], tl.float32))
            tl.store(rstd + group, tl.zeros([GROUPS], tl.float32))
            return
    first_channel = first_group * CPG
    start = n * C * HW + first_channel.to(tl.int64) * (HW if AXIS == 0 else 1)
    x += start
    y += start
    LANES: tl.constexpr = ROWS if AXIS == 0 else COLS
    total = tl.zeros([LANES], tl.float32)
    tiles = ()
    for i in tl.static_range(CHANNEL_BLOCKS):
        channel, group, valid = group_lanes(i, CPG, AXIS, ROWS, COLS, GROUPS)
        for j in tl.static_range(PIXEL_BLOCKS):
            at, mask = tile_at(channel, valid, j, C, HW, AXIS, ROWS, COLS)
            v = tl.load(x + at, mask=mask, other=0.0)
            total += tl.sum(v.to(tl.float32), 1 - AXIS)
            tiles = tiles + (v,)
    m = over_group(total, GROUPS) / size
    total = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    for i in tl.static_range(CHANNEL_BLOCKS):
        channel, group, valid = group_lanes(i, CPG, AXIS, ROWS, COLS, GROUPS)
        for j in tl.static_range(PIXEL_BLOCKS):
            at, mask = tile_at(channel, valid, j, C, HW, AXIS, ROWS, COLS)
            v = tl.where(mask, tiles[i * PIXEL_BLOCKS + j].to(tl.float32) - along_channels(m, AXIS), 0.0)
            total += tl.sum(v, 1 - AXIS)
            squares += tl.sum(v * v, 1 - AXIS)
    # The squares are those about m; moving the mean by `left` takes left^2 from their average.
    left = over_group(total, GROUPS) / size
    m += left
    r = tl.rsqrt(tl.maximum(over_group(squares, GROUPS) / size - left * left, 0.0) + eps)
    for i in tl.static_range(CHANNEL_BLOCKS):
        channel, group, valid = group_lanes(i, CPG, AXIS, ROWS, COLS, GROUPS)
        a, c = affine(weight, bias, scale, shift, n, first_channel + channel, valid, scale_n, shift_n)
        a *= r
        for j in tl.static_range(PIXEL_BLOCKS):
            at, mask = tile_at(channel, valid, j, C, HW, AXIS, ROWS, COLS)
            z = tiles[i * PIXEL_BLOCKS + j].to(tl.float32) - along_channels(m, AXIS)
            z = z * along_channels(a, AXIS) + along_channels(c, AXIS)
            tl.store(y + at, silu(z) if SILU else z, mask=mask)
    channel, group, valid = group_lanes(0, CPG, AXIS, ROWS, COLS, GROUPS)
    first = channel == group * CPG
    tl.store(mean + n * G + first_group + group, m, mask=first)
    tl.store(rstd + n * G + first_group + group, r, mask=first)


@triton.jit
def _moments(
    x, part_mean, part_squares, flag, C, HW, steps,
    AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    if flag is not None:
        if is_skipped(flag):
            return
    n = tl.program_id(2).to(tl.int64)
    LANES: tl.constexpr = ROWS if AXIS == 0 else COLS
    PIXELS: tl.constexpr = COLS if AXIS == 0 else ROWS
    channel = tl.program_id(1).to(tl.int64) * LANES + tl.arange(0, LANES)
    seen = 0
    m = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    for step in range(steps):
        block = tl.program_id(0).to(tl.int64) * steps + step
        at, mask = tile_at(channel, channel < C, block, C, HW, AXIS, ROWS, COLS)
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
    tl.store(part_mean + at, m, mask=channel < C)
    tl.store(part_squares + at, squares, mask=channel < C)


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
    CPG: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    if flag is not None:
        if is_skipped(flag):
            return
    n = tl.program_id(2).to(tl.int64)
    LANES: tl.constexpr = ROWS if AXIS == 0 else COLS
    channel = tl.program_id(1).to(tl.int64) * LANES + tl.arange(0, LANES)
    valid = channel < C
    at, mask = tile_at(channel, valid, tl.program_id(0).to(tl.int64), C, HW, AXIS, ROWS, COLS)
    at += n * C * HW
    z = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    a, c = affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n)
    a *= tl.load(rstd + n * G + channel // CPG, mask=valid, other=0.0)
    m = tl.load(mean + n * G + channel // CPG, mask=valid, other=0.0)
    z = (z - along_channels(m, AXIS)) * along_channels(a, AXIS) + along_channels(c, AXIS)
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
        "x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "y": y, "mean": mean, "rstd": rstd,
        "flag": flag, "C": C, "HW": pixels, "G": num_groups, "CPG": channels, "SILU": apply_silu,
        "scale_n": sample_stride(scale), "shift_n": sample_stride(shift),
    }  # fmt: skip
    table = ONE_READ_LAST if last else ONE_READ[x.element_size()]
    held = None if split else by_group(channels, pixels, num_groups, last, table, TILES)
    if held is not None:
        launch(_one_read, (N, num_groups // held.GROUPS), **vars(held), **operands, size=channels * pixels, eps=eps)
        return y, mean, rstd
    cut = flat(N, C, pixels, last)
    shape = {"AXIS": cut.AXIS, "ROWS": cut.ROWS, "COLS": cut.COLS, "num_warps": cut.num_warps}
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
    launch(_apply, (cut.pixel_blocks, cut.channel_blocks, N), **operands, **shape)
    return y, mean, rstd


def _compile(C: int, side: int, dtype: torch.dtype, last: bool, split: bool) -> None:
    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x = new(2, C, side, side).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    film = new(2, 2 * C)[:, :C]
    flag = torch.empty(1, dtype=torch.int32, device="meta")
    forward(x, 32, new(C), new(C), 1e-5, film, film, True, last, flag, split=split)
    forward(x, 32, new(C), new(C), 1e-5, None, None, True, last, split=split)


# U-Net stages: channels x side of the image.
SHAPES = ((320, 64), (640, 32), (1280, 16), (1280, 8), (192, 64), (384, 32), (576, 16), (128, 128), (960, 64))


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
