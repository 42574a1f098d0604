"""What share of a GPU's bandwidth a compiled kernel can use, and what costs it most: a model for `roofline.py`.

A multiprocessor keeps the memory busy while what it has asked for and not yet got is bandwidth x latency. So much of
it as the kernel reads must be loads in flight: resident blocks (registers, shared memory) x bytes that a block asks for
before it waits. A block that does not load ahead waits for its reductions and stores half of its life.
"""

from __future__ import annotations

from typing import NamedTuple

LATENCY_NS = 700  # of a load that misses all caches, under load (assumed)
COPY = 0.92  # of the data sheet's bandwidth, what a copy reaches (assumed)
WAITING = 0.5  # of a block's life in which loads are in flight, where none is ahead (assumed)


class GPU(NamedTuple):
    """Data-sheet rates: memory in GB/s, dense bf16 matrix products in TFLOP/s; multiprocessors."""

    name: str
    target: str
    gb_s: float
    bf16_tflop_s: float
    processors: int

    def needed(self, reads: float) -> float:
        """KB in flight on a multiprocessor of a kernel of whose bytes so many are read."""
        return self.gb_s * LATENCY_NS / self.processors * reads / 1000


GPUS = (
    GPU("A100 SXM 80 GB", "sm_80", 2039, 312, 108),
    GPU("H100 SXM", "sm_90", 3350, 989, 132),
    GPU("H200 SXM", "sm_90", 4800, 989, 132),
    GPU("B200", "sm_100", 8000, 2250, 148),
    GPU("RTX 5090", "sm_120", 1792, 209.5, 170),
    GPU("MI300X", "gfx942", 5300, 1307, 304),
)


class Use(NamedTuple):
    """A kernel on a GPU."""

    block_kb: float  # that a block asks for before it waits
    ahead: bool  # loads are in flight while it reduces
    blocks: int  # that fit on a multiprocessor
    programs: int  # of the launch
    reads: float  # share of the bytes moved
    moved: float  # bytes over compulsory ones, without
    partials: float  # partial sums, over compulsory ones
    sectors: float  # bytes in whole sectors over those asked for

    def in_flight(self, gpu: GPU) -> float:
        """KB on a multiprocessor, of all blocks that are there."""
        return min(self.blocks, self.programs / gpu.processors) * self.block_kb

    def losses(self, gpu: GPU) -> dict[str, float]:
        """What is left of the bandwidth after each."""
        busy = self.in_flight(gpu) * (1 if self.ahead else WAITING) / gpu.needed(self.reads)
        idle = min(1.0, self.programs / gpu.processors)
        return {
            "what a copy loses": COPY,
            "few bytes in flight": min(1.0, busy / idle),
            "idle multiprocessors": idle,
            "a second read": 1 / self.moved,
            "partial sums": self.moved / (self.moved + self.partials),
            "cut sectors": 1 / self.sectors,
        }

    def expected(self, gpu: GPU) -> tuple[float, str]:
        """(share of the data sheet's bandwidth, counting compulsory bytes; what costs most)"""
        share, losses = 1.0, self.losses(gpu)
        for left in losses.values():
            share *= left
        return share, min(losses, key=lambda name: losses[name])
