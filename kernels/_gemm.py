"""What the GEMM-shaped kernels share: configurations, tile order, the epilogue, and the sum over a split reduction.

math    rows [M, K] times weight rows [N, K], in fp32 tiles [BM, BN].
grid    one program per tile. Where tiles are too few to fill the GPU, the reduction of each is split: `splits` programs
        write partial sums [splits, M, N] in fp32, and `sum_splits`, one program per 16 x 128 results, adds them.
order   partial sums first to last, so that the result never depends on scheduling.
zero    the loop over the reduction, or over the partial sums, runs no iteration; the epilogue runs as ever.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._rows import cdiv, is_skipped

ASSUMED_SMS = 132  # where there is no device to ask: an H100 SXM's, by its data sheet
# Tile rows that run side by side and share weight tiles in L2; steps that a part of a split reduction has at least;
# parts at most. (guess)
GROUP, LEAST_STEPS, MOST_SPLITS = 8, 8, 8
# A program's tile of the sum over splits: sums of 16 results per thread, in 16-byte accesses
# (access widths: python -m tests.triton.static).
SUM_ROWS, SUM_COLUMNS = 16, 128


class Config(NamedTuple):
    """Tile sizes, warps and pipeline stages of one GEMM-shaped launch."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


# From the most reuse per byte to the most programs; fp32 tiles are half as deep, for the same bytes per stage. None
# spills, and the shared memory of each fits every target (python -m tests.triton.static). The plan measures which one
# is the fastest on the user's GPU; `choose` is the rule before that. On sm_90 two programs of the largest convolution
# are resident, at 128 registers; on sm_80 and sm_100 that limit spills 48 bytes and more.
HALF = (Config(128, 128, 64, 8, 3), Config(128, 64, 64, 4, 3), Config(64, 64, 64, 4, 3))
FULL = (Config(128, 64, 32, 4, 3), Config(64, 64, 32, 4, 3))


def configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """The shipped configurations of a dtype; what a measuring plan may choose among."""
    return FULL if dtype == torch.float32 else HALF


def folding_configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """Those that also have registers for the operand that passes through them in `conv_residual` with `fold`: 32 values
    per thread (spills: python -m tests.triton.static)."""
    return tuple(c for c in configs(dtype) if c.BM * c.BK <= 32 * 32 * c.num_warps)


@functools.lru_cache
def sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else ASSUMED_SMS


def choose(M: int, N: int, K: int, shipped: tuple[Config, ...], device: torch.device) -> tuple[Config, int]:
    """(configuration, splits) before anything is measured: the largest tiles that give every SM one, else the
    smallest ones with the reduction split."""
    count = sms(device)
    for config in shipped:
        if cdiv(M, config.BM) * cdiv(N, config.BN) >= count:
            return config, 1
    config = shipped[-1]
    tiles = max(1, cdiv(M, config.BM) * cdiv(N, config.BN))
    return config, max(1, min(count // tiles, cdiv(K, config.BK) // LEAST_STEPS, MOST_SPLITS))


def precision(dtype: torch.dtype, setting: str) -> str:
    """How fp32 operands enter the tensor cores: tf32 only where PyTorch's own flag says so."""
    return "tf32" if dtype == torch.float32 and setting == "tf32" else "ieee"


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Program number -> (tile row, tile column): GROUP tile rows share the weight tiles they read in L2."""
    per_group = GROUP * tiles_n
    first = pid // per_group * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + pid % per_group % rows, pid % per_group // rows


@triton.jit
def tile_at(p, first, cols, N, BM: tl.constexpr):
    """Pointers to the rows from `first` on, [BM, columns], of a dense [rows, N]: offsets within the tile are 32 bits,
    which takes half the registers (python -m tests.triton.static)."""
    return p + first.to(tl.int64) * N + (tl.arange(0, BM)[:, None] * N + cols[None, :])


@triton.jit
def epilogue(acc, first, row_mask, cols, N, bias, gate, gate_b, gate_t, gate_d, T, residual, branch, y):
    """Writes y = residual + gate * (acc + bias), and branch = acc + bias where asked; returns y in fp32, rounded.

    The rows from `first` on and cols are indices into y [M, N], int32; gate at [row // T, row % T, col] by its strides.
    """
    mask = row_mask[:, None] & (cols < N)[None, :]
    BM: tl.constexpr = acc.shape[0]
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if branch is not None:
        tl.store(tile_at(branch, first, cols, N, BM), acc.to(branch.dtype.element_ty), mask=mask)
    if gate is not None and gate_d is None:  # one number for everything
        acc *= tl.load(gate).to(tl.float32)
    elif gate is not None:
        rows = first + tl.arange(0, BM)
        start = (rows // T).to(tl.int64) * gate_b + (rows % T).to(tl.int64) * gate_t
        g = tl.load(gate + start[:, None] + (cols * gate_d)[None, :], mask=mask, other=0.0)
        acc *= g.to(tl.float32)
    if residual is not None:
        acc += tl.load(tile_at(residual, first, cols, N, BM), mask=mask, other=0.0).to(tl.float32)
    rounded = acc.to(y.dtype.element_ty)
    tl.store(tile_at(y, first, cols, N, BM), rounded, mask=mask)
    return rounded.to(tl.float32)


@triton.jit
def _sum_splits(
    partial,
    bias,
    gate,
    gate_b,
    gate_t,
    gate_d,
    T,
    residual,
    flag,
    branch,
    y,
    M,
    N,
    part,
    splits,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The sum of partial [splits, M, N], then the epilogue; `part` is M * N. A zero branch reads no partial sums."""
    first, cols = tl.program_id(0) * BM, tl.program_id(1) * BN + tl.arange(0, BN)
    inside = first + tl.arange(0, BM) < M
    mask = inside[:, None] & (cols < N)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    at = tile_at(partial, first, cols, N, BM)
    for _ in range(0, splits * (1 - is_skipped(flag))):
        acc += tl.load(at, mask=mask, other=0.0)
        at += part
    epilogue(acc, first, inside, cols, N, bias, gate, gate_b, gate_t, gate_d, T, residual, branch, y)


def sum_splits(
    partial: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_strides: tuple[int, int, int | None],
    T: int,
    residual: Tensor | None,
    flag: Tensor | None,
    branch: Tensor | None,
    y: Tensor,
) -> None:
    """y (and branch) from partial sums [splits, M, N]; the operands are those of `epilogue`."""
    splits, M, N = partial.shape
    gate_b, gate_t, gate_d = gate_strides
    launch(
        _sum_splits,
        (cdiv(M, SUM_ROWS), cdiv(N, SUM_COLUMNS)),
        partial=partial,
        bias=bias,
        gate=gate,
        gate_b=gate_b,
        gate_t=gate_t,
        gate_d=gate_d,
        T=T,
        residual=residual,
        flag=flag,
        branch=branch,
        y=y,
        M=M,
        N=N,
        part=M * N,
        splits=splits,
        BM=SUM_ROWS,
        BN=SUM_COLUMNS,
    )


def check_size(op: str, M: int, N: int) -> None:
    """Row numbers are int32, and offsets within a tile of 128 rows (others are not)."""
    if M >= 2**31 - 128:
        raise ValueError(f"{op}: the kernel takes fewer than 2^31 - 128 rows or pixels, got {M}")
    if N >= 2**24:
        raise ValueError(f"{op}: the kernel takes fewer than 2^24 columns or channels of a result, got {N}")
