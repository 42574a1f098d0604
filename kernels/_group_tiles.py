"""How the group norm kernels cut x [N, C, *S] into tiles, and what they do with a tile.

Columns of a tile are contiguous in memory: rows are channels and columns pixels (contiguous x, AXIS 0), or rows are
pixels and columns channels (channels-last x, AXIS 1). AXIS is the tile's dimension of channels; a vector of channels
has one entry, a lane, for each step along it. Lanes are consecutive channels, whatever their groups.

  held   a program owns GROUPS neighbouring groups, reads them once and keeps them in registers, in fp32: one tile of
         HEAD lanes and, where that pads less, one of TAIL lanes beside it (80 channels are 64 + 16), of all the pixels.
  split  a program owns a block of channels, GROUPS neighbouring groups or one of the SUBS pieces of a wide group, and a
         part of the pixels, in `steps` tiles of LANES x PIXELS, one after the other in a loop.

A row of a channels-last tile has 64 bytes or more, in at most 1.1 times as many bytes of sectors (`sectors_per_byte`).

Names of the kernels: n a sample, HW its pixels, G groups of CPG channels; `at` the offsets of a tile, `mask` what of it
lies inside, `valid` the lanes that are channels of the program; numbers of its groups are vectors of SLOTS >= GROUPS.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl

from ._rows import cdiv, power_of_2

SECTOR = 32  # bytes
# Of a row of a channels-last tile: bytes at least, and bytes of its sectors per byte at most
# (sectors: python -m tests.triton.traffic_cases).
ROW_BYTES, ROW_SECTORS = 64, 1.1
# Numbers up to which a program takes more than one group. (guess)
SMALL = 2048
# Programs that occupy most SMs, and numbers from which fewer programs are split instead, if x is all that is held. By
# a model, a program alone on its SM takes 0.15 ns per number, all instructions, and another launch 2.5 us.
LEAST_PROGRAMS, ALONE = 128, 16384


@functools.lru_cache
def sectors_per_byte(row: int, pitch: int) -> float:
    """Bytes of the sectors of a row of `row` bytes per byte of it, on average over the rows and the programs beside
    each other; rows are `pitch` bytes apart."""
    if row >= pitch:
        return 1.0  # the rows follow each other
    starts = range(0, SECTOR, math.gcd(row, pitch, SECTOR))
    return sum(cdiv(start + row, SECTOR) for start in starts) * SECTOR / (len(starts) * row)


class Held(NamedTuple):
    """The constants of a program that holds its groups."""

    AXIS: int
    GROUPS: int
    SLOTS: int
    HEAD: int
    TAIL: int
    PIXELS: int
    EVEN: bool  # nothing of the tiles lies outside
    num_warps: int


def head_and_tail(lanes: int) -> tuple[int, int]:
    """Powers of 2 that hold `lanes` together, the tail 0 where one is as good."""
    head = power_of_2(lanes + 1) // 2
    tail = power_of_2(lanes - head) if lanes > head else 0
    return (2 * head, 0) if tail == head else (head, tail)


@functools.lru_cache
def held(
    N: int, channels: int, pixels: int, groups: int, last: bool, size: int, tables: tuple, alone: int
) -> Held | None:
    """The tiles for `groups` groups of `channels` x `pixels` numbers of `size` bytes, by the first entry that does,
    (most numbers of a program, num_warps), of the layout's table: contiguous, channels-last. None when none does, and
    when so few programs would hold more than `alone` numbers each that it takes less time to split them."""
    pitch, length = groups * channels * size, power_of_2(pixels)
    if channels * groups * pixels >= 2**31:
        return None  # offsets inside a sample are int32 here
    best = None
    for count in range(1, groups + 1):
        lanes = count * channels
        row = lanes * size
        if groups % count or (last and (row < min(ROW_BYTES, pitch) or sectors_per_byte(row, pitch) > ROW_SECTORS)):
            continue
        head, tail = head_and_tail(lanes)
        area = (head + tail) * length
        if best is not None and area > SMALL:
            break
        warps = next((warps for most, warps in tables[last] if area <= most), None)
        if warps is None or (area > alone and N * groups // count < LEAST_PROGRAMS):
            break
        even = head + tail == lanes and length == pixels
        best = Held(int(last), count, power_of_2(count), head, tail, length, even, warps)
    return best


class Split(NamedTuple):
    """The tiles of programs that own a block of channels and a part of the pixels, and the grid of these programs."""

    AXIS: int
    GROUPS: int
    SUBS: int
    SLOTS: int
    LANES: int
    PIXELS: int
    blocks: int
    parts: int
    steps: int

    @property
    def options(self) -> dict[str, int]:
        """What every kernel of these tiles is launched with."""
        names = ("AXIS", "GROUPS", "SUBS", "SLOTS", "LANES", "PIXELS", "steps")
        return {name: getattr(self, name) for name in names} | {"num_warps": SPLIT_WARPS}

    @property
    def pieces(self) -> int:
        """Programs that share a group, each of which leaves partial sums of it."""
        return self.parts * self.SUBS


# Elements of a split tile, its channels when contiguous (256 where fewer make no whole sectors: ptxas may spill), and
# its warps (access widths and registers: python -m tests.triton.static).
TILE, TILE_CHANNELS, SPLIT_WARPS = 4096, (64, 128, 256), 8
# Parts of a sample at most, since every program of the second launch adds up what those of the first one left (bytes:
# python -m tests.triton.traffic_cases).
MOST_PARTS = 64


@functools.lru_cache
def channel_block(channels: int, groups: int, size: int) -> tuple[int, int, int]:
    """(GROUPS, SUBS, LANES) of channels-last tiles: rows of whole sectors and 16-byte accesses, few lanes idle."""
    C = channels * groups

    def candidates():
        for lanes in TILE_CHANNELS:
            if channels > lanes:
                yield 1, cdiv(channels, lanes), lanes
            for count in range(1, min(groups, lanes // channels) + 1):
                yield count, 1, power_of_2(count * channels)

    def cost(block: tuple[int, int, int]) -> tuple[float, int, int]:
        count, subs, lanes = block
        row = (count * channels if subs == 1 else lanes) * size
        short = max(1.0, min(ROW_BYTES, C * size) / row)
        narrow = 2.0 if row % 16 and not C * size % 16 else 1.0
        sectors = sectors_per_byte(row, C * size)
        wasteful = 4.0 if sectors > ROW_SECTORS else 2.0 if lanes == TILE_CHANNELS[-1] else 1.0
        idle = cdiv(groups, count) * subs * lanes / C
        return short * narrow * wasteful * sectors * (1 + idle), subs, abs(lanes - TILE_CHANNELS[0])

    return min(candidates(), key=cost)


@functools.lru_cache
def split_tiles(N: int, channels: int, pixels: int, groups: int, last: bool, size: int, programs: int) -> Split:
    """The tiles for about `programs` programs, by the sizes of `held`."""
    if last:
        count, subs, lanes = channel_block(channels, groups, size)
        width = min(power_of_2(pixels), max(1, TILE // lanes))
    else:
        width = min(power_of_2(pixels), TILE)
        lanes = min(power_of_2(channels), TILE // width)
        count, subs = 1, cdiv(channels, lanes)
    blocks, pixel_blocks = cdiv(groups, count) * subs, cdiv(pixels, width)
    parts = max(1, min(MOST_PARTS, programs // max(1, N * blocks), pixel_blocks))
    steps = cdiv(pixel_blocks, parts)
    return Split(int(last), count, subs, power_of_2(count), lanes, width, blocks, cdiv(pixel_blocks, steps), steps)


@triton.jit
def tile_at(channel, valid, block, C, HW, AXIS: tl.constexpr, PIXELS: tl.constexpr):
    """(offsets, mask) of the tile of these channels and pixel block `block`, in the integer type of `channel`."""
    pixel = (block * PIXELS + tl.arange(0, PIXELS)).to(channel.dtype)
    if AXIS == 0:
        return channel[:, None] * HW + pixel[None, :], valid[:, None] & (pixel < HW)[None, :]
    else:
        return pixel[:, None] * C + channel[None, :], (pixel < HW)[:, None] & valid[None, :]


@triton.jit
def block_lanes(
    block, C, CPG: tl.constexpr, GROUPS: tl.constexpr, SUBS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr
):
    """(first, lane, valid, group, owned) of channel block `block` of a split program: its first channel and the lanes
    from there on, and the groups in its slots."""
    lane = tl.arange(0, LANES)
    slot = tl.arange(0, SLOTS)
    if SUBS == 1:
        first = block * (GROUPS * CPG)
        group = block * GROUPS + slot
        return first, lane, (lane < GROUPS * CPG) & (lane < C - first), group, (slot < GROUPS) & (group * CPG < C)
    else:
        sub = block % SUBS * LANES
        return block // SUBS * CPG + sub, lane, lane < CPG - sub, block // SUBS + slot, slot < GROUPS


@triton.jit
def part_tile(first, lane, valid, block, C, HW, AXIS: tl.constexpr, PIXELS: tl.constexpr):
    """(where it starts, offsets from there, mask) of the tile of these channels and pixel block `block`, an int64."""
    start = block * PIXELS
    pixel = tl.arange(0, PIXELS)
    inside = pixel < tl.minimum(HW - start, PIXELS)
    if AXIS == 0:
        at = lane[:, None] * HW + pixel[None, :]
        return first.to(tl.int64) * HW + start, at, valid[:, None] & inside[None, :]
    else:
        return start * C + first, pixel[:, None] * C + lane[None, :], inside[:, None] & valid[None, :]


@triton.jit
def _belongs(LANES: tl.constexpr, START: tl.constexpr, CPG: tl.constexpr, SLOTS: tl.constexpr):
    """[SLOTS, LANES]: is the lane, which is channel START and following ones of the program, of the slot's group?"""
    return ((START + tl.arange(0, LANES)) // CPG)[None, :] == tl.arange(0, SLOTS)[:, None]


@triton.jit
def per_group(v, START: tl.constexpr, CPG: tl.constexpr, SLOTS: tl.constexpr):
    """Sums [SLOTS] of the lanes of each group; lanes that belong to no group of the program are 0, or all are of it."""
    if SLOTS == 1:
        return tl.sum(v, 0) + tl.zeros([1], tl.float32)
    else:
        return tl.sum(tl.where(_belongs(v.shape[0], START, CPG, SLOTS), v[None, :], 0.0), 1)


@triton.jit
def per_lane(v, LANES: tl.constexpr, START: tl.constexpr, CPG: tl.constexpr):
    """Numbers [SLOTS] in the lanes of their groups; [1] of a single slot."""
    if v.shape[0] == 1:
        return v
    else:
        return tl.sum(tl.where(_belongs(LANES, START, CPG, v.shape[0]), v[:, None], 0.0), 0)


@triton.jit
def channel_row(p, channel, valid, absent: tl.constexpr):
    """fp32 numbers of these channels; `absent` without p."""
    if p is not None:
        return tl.load(p + channel, mask=valid, other=0.0).to(tl.float32)
    else:
        return tl.where(valid, absent, 0.0)


@triton.jit
def affine(weight, bias, scale, shift, n, channel, valid, scale_n, shift_n):
    """(a, c) per lane: z = xhat * a + c = (xhat * weight + bias) * (1 + scale) + shift."""
    a = channel_row(weight, channel, valid, 1.0)
    c = channel_row(bias, channel, valid, 0.0)
    if scale is not None:
        gain = 1.0 + channel_row(scale + n * scale_n, channel, valid, 0.0)
        a *= gain
        c *= gain
    if shift is not None:
        c += channel_row(shift + n * shift_n, channel, valid, 0.0)
    return a, c


@triton.jit
def along_channels(v, AXIS: tl.constexpr):
    """Per-channel lanes shaped to broadcast against a tile."""
    return tl.expand_dims(v, 1 - AXIS)
