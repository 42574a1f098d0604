"""How the group norm kernels cut x [N, C, *S] into tiles.

A tile is [ROWS, COLS], contiguous along its columns: rows are channels and columns pixels (contiguous x, AXIS 0), or
rows are pixels and columns channels (channels-last, AXIS 1). AXIS is the tile's dimension of channels; per-channel
vectors have one element per lane along it.

  * by group: a program owns whole groups: all channels of GROUPS of them, each padded to a power of 2;
  * flat: a program owns ROWS or COLS consecutive channels, whatever their groups, and some pixel blocks of them.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl

from ._common import cdiv, power_of_2


@dataclasses.dataclass(frozen=True)
class ByGroup:
    """All tiles of a program that owns whole groups."""

    AXIS: int
    ROWS: int
    COLS: int
    GROUPS: int
    CHANNEL_BLOCKS: int
    PIXEL_BLOCKS: int
    num_warps: int


# Elements up to which a program takes more than one group.
SMALL = 2048


def by_group(channels: int, pixels: int, groups: int, last: bool, table: tuple, most_tiles: int) -> ByGroup | None:
    """The first entry (elements of a program, elements of a tile, num_warps) of the table that holds a group of
    `channels` x `pixels`; None when none does."""
    width = power_of_2(channels)
    for most, tile, warps in table:
        # Groups side by side make a small program worth its start, and fill the sectors of channels-last rows.
        side, area = 1, width * power_of_2(pixels)
        while groups % (2 * side) == 0 and (
            2 * side * area <= SMALL or (last and width * side < 64 and 2 * side * area <= tile)
        ):
            side *= 2
        lanes = width * side
        if last:
            rows = min(power_of_2(pixels), max(1, tile // lanes))
            found = ByGroup(1, rows, lanes, side, 1, cdiv(pixels, rows), warps)
        else:
            columns = min(power_of_2(pixels), tile)
            rows = lanes if side > 1 else min(width, tile // columns)
            found = ByGroup(0, rows, columns, side, cdiv(channels * side, rows), cdiv(pixels, columns), warps)
        tiles = found.CHANNEL_BLOCKS * found.PIXEL_BLOCKS
        if tiles * found.ROWS * found.COLS <= most and tiles <= most_tiles:
            return found
    return None


@dataclasses.dataclass(frozen=True)
class Flat:
    """Tiles of programs that own consecutive channels; one program sums up `steps` pixel blocks of PIXELS each."""

    AXIS: int
    ROWS: int
    COLS: int
    PIXELS: int
    channel_blocks: int
    pixel_blocks: int
    steps: int
    num_warps: int

    @property
    def parts(self) -> int:
        return cdiv(self.pixel_blocks, self.steps)


# Elements of a flat tile, its channels when they are contiguous, and programs that are enough to fill a GPU.
FLAT, FLAT_CHANNELS, FLAT_WARPS, PROGRAMS = 4096, 64, 8, 1024


def flat(N: int, C: int, pixels: int, last: bool) -> Flat:
    if last:
        columns = min(power_of_2(C), FLAT_CHANNELS)
        rows = min(power_of_2(pixels), FLAT // columns)
        lanes, width = columns, rows
    else:
        columns = min(power_of_2(pixels), FLAT)
        rows = min(power_of_2(C), FLAT // columns)
        lanes, width = rows, columns
    channel_blocks, pixel_blocks = cdiv(C, lanes), cdiv(pixels, width)
    steps = max(1, min(16, N * channel_blocks * pixel_blocks // PROGRAMS))
    return Flat(int(last), rows, columns, width, channel_blocks, pixel_blocks, steps, FLAT_WARPS)


@triton.jit
def group_lanes(block, CPG: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                GROUPS: tl.constexpr):  # fmt: skip
    """(channel from the program's first one, group from its first, valid) of the lanes of channel block `block`."""
    LANES: tl.constexpr = ROWS if AXIS == 0 else COLS
    lane = tl.arange(0, LANES)
    if GROUPS == 1:
        channel = block * LANES + lane
        return channel, tl.zeros([LANES], tl.int32), channel < CPG
    else:
        WIDTH: tl.constexpr = LANES // GROUPS
        return lane // WIDTH * CPG + lane % WIDTH, lane // WIDTH, lane % WIDTH < CPG


@triton.jit
def tile_at(channel, valid, block, C, HW, AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(offsets, mask) [ROWS, COLS] of pixel block `block`, in the integer type of `channel`."""
    if AXIS == 0:
        pixel = (block * COLS + tl.arange(0, COLS)).to(channel.dtype)
        return channel[:, None] * HW + pixel[None, :], valid[:, None] & (pixel < HW)[None, :]
    else:
        pixel = (block * ROWS + tl.arange(0, ROWS)).to(channel.dtype)
        return pixel[:, None] * C + channel[None, :], (pixel < HW)[:, None] & valid[None, :]


@triton.jit
def over_group(v, GROUPS: tl.constexpr):
    """Per-channel sums [LANES] -> the sum of each lane's group, in every lane."""
    WIDTH: tl.constexpr = v.shape[0] // GROUPS
    total = tl.sum(tl.reshape(v, [GROUPS, WIDTH]), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], [GROUPS, WIDTH]), [GROUPS * WIDTH])


@triton.jit
def affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n):
    """(a, c) per lane: z = xhat * a + c = (xhat * weight + bias) * (1 + scale) + shift."""
    a = tl.where(valid, 1.0, 0.0)
    c = tl.zeros_like(a)
    if weight is not None:
        a = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)
    if bias is not None:
        c = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)
    if scale is not None:
        gain = 1.0 + tl.load(scale + n * scale_n + channel, mask=valid, other=0.0).to(tl.float32)
        a *= gain
        c *= gain
    if shift is not None:
        c += tl.load(shift + n * shift_n + channel, mask=valid, other=0.0).to(tl.float32)
    return a, c


@triton.jit
def along_channels(v, AXIS: tl.constexpr):
    """Per-channel lanes shaped to broadcast against a tile."""
    return tl.expand_dims(v, 1 - AXIS)
