"""zero_flag: whether tensors are exactly zero, as int32 flags that stay on the device.

math    flags[i] = 1 where every element of tensor i is +0 or -0, else 0; tested on the bits, (bits << 1) == 0, so that
        denormals and NaN are not zero.
grid    `_scan`: (programs, tensors), up to MOST_TENSORS a launch, whose addresses and sizes are arguments. A program
        strides over its tensor and stops at the first block with a non-zero element: a dense weight costs one block per
        program, a zero one is read once.
order   `_combine` ORs what the programs found. No atomics and nothing to initialise: every launch writes every word
        that is read, so that a captured CUDA graph tests the values of each replay.
zero    this kernel asks the question; the others read its flags.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import DTYPES, INTEGERS, long_name
from ._launch import launch
from ._rows import cdiv

# Tensors of a launch, elements of a block, programs per tensor at most, and warps. (guess)
MOST_TENSORS, BLOCK, PROGRAMS, WARPS = 12, 2048, 256, 8


@triton.jit
def _scan(tensors, sizes, found, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    for i in tl.static_range(COUNT):
        if tl.program_id(1) == i:
            start = tl.program_id(0).to(tl.int64) * BLOCK
            seen = 0
            while (start < sizes[i]) & (seen == 0):
                at = start + tl.arange(0, BLOCK)
                bits = tl.load(tensors[i] + at, mask=at < sizes[i], other=0)
                seen = tl.max(((bits << 1) != 0).to(tl.int32), 0)
                start += tl.num_programs(0).to(tl.int64) * BLOCK
            tl.store(found + i * tl.num_programs(0) + tl.program_id(0), seen)


@triton.jit
def _combine(found, flags, programs, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """flags[i] for program i; with COUNT > 1 one program and one flag: whether one of COUNT tensors is zero."""
    lane = tl.arange(0, BLOCK)
    flag = 0
    for i in tl.static_range(COUNT):
        row = found + (tl.program_id(0) + i) * programs
        flag |= 1 - tl.max(tl.load(row + lane, mask=lane < programs, other=0), 0)
    tl.store(flags + tl.program_id(0), flag)


def zero_flag(tensors: list[Tensor], any_of: bool = False) -> Tensor:
    """A flag per tensor, int32 [len(tensors)]; with any_of (MOST_TENSORS at most) one flag: is one of them zero.

    The tensors are on one device, dense in some order of dimensions.
    """
    device = tensors[0].device
    flags = torch.empty(1 if any_of else len(tensors), dtype=torch.int32, device=device)
    for first in range(0, len(tensors), MOST_TENSORS):
        group = tensors[first : first + MOST_TENSORS]
        sizes = tuple(t.numel() for t in group)
        programs = max(1, min(PROGRAMS, cdiv(max(sizes), BLOCK)))
        found = torch.empty(len(group), programs, dtype=torch.int32, device=device)
        bits = tuple(t.as_strided((t.numel(),), (1,)).view(INTEGERS[t.element_size()]) for t in group)
        launch(
            _scan,
            (programs, len(group)),
            num_warps=WARPS,
            tensors=bits,
            sizes=sizes,
            found=found,
            COUNT=len(group),
            BLOCK=BLOCK,
        )
        count, grid = (len(group), 1) if any_of else (1, len(group))
        launch(
            _combine,
            (grid,),
            num_warps=1,
            found=found,
            flags=flags[first : first + MOST_TENSORS],
            programs=programs,
            COUNT=count,
            BLOCK=PROGRAMS,
        )
    return flags


def _meta(dtype: torch.dtype, *size: int) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


COMPILE_CASES = {
    f"zero_flag-{long_name(dtype)}": lambda dtype=dtype: zero_flag([_meta(dtype, 640, 640, 3, 3)]) for dtype in DTYPES
}
COMPILE_CASES["zero_flag-most"] = lambda: zero_flag(
    [_meta(torch.bfloat16, 1152, 1152 + 16 * i) for i in range(MOST_TENSORS)]
)
COMPILE_CASES["zero_flag-any_of"] = lambda: zero_flag(
    [_meta(torch.bfloat16, 1152, 4608), _meta(torch.float32, 8, 1152)], True
)
