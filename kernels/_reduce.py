"""The second stage of deterministic reductions over programs.

Kernels write one partial sum per program, [B, P, D] fp32; this one adds up the P of each sample in a fixed order:
partials p, p + 16, p + 32, ... in 16 lanes, then the lanes as a tree. Grid: blocks of D x B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv
from ._launch import launch

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
    f"sum_partials-{dtype}": lambda dtype=dtype: sum_partials(
        torch.empty(8, 32, 1152, device="meta"), getattr(torch, dtype)
    )
    for dtype in ("float32", "bfloat16", "float16")
}
