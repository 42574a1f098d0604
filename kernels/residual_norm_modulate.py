"""residual_norm_modulate: the end of one gated branch and the norm of the next, every part of it optional.

math    x_new = residual + act(gate) * norm_b(branch), y = norm(x_new) * (1 + scale) + shift. act is tanh or nothing,
        norm_b is RMSNorm with or without a weight, or nothing; norm is LayerNorm or RMSNorm with or without an affine
        part, or absent (then there is no y). Without a branch x_new is the residual, which is not written again.
        gate, shift and scale are a row per sample, per token or named by an index, plus a table (`_modulation.py`).
        fp32; x_new is rounded to its dtype before it is normalised, since that is what backward will read. Saved: mean,
        rstd and the branch's rstd, [B, T] each.
grid    row blocks of all samples; a program takes `steps` tiles of ROWS rows of one sample, as in layer_norm_modulate.
        Reads residual and branch, writes x_new and y: 4ns bytes, 1ns for every operand per token. Indexed rows are read
        from cache.
order   a row is summed by one program: no partial sums.
zero    none, the kernel takes no flag.

An index out of range takes the nearest row: nothing outside is read. ZEROBLOCK_DEBUG=1 makes it an assertion.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import long_name
from ._launch import DEBUG, launch
from ._modulation import (
    Branch,
    Norm,
    Rows,
    activated,
    index_of,
    kind_of,
    of_tokens,
    rows_of_a_sample,
    shared_row,
    strides,
    vector,
)
from ._row_tiles import FORWARD_PER_THREAD, forward_steps, forward_tile
from ._rows import cdiv, in_fp32, part_columns, row_statistics, sum_of_squares, token_rows


@triton.jit
def _forward(
    residual,
    branch,
    gate,
    gate_table,
    branch_weight,
    weight,
    bias,
    shift,
    shift_table,
    scale,
    scale_table,
    index,
    x_new,
    y,
    mean,
    rstd,
    branch_rstd,
    T,
    D,
    K,
    programs,
    steps,
    gate_b,
    gate_t,
    shift_b,
    shift_t,
    scale_b,
    scale_t,
    branch_eps,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    TANH: tl.constexpr,
    RMS: tl.constexpr,
    CHECK: tl.constexpr,
):
    b = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * steps
    PARTS: tl.constexpr = 2 if TAIL > 0 else 1
    gate_rows = ()
    shift_rows = ()
    scale_rows = ()
    for i in tl.static_range(PARTS):
        d = part_columns(i, BLOCK_D, TAIL)
        gate_rows = gate_rows + (shared_row(gate, gate_table, b, gate_b, d, D, GATE),)
        shift_rows = shift_rows + (shared_row(shift, shift_table, b, shift_b, d, D, SHIFT),)
        scale_rows = scale_rows + (shared_row(scale, scale_table, b, scale_b, d, D, SCALE),)
    for step in range(steps):
        block = first + step
        t = block * ROWS + tl.arange(0, ROWS)
        k = t
        if index is not None:
            k = index_of(index, b, t, T, K, CHECK)
        branches = ()
        if branch is not None:
            for i in tl.static_range(PARTS):
                t, mask, at = token_rows(b, block, T, part_columns(i, BLOCK_D, TAIL), D, ROWS)
                branches = branches + (tl.load(branch + at, mask=mask, other=0.0).to(tl.float32),)
            if branch_rstd is not None:
                h_rstd = tl.rsqrt(sum_of_squares(branches, TAIL) / D + branch_eps)
                tl.store(branch_rstd + b * T + t, h_rstd, mask=t < T)
        row = ()
        for i in tl.static_range(PARTS):
            d = part_columns(i, BLOCK_D, TAIL)
            t, mask, at = token_rows(b, block, T, d, D, ROWS)
            x = tl.load(residual + at, mask=mask, other=0.0)
            if branch is not None:
                h = branches[i]
                if branch_rstd is not None:
                    h *= h_rstd[:, None]
                if branch_weight is not None:
                    h *= vector(branch_weight, d, D)
                if gate is not None or gate_table is not None:
                    h *= activated(of_tokens(gate, gate_rows[i], b, t, k, gate_b, gate_t, d, mask, GATE), TANH)
                x = (x.to(tl.float32) + h).to(x_new.dtype.element_ty)
                tl.store(x_new + at, x, mask=mask)
            row = row + (x,)
        if y is not None:
            exact: tl.constexpr = row[0].dtype != tl.float32
            row_mean, row_rstd, centred = row_statistics(in_fp32(row, TAIL), D, eps, RMS, exact, BLOCK_D, TAIL)
            for i in tl.static_range(PARTS):
                d = part_columns(i, BLOCK_D, TAIL)
                t, mask, at = token_rows(b, block, T, d, D, ROWS)
                value = centred[i] * row_rstd[:, None]
                if weight is not None:
                    value *= vector(weight, d, D)
                if bias is not None:
                    value += vector(bias, d, D)
                value *= 1.0 + of_tokens(scale, scale_rows[i], b, t, k, scale_b, scale_t, d, mask, SCALE)
                value += of_tokens(shift, shift_rows[i], b, t, k, shift_b, shift_t, d, mask, SHIFT)
                tl.store(y + at, value, mask=mask)
            if not RMS:
                tl.store(mean + b * T + t, row_mean, mask=t < T)
            tl.store(rstd + b * T + t, row_rstd, mask=t < T)


def forward(
    residual: Tensor,
    branch: Branch | None,
    norm: Norm | None,
    index: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(x_new, y, mean, rstd, branch_rstd), None where absent; residual [B, T, D] and int32 index [B, T] are dense."""
    B, T, D = residual.shape
    rows, block, tail, warps = forward_tile(D, FORWARD_PER_THREAD[0], residual.element_size())
    steps = forward_steps(B, T, rows)
    programs = cdiv(T, rows * steps)

    def statistic(wanted: bool) -> Tensor | None:
        return residual.new_empty(B, T, dtype=torch.float32) if wanted else None

    x_new = None if branch is None else residual.new_empty(B, T, D, dtype=branch.dtype)
    y = None if norm is None else residual.new_empty(B, T, D, dtype=norm.dtype)
    mean, rstd = statistic(norm is not None and not norm.rms), statistic(norm is not None)
    branch_rstd = statistic(branch is not None and branch.rms)
    gate = Rows() if branch is None else branch.gate
    shift, scale = (Rows(), Rows()) if norm is None else (norm.shift, norm.scale)
    K = rows_of_a_sample(index, gate, shift, scale)
    (gate_b, gate_t), (shift_b, shift_t), (scale_b, scale_t) = (strides(v) for v in (gate, shift, scale))
    launch(
        _forward,
        (B * programs,),
        num_warps=warps,
        residual=residual,
        branch=None if branch is None else branch.branch,
        gate=gate.rows,
        gate_table=gate.table,
        branch_weight=None if branch is None else branch.weight,
        weight=None if norm is None else norm.weight,
        bias=None if norm is None else norm.bias,
        shift=shift.rows,
        shift_table=shift.table,
        scale=scale.rows,
        scale_table=scale.table,
        index=None if K is None else index,
        x_new=x_new,
        y=y,
        mean=mean,
        rstd=rstd,
        branch_rstd=branch_rstd,
        T=T,
        D=D,
        K=K,
        programs=programs,
        steps=steps,
        gate_b=gate_b,
        gate_t=gate_t,
        shift_b=shift_b,
        shift_t=shift_t,
        scale_b=scale_b,
        scale_t=scale_t,
        branch_eps=0.0 if branch is None else branch.eps,
        eps=0.0 if norm is None else norm.eps,
        ROWS=rows,
        BLOCK_D=block,
        TAIL=tail,
        GATE=kind_of(gate, index),
        SHIFT=kind_of(shift, index),
        SCALE=kind_of(scale, index),
        TANH=branch is not None and branch.tanh,
        RMS=norm is not None and norm.rms,
        CHECK=DEBUG,
    )
    return x_new, y, mean, rstd, branch_rstd


HALF, FULL = torch.bfloat16, torch.float32
# D, dtype, rows, dtype of the operands, and whether norm and branch have weights and the branch a norm.
COMPILED = (
    (3072, HALF, "sample", FULL, True),
    (3072, HALF, "token", FULL, False),
    (3072, HALF, "indexed", FULL, False),
    (37, torch.float16, "sample", torch.float16, True),
)


def example(
    D: int, dtype: torch.dtype, rows: str, operands: torch.dtype, full: bool
) -> tuple[Branch, Norm, Tensor | None]:
    """A case of COMPILED on "meta": what COMPILE_CASES here and of backward start."""
    B, T, K = 8, 256, 2
    size = {"sample": (B, 6 * D), "token": (B, T, 6 * D), "indexed": (B, K, 6 * D)}[rows]

    def new(*size: int, of: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    v = Rows(new(*size, of=operands)[..., :D], new(D, of=operands))
    x, weight = new(B, T, D, of=dtype), new(D, of=dtype) if full else None
    branch = Branch(x, v, full, full, weight, 1e-6, dtype)
    norm = Norm(False, weight, weight, v, v, 1e-6, dtype)
    return branch, norm, new(B, T, of=torch.int32) if rows == "indexed" else None


def case_name(op: str, D: int, dtype: torch.dtype, rows: str, operands: torch.dtype, full: bool) -> str:
    mixed = "" if operands == dtype else f"-{long_name(operands)}"
    return f"{op}-{D}-{long_name(dtype)}-{rows}{mixed}{'-full' if full else ''}{'-unaligned' if D % 8 else ''}"


def _compile(*case: Any) -> None:
    branch, norm, index = example(*case)
    forward(branch.branch, branch, norm, index)


COMPILE_CASES = {case_name("residual_norm_modulate", *case): partial(_compile, *case) for case in COMPILED}
