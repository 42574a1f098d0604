"""The second stage of a sum over programs, in a fixed order and without atomics.

math    out[b, d] = sum over p of parts[b, p, d]; the first stage wrote one partial sum per program, [B, P, D] in fp32.
grid    (blocks of D, B).
order   LANES partial sums side by side, each every LANES-th one from first to last; then the lanes as a tree.
zero    none, the kernel takes no flag.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import DTYPES, long_name
from ._launch import launch
from ._rows import cdiv

# Partial sums side by side, and columns of a program: rows of 256 bytes, no spills (python -m tests.triton.static).
LANES, COLUMNS = 16, 64


@triton.jit
def column_sums(parts, b, P, D, d, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_D] sums over P of parts[b, :, d]."""
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & (d < D)[None, :]
        total += tl.load(parts + (b * P + p[:, None]) * D + d[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _sum_partials(parts, out, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(out + b * D + d, column_sums(parts, b, P, D, d, BLOCK_P, BLOCK_D), mask=d < D)


def sum_partials(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, D] of parts [B, P, D], fp32."""
    B, P, D = parts.shape
    out = parts.new_empty(B, D, dtype=dtype)
    launch(_sum_partials, (cdiv(D, COLUMNS), B), parts=parts, out=out, P=P, D=D, BLOCK_P=LANES, BLOCK_D=COLUMNS)
    return out


COMPILE_CASES = {
    f"sum_partials-{long_name(dtype)}": lambda dtype=dtype: sum_partials(torch.empty(8, 32, 1152, device="meta"), dtype)
    for dtype in DTYPES
}
