"""layer_norm_modulate, rms_norm_modulate: a row norm and its modulation in one pass over x [B, T, D].

math    a = xhat * weight + bias with xhat the normalised row, y = a * (1 + scale) + shift; statistics in fp32, the mean
        first, then the centred squares. mean and rstd [B, T] are saved for backward (RMSNorm: rstd alone).
grid    (row blocks, B); a program takes `steps` tiles of ROWS rows of one sample, each row read once and kept in
        registers; a per-sample shift or scale is read once per program. 2ns bytes (n numbers of s bytes). A row that
        a power of 2 holds badly lies in two parts (`_row_tiles.py`).
zero    none, the kernel takes no flag.

Backward, 3ns bytes, rows in parts where registers allow it. With da = dy * (1 + scale) and g = da * weight:
dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g) for RMSNorm. What rows share has its gradient from
sums over the rows of a sample:

  sum             gives, by `_finish`                            needed for
  dy              dshift, dscale (its bias term), dbias          a per-sample shift; bias
  u * xhat        dscale, dweight                                weight, or a per-sample scale
  u               dbias                                          bias with a per-token scale

  u is dy, or da where the scale is per token (dweight and dbias then have the scale in them already).

order   a program adds every ROWS-th row in order and then these ROWS sums, into one partial sum per column, [B, P, D]
        in fp32, while its next tiles are on their way into shared memory (STAGES); `_finish`, grid (blocks of
        D, B), adds the P of a sample (`_reduce.column_sums`), then dweight and dbias are added over the samples. No
        atomics. 8n / (rows of a program) bytes per sum.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import long_name
from ._launch import launch
from ._reduce import COLUMNS, LANES, column_sums, sum_partials
from ._row_tiles import (
    BACKWARD_PER_THREAD,
    FORWARD_PER_THREAD,
    backward_stages,
    backward_steps,
    backward_tile,
    forward_steps,
    forward_tile,
    per_thread_choices,
)
from ._rows import (
    NONE,
    PER_SAMPLE,
    PER_TOKEN,
    added,
    cached_row,
    cdiv,
    operand_rows,
    part_columns,
    row_norm_grad,
    row_statistics,
    sample_row,
    saved_statistics,
    saved_xhat,
    store_sums,
    token_rows,
    zeros_of_parts,
)

# The longest row that backward keeps in registers (spills: python -m tests.triton.static).
MAX_D = 8192
FINISH_WARPS = 8  # for three sums side by side (registers: python -m tests.triton.static)


def strides(v: Tensor | None) -> tuple[int, int]:
    """(between samples, between tokens) of a per-sample or per-token operand; the last dimension is dense."""
    return (0, 0) if v is None else (v.stride(0), v.stride(1) if v.dim() == 3 else 0)


@triton.jit
def _forward(
    x, shift, scale, weight, bias, y, mean, rstd, T, D, steps, shift_b, shift_t, scale_b, scale_t, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
    RMS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    PARTS: tl.constexpr = 2 if TAIL > 0 else 1
    shift_rows = ()
    scale_rows = ()
    for i in tl.static_range(PARTS):
        d = part_columns(i, BLOCK_D, TAIL)
        shift_rows = shift_rows + (sample_row(shift, b, shift_b, d, D, SHIFT),)
        scale_rows = scale_rows + (sample_row(scale, b, scale_b, d, D, SCALE),)
    for step in range(steps):
        block = tl.program_id(0).to(tl.int64) * steps + step
        row = ()
        for i in tl.static_range(PARTS):
            t, mask, at = token_rows(b, block, T, part_columns(i, BLOCK_D, TAIL), D, ROWS)
            row = row + (tl.load(x + at, mask=mask, other=0.0).to(tl.float32),)
        row_mean, row_rstd, centred = row_statistics(row, D, eps, RMS, x.dtype.element_ty != tl.float32, BLOCK_D, TAIL)
        for i in tl.static_range(PARTS):
            d = part_columns(i, BLOCK_D, TAIL)
            t, mask, at = token_rows(b, block, T, d, D, ROWS)
            value = centred[i] * row_rstd[:, None]
            if weight is not None:
                value *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            if bias is not None:
                value += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            value *= 1.0 + operand_rows(scale, scale_rows[i], b, t, scale_b, scale_t, d, mask, SCALE)
            value += operand_rows(shift, shift_rows[i], b, t, shift_b, shift_t, d, mask, SHIFT)
            tl.store(y + at, value, mask=mask)
        t = block * ROWS + tl.arange(0, ROWS)
        if not RMS:
            tl.store(mean + b * T + t, row_mean, mask=t < T)
        tl.store(rstd + b * T + t, row_rstd, mask=t < T)


def kind_of(v: Tensor | None) -> int:
    return NONE if v is None else PER_SAMPLE if v.dim() == 2 else PER_TOKEN


def forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    per_thread: int = FORWARD_PER_THREAD[0],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, mean, rstd) of a dense x; shift, scale [B, D] or [B, T, D] with dense rows; mean is None for RMS."""
    B, T, D = x.shape
    rows, block, tail, warps = forward_tile(D, per_thread, x.element_size())
    steps = forward_steps(B, T, rows)
    y = torch.empty_like(x)
    mean = None if rms else x.new_empty(B, T, dtype=torch.float32)
    rstd = x.new_empty(B, T, dtype=torch.float32)
    shift_b, shift_t = strides(shift)
    scale_b, scale_t = strides(scale)
    launch(
        _forward,
        (cdiv(T, rows * steps), B),
        num_warps=warps,
        x=x,
        shift=shift,
        scale=scale,
        weight=weight,
        bias=bias,
        y=y,
        mean=mean,
        rstd=rstd,
        T=T,
        D=D,
        steps=steps,
        shift_b=shift_b,
        shift_t=shift_t,
        scale_b=scale_b,
        scale_t=scale_t,
        eps=eps,
        ROWS=rows,
        BLOCK_D=block,
        TAIL=tail,
        SHIFT=kind_of(shift),
        SCALE=kind_of(scale),
        RMS=rms,
    )
    return y, mean, rstd


@triton.jit
def _backward(
    dy, x, mean, rstd, scale, weight, bias, dx, dscale, part_dy, part_uxhat, part_u, T, D, steps, scale_b, scale_t,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, SCALE: tl.constexpr, RMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    PARTS: tl.constexpr = 2 if TAIL > 0 else 1
    scale_rows = ()
    for i in tl.static_range(PARTS):
        scale_rows = scale_rows + (sample_row(scale, b, scale_b, part_columns(i, BLOCK_D, TAIL), D, SCALE),)
    sum_dy = zeros_of_parts(ROWS, BLOCK_D, TAIL)
    sum_uxhat = zeros_of_parts(ROWS, BLOCK_D, TAIL)
    sum_u = zeros_of_parts(ROWS, BLOCK_D, TAIL)
    for step in tl.range(0, steps, num_stages=STAGES):
        block = tl.program_id(0).to(tl.int64) * steps + step
        row_mean, row_rstd = saved_statistics(mean, rstd, b, block, T, ROWS, RMS)
        dys = ()
        us = ()
        uxhats = ()
        gs = ()
        xhats = ()
        for i in tl.static_range(PARTS):
            d = part_columns(i, BLOCK_D, TAIL)
            t, mask, at = token_rows(b, block, T, d, D, ROWS)
            u = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
            dys = dys + (u,)
            xhat = saved_xhat(x, row_mean, row_rstd, at, mask, RMS)
            g = u * (1.0 + operand_rows(scale, scale_rows[i], b, t, scale_b, scale_t, d, mask, SCALE))
            if SCALE == 2:
                a = xhat
                if weight is not None:
                    a *= cached_row(weight, d, D, steps)
                if bias is not None:
                    a += cached_row(bias, d, D, steps)
                tl.store(dscale + at, u * a, mask=mask)
                u = g
            us = us + (u,)
            uxhats = uxhats + (u * xhat,)
            if weight is not None:
                g *= cached_row(weight, d, D, steps)
            gs = gs + (g,)
            xhats = xhats + (xhat,)
        if part_dy is not None:
            sum_dy = added(sum_dy, dys, TAIL)
        if part_uxhat is not None:
            sum_uxhat = added(sum_uxhat, uxhats, TAIL)
        if part_u is not None:
            sum_u = added(sum_u, us, TAIL)
        dxs = row_norm_grad(gs, xhats, row_rstd, D, RMS, TAIL)
        for i in tl.static_range(PARTS):
            t, mask, at = token_rows(b, block, T, part_columns(i, BLOCK_D, TAIL), D, ROWS)
            tl.store(dx + at, dxs[i], mask=mask)
    at = (b * tl.num_programs(0) + tl.program_id(0)) * D
    store_sums(part_dy, sum_dy, at, D, BLOCK_D, TAIL)
    store_sums(part_uxhat, sum_uxhat, at, D, BLOCK_D, TAIL)
    store_sums(part_u, sum_u, at, D, BLOCK_D, TAIL)


@triton.jit
def _finish(
    part_dy,
    part_uxhat,
    part_u,
    weight,
    bias,
    scale,
    dshift,
    dscale,
    dweight,
    dbias,
    P,
    D,
    scale_b,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALE: tl.constexpr,
):
    """dshift, dscale of sample b, and what it adds to dweight and dbias."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    if part_dy is not None:
        dy = column_sums(part_dy, b, P, D, d, BLOCK_P, BLOCK_D)
    if part_uxhat is not None:
        uxhat = column_sums(part_uxhat, b, P, D, d, BLOCK_P, BLOCK_D)
    if dshift is not None:
        tl.store(dshift + b * D + d, dy, mask=inside)
    if dscale is not None:
        grad = uxhat
        if weight is not None:
            grad *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            grad += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32) * dy
        tl.store(dscale + b * D + d, grad, mask=inside)
    gain = 1.0
    if SCALE == 1:
        gain += tl.load(scale + b * scale_b + d, mask=inside, other=0.0).to(tl.float32)
    if dweight is not None:
        tl.store(dweight + b * D + d, uxhat * gain, mask=inside)
    if dbias is not None:
        u = column_sums(part_u, b, P, D, d, BLOCK_P, BLOCK_D) if part_u is not None else dy
        tl.store(dbias + b * D + d, u * gain, mask=inside)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    per_thread: int = BACKWARD_PER_THREAD[0],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dshift, dscale, dweight, dbias), each in the dtype of its operand; a per-token dshift is dy, left out."""
    B, T, D = x.shape
    kind, scale_rows = kind_of(scale), strides(scale)
    crowded = kind == PER_TOKEN or (kind == PER_SAMPLE and weight is not None)
    rows, block, tail, warps = backward_tile(D, per_thread, x.element_size(), crowded)
    steps = backward_steps(B, T, D, rows)
    programs = cdiv(T, rows * steps)
    dx = torch.empty_like(x)
    dshift = shift.new_empty(shift.shape) if shift is not None and shift.dim() == 2 else None
    dscale = None if scale is None else scale.new_empty(scale.shape)

    def partial(needed: bool) -> Tensor | None:
        return x.new_empty(B, programs, D, dtype=torch.float32) if needed else None

    per_token = kind == PER_TOKEN
    part_dy = partial(dshift is not None or (bias is not None and not per_token))
    part_uxhat = partial(weight is not None or kind == PER_SAMPLE)
    part_u = partial(bias is not None and per_token)
    streamed = (dy, x, scale) if per_token else (dy, x)
    launch(
        _backward,
        (programs, B),
        num_warps=warps,
        dy=dy,
        x=x,
        mean=mean,
        rstd=rstd,
        scale=scale,
        weight=weight,
        bias=bias,
        dx=dx,
        dscale=dscale if per_token else None,
        part_dy=part_dy,
        part_uxhat=part_uxhat,
        part_u=part_u,
        T=T,
        D=D,
        steps=steps,
        scale_b=scale_rows[0],
        scale_t=scale_rows[1],
        ROWS=rows,
        BLOCK_D=block,
        TAIL=tail,
        SCALE=kind,
        RMS=rms,
        STAGES=backward_stages(rows, block + tail, *streamed),
    )
    if part_dy is None and part_uxhat is None and part_u is None:
        return dx, dshift, dscale, None, None
    dweight, dbias = (None if v is None else x.new_empty(B, D, dtype=torch.float32) for v in (weight, bias))
    launch(
        _finish,
        (cdiv(D, COLUMNS), B),
        num_warps=FINISH_WARPS,
        part_dy=part_dy,
        part_uxhat=part_uxhat,
        part_u=part_u,
        weight=weight,
        bias=bias,
        scale=scale,
        dshift=dshift,
        dscale=None if per_token else dscale,
        dweight=dweight,
        dbias=dbias,
        P=programs,
        D=D,
        scale_b=scale_rows[0],
        BLOCK_P=LANES,
        BLOCK_D=COLUMNS,
        SCALE=kind,
    )
    if weight is not None and dweight is not None:
        dweight = sum_partials(dweight[None], weight.dtype)[0]
    if bias is not None and dbias is not None:
        dbias = sum_partials(dbias[None], bias.dtype)[0]
    return dx, dshift, dscale, dweight, dbias


def _compile(D: int, dtype: torch.dtype, modulation: str, affine: bool, rms: bool) -> None:
    def new(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    B, T = 8, 256
    x, row, stat = new(B, T, D), new(D), new(B, T, of=torch.float32)
    operand = {"none": None, "sample": new(B, 6 * D)[:, :D], "token": new(B, T, D)}[modulation]
    weight, bias = (row, None if rms else row) if affine else (None, None)
    for per_thread in per_thread_choices(D, FORWARD_PER_THREAD):
        forward(x, operand, operand, weight, bias, 1e-6, rms, per_thread)
    for per_thread in per_thread_choices(D, BACKWARD_PER_THREAD):
        backward(x, x, None if rms else stat, stat, operand, operand, weight, bias, rms, per_thread)


def _cases():
    half, full = torch.bfloat16, torch.float32
    yield from ((D, half, "sample", False, False) for D in (128, 384, 768, 1152, 1536, 3072, 6144))
    yield from ((1152, dtype, "sample", False, False) for dtype in (full, torch.float16))
    yield from ((6144, full, "sample", True, False), (1152, half, "token", True, False))
    yield from ((1152, half, "none", True, True), (3072, half, "token", False, True), (33, half, "sample", True, False))


def _name(D, dtype, modulation, affine, rms):
    op = "rms_norm_modulate" if rms else "layer_norm_modulate"
    return f"{op}-{D}-{long_name(dtype)}-{modulation}{'-affine' if affine else ''}{'-unaligned' if D % 8 else ''}"


COMPILE_CASES = {_name(*case): partial(_compile, *case) for case in _cases()}
