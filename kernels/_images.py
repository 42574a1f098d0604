"""How the group norm kernels cut x [N, C, *S] into tiles.

A tile has lanes of channels and pixels, contiguous along its columns: rows are channels and columns pixels (contiguous
x, AXIS 0), or rows are pixels and columns channels (channels-last, AXIS 1). AXIS is the tile's dimension of channels;
per-channel vectors have one element per lane along it.

  * by group: a program owns whole groups and keeps them on chip as 32-bit words, each two neighbouring 16-bit numbers
    (pixels for AXIS 0, channels for AXIS 1) where the sizes allow, or one number (HALVES 1). Its channels are cut into
    blocks of 2^k lanes; several small groups lie side by side in one block, each padded to 2^k;
  * flat: a program owns consecutive channels, whatever their groups, and some pixel blocks of them.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, power_of_2

NUMBERS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def halves_of(channels: int, pixels: int, last: bool, *tensors: Tensor) -> int:
    """Numbers of a word in which a program reads groups of `channels` x `pixels`: 2 where 16-bit ones pair up."""
    pairs = (channels if last else pixels) % 2 == 0 and tensors[0].element_size() == 2
    return 2 if pairs and all(t.storage_offset() % 2 == 0 and t.data_ptr() % 4 == 0 for t in tensors) else 1


def words_of(t: Tensor, halves: int) -> Tensor:
    """The memory of a dense tensor as one row of words."""
    dtype = torch.int32 if t.element_size() * halves == 4 else torch.int16
    return t.as_strided((t.numel(),), (1,)).view(dtype)


@dataclasses.dataclass(frozen=True)
class ByGroup:
    """All tiles of a program that owns GROUPS whole groups: for each block of WIDTHS lanes from STARTS on, COUNTS tiles
    of PIXELS words, the first of them number FIRST."""

    AXIS: int
    HALVES: int
    GROUPS: int
    STARTS: tuple[int, ...]
    WIDTHS: tuple[int, ...]
    PIXELS: tuple[int, ...]
    COUNTS: tuple[int, ...]
    FIRST: tuple[int, ...]
    BLOCKS: int
    num_warps: int


# Words up to which a program takes more than one group, words of an access, and tiles that are unrolled at most.
SMALL, ACCESS, TILES = 1024, 4, 40


def _before(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))


def by_group(channels: int, pixels: int, groups: int, last: bool, halves: int, table: tuple) -> ByGroup | None:
    """The first entry (words of a program, num_warps) of the table that holds a group of `channels` x `pixels`; None
    when none does."""
    lanes, words = (channels // halves, pixels) if last else (channels, pixels // halves)
    width, length = power_of_2(lanes), power_of_2(words)
    for most, warps in table:
        tile = 32 * warps * ACCESS
        # Groups side by side make a small program worth its start, and fill the sectors of channels-last rows.
        side, area = 1, width * length
        while groups % (2 * side) == 0 and (
            2 * side * area <= SMALL or (last and width * side < 64 // halves and 2 * side * area <= tile)
        ):
            side *= 2
        if side > 1 or (last and area <= table[0][0]):
            widths = (width * side,)
        elif last:  # the bits of `lanes`: nothing is padded
            widths = tuple(1 << bit for bit in reversed(range(lanes.bit_length())) if lanes >> bit & 1)
        else:
            rows = min(width, max(1, tile // length))
            widths = (rows,) * cdiv(lanes, rows)
        sizes = tuple(min(length, max(1, tile // w)) for w in widths)
        counts = tuple(cdiv(words, size) for size in sizes)
        held = sum(w * size * count for w, size, count in zip(widths, sizes, counts, strict=True))
        if held <= most and sum(counts) <= TILES:
            return ByGroup(
                int(last), halves, side, _before(widths), widths, sizes, counts, _before(counts), len(widths), warps
            )
    return None


@triton.constexpr_function
def item(values, i):
    return values[i]


@dataclasses.dataclass(frozen=True)
class Flat:
    """Tiles of programs that own LANES consecutive channels; one sums up `steps` pixel blocks of PIXELS each."""

    AXIS: int
    LANES: int
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
        lanes = min(power_of_2(C), FLAT_CHANNELS)
        width = min(power_of_2(pixels), FLAT // lanes)
    else:
        width = min(power_of_2(pixels), FLAT)
        lanes = min(power_of_2(C), FLAT // width)
    channel_blocks, pixel_blocks = cdiv(C, lanes), cdiv(pixels, width)
    steps = max(1, min(16, N * channel_blocks * pixel_blocks // PROGRAMS))
    return Flat(int(last), lanes, width, channel_blocks, pixel_blocks, steps, FLAT_WARPS)


@triton.jit
def number(words, i: tl.constexpr, HALVES: tl.constexpr, T: tl.constexpr):
    """Number i of each word, in fp32."""
    if HALVES == 1:
        return words.to(T, bitcast=True).to(tl.float32)
    else:
        return (words >> (16 * i)).to(tl.int16).to(T, bitcast=True).to(tl.float32)


@triton.jit
def word(v, i: tl.constexpr, HALVES: tl.constexpr, T: tl.constexpr):
    """Words whose number i is v, rounded to T, and whose other one is 0."""
    if HALVES == 1:
        return v.to(T).to(tl.int32 if T == tl.float32 else tl.int16, bitcast=True)
    else:
        return (v.to(T).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << (16 * i)


@triton.jit
def again(v, zero):
    """v, as a value the compiler takes for another one: it would keep the fp32 numbers it once computed from v, as it
    would the offsets and masks of tiles, in registers that the words need. `zero` is 0 at run time."""
    return v + zero.to(v.dtype)


@triton.jit
def group_lanes(start: tl.constexpr, WIDTH: tl.constexpr, WPG: tl.constexpr, GROUPS: tl.constexpr):
    """(word along the channels from the program's first one, valid) of the lanes of a block; WPG words per group."""
    lane = start + tl.arange(0, WIDTH)
    if GROUPS == 1:
        return lane.to(tl.int64), lane < WPG
    else:
        EACH: tl.constexpr = WIDTH // GROUPS
        return (lane // EACH * WPG + lane % EACH).to(tl.int64), lane % EACH < WPG


@triton.jit
def tile_at(channel, valid, block, C, HW, AXIS: tl.constexpr, PIXELS: tl.constexpr):
    """(offsets, mask) of the tile of these channels and pixel block `block`, in the integer type of `channel`."""
    pixel = (block * PIXELS + tl.arange(0, PIXELS)).to(channel.dtype)
    if AXIS == 0:
        return channel[:, None] * HW + pixel[None, :], valid[:, None] & (pixel < HW)[None, :]
    else:
        return pixel[:, None] * C + channel[None, :], (pixel < HW)[:, None] & valid[None, :]


@triton.jit
def flat_lanes(C, LANES: tl.constexpr):
    """(channel, valid) of the lanes of a flat program."""
    channel = tl.program_id(1).to(tl.int64) * LANES + tl.arange(0, LANES)
    return channel, channel < C


@triton.jit
def per_group(v, GROUPS: tl.constexpr):
    """Sums [GROUPS] of lanes [LANES] that lie group by group."""
    return tl.sum(tl.reshape(v, [GROUPS, v.shape[0] // GROUPS]), 1)


@triton.jit
def per_lane(v, LANES: tl.constexpr, AXIS: tl.constexpr):
    """Numbers [GROUPS] in the lanes of their groups, shaped to broadcast against a tile."""
    GROUPS: tl.constexpr = v.shape[0]
    lanes = tl.reshape(tl.broadcast_to(v[:, None], [GROUPS, LANES // GROUPS]), [LANES])
    return along_channels(lanes, AXIS)


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
def affines(weight, bias, scale, shift, n, first, lane, valid, scale_n, shift_n, STEP: tl.constexpr):
    """The same of words of STEP channels, from channel `first` on: tuples, one entry per channel of a word."""
    gains = ()
    offsets = ()
    for s in tl.static_range(STEP):
        a, c = affine(weight, bias, scale, shift, n, first + lane * STEP + s, valid, scale_n, shift_n)
        gains = gains + (a,)
        offsets = offsets + (c,)
    return gains, offsets


@triton.jit
def along_channels(v, AXIS: tl.constexpr):
    """Per-channel lanes shaped to broadcast against a tile."""
    return tl.expand_dims(v, 1 - AXIS)


@triton.jit
def group_row(p, n, G, channel, valid, CPG: tl.constexpr, AXIS: tl.constexpr):
    """A statistic [N, G] of the groups of these channels, shaped to broadcast against a tile."""
    return along_channels(tl.load(p + n * G + channel // CPG, mask=valid, other=0.0), AXIS)
