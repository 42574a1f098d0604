"""residual_norm_modulate backward: one pass over the rows, then the sums of what rows share.

math    With u = dy, or da = dy * (1 + scale) where the scale is per token, and g = da * weight:
        dx = dx_new + rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g) for RMSNorm; dresidual = dx.
        With hhat the normalised branch (the branch where it has no norm) and n = act(gate) * weight_b:
        dbranch = dx * n, and through the norm rstd_b * (dx * n - hhat * mean(dx * n * hhat)).
        What is per token has its gradient written at once: dshift = dy, dscale = dy * a with a the affine norm, dgate =
        act'(gate) * dx * weight_b * hhat. All else comes from sums over the tokens of a group, those that take one row:
        a sample, or the tokens of a sample with one index.

  sum             gives, by `_finish`                      needed for
  dy              dshift, dscale (its bias term), dbias    a shift or table; bias
  u * xhat        dscale, dweight                          weight, or a scale that is not per token
  u               dbias                                    bias with a per-token scale
  dy * a          dscale_table                             the table of a per-token scale
  v * hhat        dgate, dbranch_weight                    v is dx, or dx * act(gate) where the gate is per token
  dgate           dgate_table                              the table of a per-token gate

        Tables, affine parts and rows of all tokens add up the groups in fp32, before anything is narrowed.
grid    chunks of all samples; a program takes `steps` tiles of ROWS rows. Reads dx_new, dy, x_new and branch, writes
        dresidual and dbranch: 6ns bytes, 3ns without a branch.
order   a program adds its rows in order into one partial sum per column, [B, P, D] in fp32; `_finish` adds the P of a
        group, `sum_partials` the groups. No atomics. 8D bytes per program and sum.
        Indexed: tokens are taken in the order of a stable sort of the index, one at a time. Where the row changes from
        k, chunk c writes its sums into slot c + k of chunks + K - 1: in sorted order neither goes back, so that no slot
        is written twice. Row k then adds the slots of the chunks that its tokens lie in.
zero    none, the kernel takes no flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import long_name
from ._launch import launch
from ._modulation import (
    INDEXED,
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
from ._reduce import COLUMNS, LANES, column_sums, sum_partials
from ._rows import NONE, PER_TOKEN, cdiv, row_norm_grad, saved_xhat, token_rows
from .layer_norm_modulate import BACKWARD_PER_THREAD, LEAST_ROWS, MAX_TUNED_D, per_thread_choices, tile

# Programs aimed for, and rows of a program at most: then partial sums are 3 % of the bytes or less where tokens are many
# (python -m tests.triton.traffic_cases), and as many programs as fill a GPU. (guess)
PROGRAMS, MOST_ROWS = 256, 256
FINISH_WARPS = 8


class Grads(NamedTuple):
    """In the dtypes of the operands; None where absent or not asked for."""

    residual: Tensor | None
    branch: Tensor | None
    gate: Tensor | None
    gate_table: Tensor | None
    branch_weight: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    shift: Tensor | None
    shift_table: Tensor | None
    scale: Tensor | None
    scale_table: Tensor | None


@triton.jit
def _flushed(part, total, slot, d, D, ends):
    """`total`, or 0 where the sum ends here and goes into its slot."""
    if part is not None:
        tl.store(part + slot * D + d, total, mask=(d < D) & ends)
        return tl.where(ends, 0.0, total)
    else:
        return total


@triton.jit
def _backward(
    dx_new, dy, x, mean, rstd, branch_rstd, branch, gate, gate_table, branch_weight, weight, bias, scale, scale_table,
    index, order, dresidual, dbranch, dgate, dshift, dscale,
    part_dy, part_uxhat, part_u, part_dscale, part_branch, part_dgate,
    T, D, K, programs, steps, slots, gate_b, gate_t, scale_b, scale_t,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, GATE: tl.constexpr, SCALE: tl.constexpr, TANH: tl.constexpr,
    RMS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) // programs
    chunk = tl.program_id(0).to(tl.int64) % programs
    d = tl.arange(0, BLOCK_D)
    # Long rows leave no registers to keep the sample's gate and scale in: every row reads them again.
    LONG: tl.constexpr = BLOCK_D > 4096  # MAX_TUNED_D
    if not LONG:
        gate_row = shared_row(gate, gate_table, b, gate_b, d, D, GATE)
        scale_row = shared_row(scale, scale_table, b, scale_b, d, D, SCALE)
    sum_dy = tl.zeros([BLOCK_D], tl.float32)
    sum_uxhat = tl.zeros([BLOCK_D], tl.float32)
    sum_u = tl.zeros([BLOCK_D], tl.float32)
    sum_dscale = tl.zeros([BLOCK_D], tl.float32)
    sum_branch = tl.zeros([BLOCK_D], tl.float32)
    sum_dgate = tl.zeros([BLOCK_D], tl.float32)
    slot = b * slots + chunk
    current = tl.full([], -1, tl.int64)  # the row whose tokens are being summed
    for step in range(steps):
        t, mask, at = token_rows(b, chunk * steps + step, T, d, D, ROWS)
        k = t
        if index is not None:  # ROWS is 1
            inside = chunk * steps + step < T
            t = tl.load(order + b * T + t, mask=t < T, other=0).to(tl.int64)
            at = (b * T + t)[:, None] * D + d[None, :]
            k = index_of(index, b, t, T, K)
            row = tl.where(inside, tl.max(k, 0), current)
            ends = (row != current) & (current >= 0)
            sum_dy = _flushed(part_dy, sum_dy, slot + current, d, D, ends)
            sum_uxhat = _flushed(part_uxhat, sum_uxhat, slot + current, d, D, ends)
            sum_u = _flushed(part_u, sum_u, slot + current, d, D, ends)
            sum_dscale = _flushed(part_dscale, sum_dscale, slot + current, d, D, ends)
            sum_branch = _flushed(part_branch, sum_branch, slot + current, d, D, ends)
            sum_dgate = _flushed(part_dgate, sum_dgate, slot + current, d, D, ends)
            current = row
        if LONG:
            gate_row = shared_row(gate, gate_table, b, gate_b, d, D, GATE)
            scale_row = shared_row(scale, scale_table, b, scale_b, d, D, SCALE)
        if dy is not None:
            g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
            xhat, row_rstd = saved_xhat(x, mean, rstd, b, t, T, at, mask, RMS)
            if dshift is not None:
                tl.store(dshift + at, g, mask=mask)
            if part_dy is not None:
                sum_dy += tl.sum(g, 0)
            u = g
            g *= 1.0 + of_tokens(scale, scale_row, b, t, k, scale_b, scale_t, d, mask, SCALE)
            if SCALE == 2:
                if dscale is not None or part_dscale is not None:
                    a = xhat
                    if weight is not None:
                        a *= vector(weight, d, D)
                    if bias is not None:
                        a += vector(bias, d, D)
                    a *= u
                    if dscale is not None:
                        tl.store(dscale + at, a, mask=mask)
                    if part_dscale is not None:
                        sum_dscale += tl.sum(tl.where(mask, a, 0.0), 0)
                u = g
            if part_uxhat is not None:
                sum_uxhat += tl.sum(u * xhat, 0)
            if part_u is not None:
                sum_u += tl.sum(u, 0)
            if weight is not None:
                g *= vector(weight, d, D)
            dx = row_norm_grad(g, xhat, row_rstd, D, RMS)
            if dx_new is not None:
                dx += tl.load(dx_new + at, mask=mask, other=0.0).to(tl.float32)
        else:
            dx = tl.load(dx_new + at, mask=mask, other=0.0).to(tl.float32)
        if dresidual is not None:
            tl.store(dresidual + at, dx, mask=mask)
        if branch is not None:
            h = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
            if branch_rstd is not None:
                h_rstd = tl.load(branch_rstd + b * T + t, mask=t < T, other=0.0)
                h *= h_rstd[:, None]
            v = dx
            if gate is not None or gate_table is not None:
                z = activated(of_tokens(gate, gate_row, b, t, k, gate_b, gate_t, d, mask, GATE), TANH)
                v *= z
            if GATE == 2:
                if dgate is not None or part_dgate is not None:
                    product = dx * h
                    if branch_weight is not None:
                        product *= vector(branch_weight, d, D)
                    if TANH:
                        product *= 1.0 - z * z
                    if dgate is not None:
                        tl.store(dgate + at, product, mask=mask)
                    if part_dgate is not None:
                        sum_dgate += tl.sum(product, 0)
                if part_branch is not None:
                    sum_branch += tl.sum(v * h, 0)
            elif part_branch is not None:
                sum_branch += tl.sum(dx * h, 0)
            if dbranch is not None:
                if branch_weight is not None:
                    v *= vector(branch_weight, d, D)
                if branch_rstd is not None:
                    v = row_norm_grad(v, h, h_rstd, D, True)
                tl.store(dbranch + at, v, mask=mask)
    if index is not None:
        slot += current
    _flushed(part_dy, sum_dy, slot, d, D, True)
    _flushed(part_uxhat, sum_uxhat, slot, d, D, True)
    _flushed(part_u, sum_u, slot, d, D, True)
    _flushed(part_dscale, sum_dscale, slot, d, D, True)
    _flushed(part_branch, sum_branch, slot, d, D, True)
    _flushed(part_dgate, sum_dgate, slot, d, D, True)


@triton.jit
def _group_row(p, table, b, k, stride_b, stride_k, d, D, KIND: tl.constexpr):
    """[BLOCK_D] fp32: an operand for row k of sample b; not of an operand per token."""
    row = tl.zeros(d.shape, tl.float32)
    if KIND != 0:
        row += tl.load(p + b * stride_b + k * stride_k + d, mask=d < D, other=0.0).to(tl.float32)
    if table is not None:
        row += tl.load(table + d, mask=d < D, other=0.0).to(tl.float32)
    return row


@triton.jit
def _stored(p, groups, value, at, mask):
    """Writes the gradient of a group's row, and what it adds to a sum over all groups."""
    if p is not None:
        tl.store(p + at, value, mask=mask)
    if groups is not None:
        tl.store(groups + at, value, mask=mask)


@triton.jit
def _finish(
    part_dy, part_uxhat, part_u, part_dscale, part_branch, part_dgate, bounds,
    gate, gate_table, branch_weight, weight, bias, scale, scale_table, dgate, dshift, dscale,
    all_dgate, all_dbranch_weight, all_dweight, all_dbias, all_dshift, all_dscale,
    D, K, steps, slots, gate_b, gate_k, scale_b, scale_k,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, GATE: tl.constexpr, SCALE: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """The gradients of the rows of group (b, k), and what it adds to those that all groups share."""
    group = tl.program_id(0).to(tl.int64)
    b = group // K
    k = group % K
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    at = group * D + d
    first = b * slots
    count = slots
    if bounds is not None:
        begin = tl.load(bounds + b * (K + 1) + k)
        end = tl.load(bounds + b * (K + 1) + k + 1)
        first += begin // steps + k
        count = tl.where(end > begin, (end - 1) // steps - begin // steps + 1, 0)
    if part_dy is not None:
        dy = column_sums(part_dy + first * D, 0, count, D, d, BLOCK_P, BLOCK_D)
        _stored(dshift, all_dshift, dy, at, mask)
    if part_uxhat is not None:
        uxhat = column_sums(part_uxhat + first * D, 0, count, D, d, BLOCK_P, BLOCK_D)
    gain = 1.0
    if SCALE == 2:
        if part_dscale is not None:
            _stored(None, all_dscale, column_sums(part_dscale + first * D, 0, count, D, d, BLOCK_P, BLOCK_D), at, mask)
    else:
        gain += _group_row(scale, scale_table, b, k, scale_b, scale_k, d, D, SCALE)
        if dscale is not None or all_dscale is not None:
            grad = uxhat
            if weight is not None:
                grad *= tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
            if bias is not None:
                grad += tl.load(bias + d, mask=mask, other=0.0).to(tl.float32) * dy
            _stored(dscale, all_dscale, grad, at, mask)
    if all_dweight is not None:
        tl.store(all_dweight + at, gain * uxhat, mask=mask)
    if all_dbias is not None:
        if part_u is not None:
            tl.store(all_dbias + at, column_sums(part_u + first * D, 0, count, D, d, BLOCK_P, BLOCK_D), mask=mask)
        else:
            tl.store(all_dbias + at, gain * dy, mask=mask)
    if part_dgate is not None:
        _stored(None, all_dgate, column_sums(part_dgate + first * D, 0, count, D, d, BLOCK_P, BLOCK_D), at, mask)
    if part_branch is not None:
        vhhat = column_sums(part_branch + first * D, 0, count, D, d, BLOCK_P, BLOCK_D)
        z = 1.0
        if GATE != 2 and (gate is not None or gate_table is not None):
            z = activated(_group_row(gate, gate_table, b, k, gate_b, gate_k, d, D, GATE), TANH)
            if dgate is not None or all_dgate is not None:
                grad = vhhat
                if branch_weight is not None:
                    grad *= tl.load(branch_weight + d, mask=mask, other=0.0).to(tl.float32)
                if TANH:
                    grad *= 1.0 - z * z
                _stored(dgate, all_dgate, grad, at, mask)
        if all_dbranch_weight is not None:
            tl.store(all_dbranch_weight + at, z * vhhat, mask=mask)


def backward_steps(B: int, T: int, rows: int) -> int:
    """Tiles of `rows` rows that a program takes."""
    wanted = min(MOST_ROWS, max(LEAST_ROWS, B * T // PROGRAMS))
    return max(1, min(wanted // rows, cdiv(T, rows)))


class _Wanted(NamedTuple):
    """What of an operand has a gradient: its rows per token, its rows per group, its sum over all groups."""

    tokens: bool
    rows: bool
    groups: bool

    @property
    def any_group(self) -> bool:
        return self.rows or self.groups


def _wanted(v: Rows, kind: int, rows: bool, table: bool) -> _Wanted:
    rows, table = rows and v.rows is not None, table and v.table is not None
    of_all = v.rows is not None and v.rows.dim() == 1
    return _Wanted(rows and kind == PER_TOKEN, rows and kind != PER_TOKEN and not of_all, table or (rows and of_all))


def backward(
    dx_new: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    branch_rstd: Tensor | None,
    branch: Branch | None,
    norm: Norm | None,
    index: Tensor | None,
    dtype: torch.dtype,
    needed: Sequence[bool],
    per_thread: int = BACKWARD_PER_THREAD[0],
) -> Grads:
    """x is x_new, or the residual without a branch; dtype that of the residual; needed as in Grads. dx_new, dy (None
    where nothing comes from there) and x are dense; the index as in forward."""
    B, T, D = x.shape
    gate = Rows() if branch is None else branch.gate
    shift, scale = (Rows(), Rows()) if norm is None or dy is None else (norm.shift, norm.scale)
    weight, bias = (None, None) if norm is None or dy is None else (norm.weight, norm.bias)
    branch_weight = None if branch is None else branch.weight
    K = rows_of_a_sample(index, gate, shift, scale)
    index = None if K is None else index
    GATE, SHIFT, SCALE = (kind_of(v, index) for v in (gate, shift, scale))
    if D > MAX_TUNED_D:  # half as many threads, each with twice the registers (spills: python -m tests.triton.static)
        per_thread = max(BACKWARD_PER_THREAD)
    rows, block, warps = tile(D, per_thread)
    if index is not None:
        rows, warps = 1, max(1, block // (32 * per_thread))
    steps = backward_steps(B, T, rows)
    programs = cdiv(T, rows * steps)
    slots, groups = (programs, B) if K is None else (programs + K - 1, B * K)

    n = Grads(*needed)
    gates = _wanted(gate, GATE, bool(n.gate), bool(n.gate_table))
    shifts = _wanted(shift, SHIFT, bool(n.shift), bool(n.shift_table))
    scales = _wanted(scale, SCALE, bool(n.scale), bool(n.scale_table))
    need_weight, need_bias = bool(n.weight) and weight is not None, bool(n.bias) and bias is not None
    need_branch_weight = bool(n.branch_weight) and branch_weight is not None

    def part(wanted: bool) -> Tensor | None:
        return x.new_empty(B, slots, D, dtype=torch.float32) if wanted else None

    def like(v: Tensor | None, wanted: bool) -> Tensor | None:
        return v.new_empty(v.shape) if v is not None and wanted else None

    def over_groups(wanted: bool) -> Tensor | None:
        return x.new_empty(1, groups, D, dtype=torch.float32) if wanted else None

    per_token_scale, per_token_gate = SCALE == PER_TOKEN, GATE == PER_TOKEN
    of_scale = scales.any_group and not per_token_scale
    parts = {
        "part_dy": part(
            shifts.any_group or ((need_bias or (of_scale and bias is not None)) and not per_token_scale)
        ),
        "part_uxhat": part(need_weight or of_scale),
        "part_u": part(need_bias and per_token_scale),
        "part_dscale": part(scales.groups and per_token_scale),
        "part_branch": part(need_branch_weight or (gates.any_group and not per_token_gate)),
        "part_dgate": part(gates.groups and per_token_gate),
    }
    dresidual = x.new_empty(x.shape, dtype=dtype) if n.residual else None
    dbranch = None if branch is None else like(branch.branch, bool(n.branch))
    dgate = like(gate.rows, gates.tokens or gates.rows)
    dshift = like(shift.rows, shifts.tokens or shifts.rows)
    dscale = like(scale.rows, scales.tokens or scales.rows)
    order = bounds = None
    if index is not None and K is not None:
        ordered, order = index.clamp(0, K - 1).sort(dim=1, stable=True)
        values = torch.arange(K + 1, dtype=index.dtype, device=index.device).expand(B, -1).contiguous()
        bounds = torch.searchsorted(ordered, values, out_int32=True)
    (gate_b, gate_t), (scale_b, scale_t) = strides(gate), strides(scale)
    launch(
        _backward,
        (B * programs,),
        num_warps=warps,
        dx_new=dx_new,
        dy=dy,
        x=x,
        mean=mean,
        rstd=rstd,
        branch_rstd=branch_rstd,
        branch=None if branch is None else branch.branch,
        gate=gate.rows,
        gate_table=gate.table,
        branch_weight=branch_weight,
        weight=weight,
        bias=bias,
        scale=scale.rows,
        scale_table=scale.table,
        index=index,
        order=order,
        dresidual=dresidual,
        dbranch=dbranch,
        dgate=dgate if gates.tokens else None,
        dshift=dshift if shifts.tokens else None,
        dscale=dscale if scales.tokens else None,
        **parts,
        T=T,
        D=D,
        K=K,
        programs=programs,
        steps=steps,
        slots=slots,
        gate_b=gate_b,
        gate_t=gate_t,
        scale_b=scale_b,
        scale_t=scale_t,
        ROWS=rows,
        BLOCK_D=block,
        GATE=GATE,
        SCALE=SCALE,
        TANH=branch is not None and branch.tanh,
        RMS=norm is not None and norm.rms,
    )
    if all(v is None for v in parts.values()):
        return Grads(dresidual, dbranch, dgate, None, None, None, None, dshift, None, dscale, None)
    shared = {
        "all_dgate": over_groups(gates.groups),
        "all_dbranch_weight": over_groups(need_branch_weight),
        "all_dweight": over_groups(need_weight),
        "all_dbias": over_groups(need_bias),
        "all_dshift": over_groups(shifts.groups),
        "all_dscale": over_groups(scales.groups),
    }
    launch(
        _finish,
        (groups, cdiv(D, COLUMNS)),
        num_warps=FINISH_WARPS,
        **parts,
        bounds=bounds,
        gate=gate.rows,
        gate_table=gate.table,
        branch_weight=branch_weight,
        weight=weight,
        bias=bias,
        scale=scale.rows,
        scale_table=scale.table,
        dgate=dgate if gates.rows else None,
        dshift=dshift if shifts.rows else None,
        dscale=dscale if scales.rows else None,
        **shared,
        D=D,
        K=K or 1,
        steps=steps,
        slots=slots,
        gate_b=gate_b,
        gate_k=gate_t,
        scale_b=scale_b,
        scale_k=scale_t,
        BLOCK_P=LANES,
        BLOCK_D=COLUMNS,
        GATE=GATE,
        SCALE=SCALE,
        TANH=branch is not None and branch.tanh,
    )

    def summed(name: str, like: Tensor | None, wanted: object) -> Tensor | None:
        total = shared[name]
        return sum_partials(total, like.dtype)[0] if total is not None and like is not None and wanted else None

    return Grads(
        dresidual,
        dbranch,
        summed("all_dgate", gate.rows, not gates.rows and not gates.tokens and n.gate) if dgate is None else dgate,
        summed("all_dgate", gate.table, n.gate_table),
        summed("all_dbranch_weight", branch_weight, True),
        summed("all_dweight", weight, True),
        summed("all_dbias", bias, True),
        summed("all_dshift", shift.rows, n.shift) if dshift is None else dshift,
        summed("all_dshift", shift.table, n.shift_table),
        summed("all_dscale", scale.rows, n.scale) if dscale is None else dscale,
        summed("all_dscale", scale.table, n.scale_table),
    )
