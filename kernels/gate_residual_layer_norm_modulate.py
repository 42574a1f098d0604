"""gate_residual_layer_norm_modulate: the end of one DiT branch and the norm of the next, in one pass.

math    x_new = residual + gate * branch, y = layer_norm(x_new) * (1 + scale) + shift; x_new is rounded to its dtype
        before it is normalised, since that is what backward will read. mean and rstd [B, T] are saved.
grid    (row blocks, B), as in layer_norm_modulate. Reads residual and branch, writes x_new and y: 4ns bytes.
zero    none, the kernel takes no flag.

Backward: dx is the norm's gradient of dy (+ dx_new); dresidual = dx, dbranch = dx * gate, dgate = sum of dx * branch,
dshift = sum of dy, dscale = sum of dy * xhat. Reads dx_new, dy, x_new and branch, writes dresidual and dbranch: 6ns.
Rows of more than MAX_TUNED_D in fp32 take two kernels instead, the norm's and the gate's: 9ns.
order   a program adds its rows in order into one partial sum per column, [B, P, D] in fp32; `sum_partials` adds the P.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gate_residual, layer_norm_modulate
from ._dtypes import long_name
from ._launch import launch
from ._reduce import sum_partials
from ._row_tiles import (
    BACKWARD_PER_THREAD,
    FORWARD_PER_THREAD,
    MAX_TUNED_D,
    backward_stages,
    backward_steps,
    forward_steps,
    forward_tile,
    per_thread_choices,
    tile,
)
from ._rows import (
    PER_TOKEN,
    cdiv,
    operand_rows,
    part_columns,
    row_norm_grad,
    row_statistics,
    sample_row,
    saved_statistics,
    saved_xhat,
    token_rows,
)
from .layer_norm_modulate import kind_of, strides


@triton.jit
def _forward(
    residual,
    gate,
    branch,
    shift,
    scale,
    x_new,
    y,
    mean,
    rstd,
    T,
    D,
    steps,
    gate_b,
    gate_t,
    shift_b,
    shift_t,
    scale_b,
    scale_t,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    PARTS: tl.constexpr = 2 if TAIL > 0 else 1
    gate_rows = ()
    shift_rows = ()
    scale_rows = ()
    for i in tl.static_range(PARTS):
        d = part_columns(i, BLOCK_D, TAIL)
        gate_rows = gate_rows + (sample_row(gate, b, gate_b, d, D, GATE),)
        shift_rows = shift_rows + (sample_row(shift, b, shift_b, d, D, SHIFT),)
        scale_rows = scale_rows + (sample_row(scale, b, scale_b, d, D, SCALE),)
    for step in range(steps):
        block = tl.program_id(0).to(tl.int64) * steps + step
        row = ()
        for i in tl.static_range(PARTS):
            d = part_columns(i, BLOCK_D, TAIL)
            t, mask, at = token_rows(b, block, T, d, D, ROWS)
            x = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
            x *= operand_rows(gate, gate_rows[i], b, t, gate_b, gate_t, d, mask, GATE)
            x += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
            rounded = x.to(x_new.dtype.element_ty)
            tl.store(x_new + at, rounded, mask=mask)
            row = row + (rounded.to(tl.float32),)
        row_mean, row_rstd, centred = row_statistics(
            row, D, eps, False, x_new.dtype.element_ty != tl.float32, BLOCK_D, TAIL
        )
        for i in tl.static_range(PARTS):
            d = part_columns(i, BLOCK_D, TAIL)
            t, mask, at = token_rows(b, block, T, d, D, ROWS)
            value = centred[i] * row_rstd[:, None]
            value *= 1.0 + operand_rows(scale, scale_rows[i], b, t, scale_b, scale_t, d, mask, SCALE)
            value += operand_rows(shift, shift_rows[i], b, t, shift_b, shift_t, d, mask, SHIFT)
            tl.store(y + at, value, mask=mask)
        t = block * ROWS + tl.arange(0, ROWS)
        tl.store(mean + b * T + t, row_mean, mask=t < T)
        tl.store(rstd + b * T + t, row_rstd, mask=t < T)


def forward(
    residual: Tensor,
    gate: Tensor,
    branch: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    per_thread: int = FORWARD_PER_THREAD[0],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_new, y, mean, rstd); dense residual and branch; gate, shift, scale [B, D] or [B, T, D] with dense rows."""
    B, T, D = branch.shape
    rows, block, tail, warps = forward_tile(D, per_thread, branch.element_size())
    steps = forward_steps(B, T, rows)
    x_new, y = torch.empty_like(branch), torch.empty_like(branch)
    mean, rstd = (branch.new_empty(B, T, dtype=torch.float32) for _ in range(2))
    (gate_b, gate_t), (shift_b, shift_t), (scale_b, scale_t) = (strides(v) for v in (gate, shift, scale))
    launch(
        _forward,
        (cdiv(T, rows * steps), B),
        num_warps=warps,
        residual=residual,
        gate=gate,
        branch=branch,
        shift=shift,
        scale=scale,
        x_new=x_new,
        y=y,
        mean=mean,
        rstd=rstd,
        T=T,
        D=D,
        steps=steps,
        gate_b=gate_b,
        gate_t=gate_t,
        shift_b=shift_b,
        shift_t=shift_t,
        scale_b=scale_b,
        scale_t=scale_t,
        eps=eps,
        ROWS=rows,
        BLOCK_D=block,
        TAIL=tail,
        GATE=kind_of(gate),
        SHIFT=kind_of(shift),
        SCALE=kind_of(scale),
    )
    return x_new, y, mean, rstd


@triton.jit
def _backward(
    dx_new,
    dy,
    x_new,
    mean,
    rstd,
    gate,
    branch,
    scale,
    dresidual,
    dbranch,
    dgate,
    dscale,
    part_dgate,
    part_dshift,
    part_dscale,
    T,
    D,
    steps,
    gate_b,
    gate_t,
    scale_b,
    scale_t,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    # Long rows leave no registers to keep the sample's gate and scale in: every row reads them again.
    LONG: tl.constexpr = BLOCK_D > 4096  # MAX_TUNED_D
    kept_gate = sample_row(gate, b, gate_b, d, D, 0 if LONG else GATE)
    kept_scale = sample_row(scale, b, scale_b, d, D, 0 if LONG else SCALE)
    sum_dgate = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_dshift = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_dscale = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        block = tl.program_id(0).to(tl.int64) * steps + step
        t, mask, at = token_rows(b, block, T, d, D, ROWS)
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        row_mean, row_rstd = saved_statistics(mean, rstd, b, block, T, ROWS, False)
        xhat = saved_xhat(x_new, row_mean, row_rstd, at, mask, False)
        if part_dshift is not None:
            sum_dshift += g
        if SCALE == 2:
            tl.store(dscale + at, g * xhat, mask=mask)
        else:
            sum_dscale += g * xhat
        scale_row = sample_row(scale, b, scale_b, d, D, SCALE) if LONG else kept_scale
        g *= 1.0 + operand_rows(scale, scale_row, b, t, scale_b, scale_t, d, mask, SCALE)
        dx = row_norm_grad((g,), (xhat,), row_rstd, D, False, 0)[0]
        if dx_new is not None:
            dx += tl.load(dx_new + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dresidual + at, dx, mask=mask)
        gate_row = sample_row(gate, b, gate_b, d, D, GATE) if LONG else kept_gate
        tl.store(dbranch + at, dx * operand_rows(gate, gate_row, b, t, gate_b, gate_t, d, mask, GATE), mask=mask)
        product = dx * tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        if GATE == 2:
            tl.store(dgate + at, product, mask=mask)
        else:
            sum_dgate += product
    at = (b * tl.num_programs(0) + tl.program_id(0)) * D + d
    if part_dgate is not None:
        tl.store(part_dgate + at, tl.sum(sum_dgate, 0), mask=d < D)
    if part_dshift is not None:
        tl.store(part_dshift + at, tl.sum(sum_dshift, 0), mask=d < D)
    if part_dscale is not None:
        tl.store(part_dscale + at, tl.sum(sum_dscale, 0), mask=d < D)


def backward(
    dx_new: Tensor | None,
    dy: Tensor,
    x_new: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    branch: Tensor,
    shift: Tensor,
    scale: Tensor,
    per_thread: int = BACKWARD_PER_THREAD[0],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(dresidual, dgate, dbranch, dshift, dscale) like their operands; a per-token dshift is dy, left out. Everything
    [B, T, D] is dense."""
    B, T, D = branch.shape
    long = D > MAX_TUNED_D
    if long and branch.dtype == torch.float32:
        return _backward_in_two(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale)
    if long:  # half as many threads, each with twice the registers (spills: python -m tests.triton.static)
        per_thread = max(BACKWARD_PER_THREAD)
    rows, block, warps = tile(D, per_thread)
    steps = backward_steps(B, T, D, rows)
    programs = cdiv(T, rows * steps)
    dresidual, dbranch = torch.empty_like(branch), torch.empty_like(branch)

    def results(v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(gradient written by the kernel, partial sums)"""
        if kind_of(v) == PER_TOKEN:
            return v.new_empty(v.shape), None
        return None, branch.new_empty(B, programs, D, dtype=torch.float32)

    (dgate, part_dgate), (dscale, part_dscale) = results(gate), results(scale)
    part_dshift = None if kind_of(shift) == PER_TOKEN else results(shift)[1]
    streamed = [dy, x_new, branch, *(v for v in (gate, scale) if kind_of(v) == PER_TOKEN)]
    if dx_new is not None:
        streamed.append(dx_new)
    # Of fp32 one tile is in flight as it is, and nothing is left to keep another's addresses in.
    stages = 1 if branch.dtype == torch.float32 else backward_stages(rows, block, *streamed)
    gate_b, gate_t = strides(gate)
    scale_b, scale_t = strides(scale)
    launch(
        _backward,
        (programs, B),
        num_warps=warps,
        dx_new=dx_new,
        dy=dy,
        x_new=x_new,
        mean=mean,
        rstd=rstd,
        gate=gate,
        branch=branch,
        scale=scale,
        dresidual=dresidual,
        dbranch=dbranch,
        dgate=dgate,
        dscale=dscale,
        part_dgate=part_dgate,
        part_dshift=part_dshift,
        part_dscale=part_dscale,
        T=T,
        D=D,
        steps=steps,
        gate_b=gate_b,
        gate_t=gate_t,
        scale_b=scale_b,
        scale_t=scale_t,
        ROWS=rows,
        BLOCK_D=block,
        GATE=kind_of(gate),
        SCALE=kind_of(scale),
        STAGES=stages,
    )
    dgate = sum_partials(part_dgate, gate.dtype) if part_dgate is not None else dgate
    dscale = sum_partials(part_dscale, scale.dtype) if part_dscale is not None else dscale
    dshift = sum_partials(part_dshift, shift.dtype) if part_dshift is not None else None
    assert dgate is not None and dscale is not None
    return dresidual, dgate, dbranch, dshift, dscale


def _backward_in_two(
    dx_new: Tensor | None,
    dy: Tensor,
    x_new: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    branch: Tensor,
    shift: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Long fp32 rows, for which one kernel has too few registers: the norm, then the gate."""
    dresidual, dshift, dscale, _, _ = layer_norm_modulate.backward(
        dy, x_new, mean, rstd, shift, scale, None, None, False
    )
    if dx_new is not None:
        dresidual += dx_new
    return dresidual, *gate_residual.backward(dresidual, gate, branch, True, True), dshift, dscale


def _compile(D: int, dtype: torch.dtype, per_token: bool) -> None:
    B, T = 8, 256
    x = torch.empty(B, T, D, dtype=dtype, device="meta")
    stat = torch.empty(B, T, device="meta")
    v = x if per_token else torch.empty(B, 6 * D, dtype=dtype, device="meta")[:, :D]
    for per_thread in per_thread_choices(D, FORWARD_PER_THREAD):
        forward(x, v, x, v, v, 1e-6, per_thread)
    for per_thread in per_thread_choices(D, BACKWARD_PER_THREAD):
        backward(x, x, x, stat, stat, v, x, v, v, per_thread)
        backward(None, x, x, stat, stat, v, x, v, v, per_thread)


COMPILE_CASES = {
    f"gate_residual_layer_norm_modulate-{D}-{long_name(dtype)}-{'token' if per_token else 'sample'}"
    f"{'-unaligned' if D % 8 else ''}": partial(_compile, D, dtype, per_token)
    for D, dtype, per_token in (
        *((D, torch.bfloat16, False) for D in (128, 384, 768, 1152, 3072, 6144)),
        *((1152, dtype, False) for dtype in (torch.float16, torch.float32)),
        (1152, torch.bfloat16, True),
        (6144, torch.float32, False),
        (37, torch.float16, False),
    )
}
