"""zero_flag: whether tensors are exactly zero, as int32 flags that stay on the device.

math    flags[i] = 1 where every element of tensor i is +0 or -0, else 0; tested on the bits, (bits << 1) == 0, so that
        denormals and NaN are not zero.
grid    (programs, tensors), up to MOST_TENSORS a launch, whose addresses and sizes are arguments. A program strides
        over its tensor and stops at the first block with a non-zero element: a dense weight costs one block per
        program, a zero one is read once.
order   every program adds to one word: that it is done, in the low 16 bits, and whether it has seen anything, in a
        field of the tensor. Who finds in the sum that all are done writes the flag and clears the word
        (_counters.py). Sums of integers: any order gives the same flag. A captured CUDA graph tests the values of each
        replay.
zero    this kernel asks the question; the others read its flags.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._counters import counters
from ._dtypes import DTYPES, INTEGERS, long_name
from ._launch import launch
from ._rows import cdiv

# Tensors of a launch, elements of a block, programs of all of them at most, and warps: eight programs on each SM, whose
# loads are what the memory of a zero weight needs in flight (model, not measured: benchmarks/roofline.md).
MOST_TENSORS, BLOCK, PROGRAMS, WARPS = 12, 2048, 1024, 8
# Bits of a word: programs that are done, of all tensors that share it; those that have seen something, of each.
DONE, SEEN = 16, 12
MOST_TOGETHER = 4  # fields of a word


@triton.jit
def _scan(
    tensors,
    sizes,
    words,
    flags,
    COUNT: tl.constexpr,
    ANY_OF: tl.constexpr,
    DONE: tl.constexpr,
    SEEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """flags[i] for tensor i; with ANY_OF one flag: whether one of them is zero."""
    for i in tl.static_range(COUNT):
        if tl.program_id(1) == i:
            start = tl.program_id(0).to(tl.int64) * BLOCK
            seen = 0
            while (start < sizes[i]) & (seen == 0):
                at = start + tl.arange(0, BLOCK)
                bits = tl.load(tensors[i] + at, mask=at < sizes[i], other=0)
                seen = tl.max(((bits << 1) != 0).to(tl.int32), 0)
                start += tl.num_programs(0).to(tl.int64) * BLOCK
            field: tl.constexpr = i if ANY_OF else 0
            fields: tl.constexpr = COUNT if ANY_OF else 1
            at_word = 0 if ANY_OF else i
            mine = 1 + (seen.to(tl.int64) << (DONE + SEEN * field))
            found = tl.atomic_add(words + at_word, mine, sem="relaxed") + mine
            if (found & ((1 << DONE) - 1)) == tl.num_programs(0) * fields:
                flag = 0
                for j in tl.static_range(fields):
                    flag |= (((found >> (DONE + SEEN * j)) & ((1 << SEEN) - 1)) == 0).to(tl.int32)
                tl.store(flags + at_word, flag)
                tl.store(words + at_word, 0)


def zero_flag(tensors: list[Tensor], any_of: bool = False) -> Tensor:
    """A flag per tensor, int32 [len(tensors)]; with any_of (MOST_TOGETHER at most) one flag: is one of them zero.

    The tensors are on one device, dense in some order of dimensions.
    """
    device = tensors[0].device
    flags = torch.empty(1 if any_of else len(tensors), dtype=torch.int32, device=device)
    for first in range(0, len(tensors), MOST_TENSORS):
        group = tensors[first : first + MOST_TENSORS]
        sizes = tuple(t.numel() for t in group)
        programs = max(1, min(PROGRAMS // len(group), cdiv(max(sizes), BLOCK)))
        bits = tuple(t.as_strided((t.numel(),), (1,)).view(INTEGERS[t.element_size()]) for t in group)
        launch(
            _scan,
            (programs, len(group)),
            num_warps=WARPS,
            tensors=bits,
            sizes=sizes,
            words=counters(device),
            flags=flags[first:],
            COUNT=len(group),
            ANY_OF=any_of,
            DONE=DONE,
            SEEN=SEEN,
            BLOCK=BLOCK,
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
