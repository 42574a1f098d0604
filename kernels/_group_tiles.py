"""How the group norm kernels cut x [N, C, *S] into tiles, and what they do with a tile.

Columns of a tile are contiguous in memory: rows are channels and columns pixels (contiguous x, AXIS 0), or rows are
pixels and columns channels (channels-last x, AXIS 1). AXIS is the tile's dimension of channels; a vector of channels
has one entry, a lane, for each step along it.

  by group  a program owns GROUPS whole groups and keeps them in registers, as words of PER_WORD values: 2 neighbouring
            16-bit values (pixels for AXIS 0, channels for AXIS 1) where the sizes allow, else 1. Its channels are cut
            into blocks of 2^k lanes; small groups lie side by side in one block, each padded to 2^k lanes.
  flat      a program owns LANES consecutive channels, whatever their groups, and some blocks of PIXELS pixels of them.

Names of the kernels: n a sample, HW its pixels, G groups of CPG channels (WPG words), CPW channels of a word; `at` the
offsets of a tile, `mask` what of it lies inside, `valid` the lanes that are channels.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import INTEGERS
from ._rows import PROGRAMS, cdiv, power_of_2
from ._triton import constexpr_function


def values_per_word(channels: int, pixels: int, last: bool, *tensors: Tensor) -> int:
    """Values in a word of groups of `channels` x `pixels`: 2 where 16-bit ones pair up and are aligned, else 1."""
    pairs = (channels if last else pixels) % 2 == 0 and tensors[0].element_size() == 2
    return 2 if pairs and all(t.storage_offset() % 2 == 0 and t.data_ptr() % 4 == 0 for t in tensors) else 1


def as_words(t: Tensor, per_word: int) -> Tensor:
    """The memory of a dense tensor as one row of words."""
    return t.as_strided((t.numel(),), (1,)).view(INTEGERS[t.element_size() * per_word])


@dataclasses.dataclass(frozen=True)
class ByGroup:
    """The tiles of a program that owns GROUPS whole groups: block i of BLOCKS has WIDTHS[i] lanes from STARTS[i] on,
    in COUNTS[i] tiles of PIXELS[i] words; the first of these is tile FIRST[i] of the program."""

    AXIS: int
    PER_WORD: int
    GROUPS: int
    STARTS: tuple[int, ...]
    WIDTHS: tuple[int, ...]
    PIXELS: tuple[int, ...]
    COUNTS: tuple[int, ...]
    FIRST: tuple[int, ...]
    BLOCKS: int
    num_warps: int


# Words of an access by a thread: 16 bytes (access widths: python -m tests.triton.static).
ACCESS = 4
# Words up to which a program takes more than one group, and tiles of a program at most, all of which the compiler
# unrolls (registers and compile time: python -m tests.triton.static).
SMALL, MOST_TILES = 1024, 40


def _before(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))


def by_group(channels: int, pixels: int, groups: int, last: bool, per_word: int, table: tuple) -> ByGroup | None:
    """The tiles for groups of `channels` x `pixels`, by the first entry of the table, (most words of a program,
    num_warps), that holds a group; None when none does."""
    lanes, words = (channels // per_word, pixels) if last else (channels, pixels // per_word)
    width, length = power_of_2(lanes), power_of_2(words)
    for most, warps in table:
        tile = 32 * warps * ACCESS
        # Groups side by side make a small program worth its start, and fill the sectors of channels-last rows.
        side, area = 1, width * length
        while groups % (2 * side) == 0 and (
            2 * side * area <= SMALL or (last and width * side < 64 // per_word and 2 * side * area <= tile)
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
        if held <= most and sum(counts) <= MOST_TILES:
            return ByGroup(
                int(last), per_word, side, _before(widths), widths, sizes, counts, _before(counts), len(widths), warps
            )
    return None


@constexpr_function
def item(values, i):
    """values[i], known to the compiler; plain indexing is not in loops, before triton 3.7."""
    return values[i]


@dataclasses.dataclass(frozen=True)
class Flat:
    """The tiles of a program that owns LANES consecutive channels and `steps` blocks of PIXELS pixels."""

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

    @property
    def options(self) -> dict[str, int]:
        """What every kernel of these tiles is launched with."""
        return {"AXIS": self.AXIS, "LANES": self.LANES, "PIXELS": self.PIXELS, "num_warps": self.num_warps}


# Elements of a flat tile, its channels when they are contiguous, its warps, and tiles of a program at most
# (access widths and registers: python -m tests.triton.static; partial sums: python -m tests.triton.traffic_cases).
FLAT, FLAT_CHANNELS, FLAT_WARPS, FLAT_STEPS = 4096, 64, 8, 16


def flat(N: int, C: int, pixels: int, last: bool) -> Flat:
    if last:
        lanes = min(power_of_2(C), FLAT_CHANNELS)
        width = min(power_of_2(pixels), FLAT // lanes)
    else:
        width = min(power_of_2(pixels), FLAT)
        lanes = min(power_of_2(C), FLAT // width)
    channel_blocks, pixel_blocks = cdiv(C, lanes), cdiv(pixels, width)
    steps = max(1, min(FLAT_STEPS, N * channel_blocks * pixel_blocks // PROGRAMS))
    return Flat(int(last), lanes, width, channel_blocks, pixel_blocks, steps, FLAT_WARPS)


@triton.jit
def unpack(words, i: tl.constexpr, PER_WORD: tl.constexpr, DTYPE: tl.constexpr):
    """Value i of each word, in fp32."""
    if PER_WORD == 1:
        return words.to(DTYPE, bitcast=True).to(tl.float32)
    else:
        return (words >> (16 * i)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def pack(v, i: tl.constexpr, PER_WORD: tl.constexpr, DTYPE: tl.constexpr):
    """Words whose value i is v, rounded to DTYPE, and whose other one is 0."""
    if PER_WORD == 1:
        return v.to(DTYPE).to(tl.int32 if DTYPE == tl.float32 else tl.int16, bitcast=True)
    else:
        return (v.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << (16 * i)


@triton.jit
def opaque(v, zero):
    """v + 0, where the compiler does not know that `zero` is 0: it then computes again what it computed from v before,
    instead of keeping that in registers which the words need. Offsets and masks of tiles get the same + zero."""
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
def affines(weight, bias, scale, shift, n, first, lane, valid, scale_n, shift_n, CPW: tl.constexpr):
    """(a, c) of each channel of a word, as two tuples of CPW entries; lanes are words from channel `first` on."""
    all_a = ()
    all_c = ()
    for s in tl.static_range(CPW):
        a, c = affine(weight, bias, scale, shift, n, first + lane * CPW + s, valid, scale_n, shift_n)
        all_a = all_a + (a,)
        all_c = all_c + (c,)
    return all_a, all_c


@triton.jit
def along_channels(v, AXIS: tl.constexpr):
    """Per-channel lanes shaped to broadcast against a tile."""
    return tl.expand_dims(v, 1 - AXIS)


@triton.jit
def group_row(p, n, G, channel, valid, CPG: tl.constexpr, AXIS: tl.constexpr):
    """A statistic [N, G] of the groups of these channels, shaped to broadcast against a tile."""
    return along_channels(tl.load(p + n * G + channel // CPG, mask=valid, other=0.0), AXIS)
