"""residual_norm_modulate backward: one pass over the rows, then the sums of what rows share.

math    With u = dy, or da = dy * (1 + scale) where the scale is per token, and g = da * weight:
        dx = dx_new + rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g) for RMSNorm; dresidual = dx.
        With hhat the normalised branch (the branch where it has no norm) and n = act(gate) * weight_b:
        dbranch = dx * n, and through the norm rstd_b * (dx * n - hhat * mean(dx * n * hhat)).
        What is per token has its gradient written at once: dshift = dy, dscale = dy * a with a the affine norm, dgate =
        act'(gate) * dx * weight_b * hhat. All else comes from sums over the tokens of a group, those that take one row:
        a sample, or the tokens of a sample with one index.

  sum             gives, by `finish`                       needed for
  dy              dshift, dscale (its bias term), dbias    a shift or table; bias
  u * xhat        dscale, dweight                          weight, or a scale that is not per token
  u               dbias                                    bias with a per-token scale
  dy * a          dscale_table                             the table of a per-token scale
  v * hhat        dgate, dbranch_weight                    v is dx, or dx * act(gate) where the gate is per token
  dgate           dgate_table                              the table of a per-token gate

        Tables, affine parts and rows of all tokens add up the groups in fp32, before anything is narrowed.
grid    chunks of all samples; a program takes `steps` tiles of ROWS rows. Reads dx_new, dy, x_new and branch, writes
        dresidual and dbranch: 6ns bytes, 3ns without a branch. Where registers are too few for so many sums of so long
        rows, two passes, the norm's and the branch's, with what goes between them in fp32: 8n bytes more.
order   a program adds its rows in order into one partial sum per column, [B, P, D] in fp32; `finish` adds the P of a
        group, `sum_partials` the groups. No atomics. 8D bytes per program and sum.
        Indexed: tokens are taken in the order of a stable sort of the index, one at a time. Where the row changes from
        k, chunk c writes its sums into slot c + k of chunks + K - 1: in sorted order neither goes back, so that no slot
        is written twice. Row k then adds the slots of the chunks that its tokens lie in.
zero    none, the kernel takes no flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._modulation import (
    INDEXED,
    Branch,
    Norm,
    Rows,
    activated,
    cached_shared_row,
    index_of,
    kind_of,
    of_tokens,
    rows_of_a_sample,
    strides,
)
from ._row_tiles import BACKWARD_PER_THREAD, LEAST_ROWS, MAX_TUNED_D, backward_stages, tile
from ._rows import PER_SAMPLE, PER_TOKEN, cached_row, cdiv, row_norm_grad, token_rows
from .residual_norm_modulate import COMPILED, case_name, example
from .residual_norm_modulate_sums import Grads, Want, Wants, finish, in_order, needed_sums

# Programs aimed for, enough to fill a GPU (guess), and rows of a program at most: where tokens are many, partial sums
# are 3 % of the bytes or less (python -m tests.triton.traffic_cases).
PROGRAMS, MOST_ROWS = 256, 256


@triton.jit
def _flushed(part, total, slot, d, D, ends):
    """`total`, or 0 where the sum ends here and goes into its slot."""
    if part is not None:
        tl.store(part + slot * D + d, tl.sum(total, 0), mask=(d < D) & ends)
        return tl.where(ends, 0.0, total)
    else:
        return total


@triton.jit
def _backward(
    dx_new,
    dy,
    x,
    mean,
    rstd,
    branch_rstd,
    branch,
    gate,
    gate_table,
    branch_weight,
    weight,
    bias,
    scale,
    scale_table,
    index,
    order,
    dresidual,
    dbranch,
    dgate,
    dshift,
    dscale,
    part_dy,
    part_uxhat,
    part_u,
    part_dscale,
    part_branch,
    part_dgate,
    T,
    D,
    K,
    programs,
    steps,
    slots,
    gate_b,
    gate_t,
    scale_b,
    scale_t,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
    TANH: tl.constexpr,
    RMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = (tl.program_id(0) // programs).to(tl.int64)
    chunk = (tl.program_id(0) % programs).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    sum_dy = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_uxhat = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_u = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_dscale = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_branch = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_dgate = tl.zeros([ROWS, BLOCK_D], tl.float32)
    slot = b * slots + chunk
    current = tl.full([], -1, tl.int64)  # the row whose tokens are being summed
    for step in tl.range(0, steps, num_stages=STAGES):
        t, mask, at = token_rows(b, chunk * steps + step, T, d, D, ROWS)
        row, k = b * T + tl.minimum(t, T - 1), t
        if index is not None:  # ROWS is 1
            t = tl.load(order + row)
            row = b * T + t
            at = row[:, None] * D + d[None, :]
            k = index_of(index, b, t, T, K, False)
            taken = tl.max(k, 0)
            ends = (taken != current) & (current >= 0)
            sum_dy = _flushed(part_dy, sum_dy, slot + current, d, D, ends)
            sum_uxhat = _flushed(part_uxhat, sum_uxhat, slot + current, d, D, ends)
            sum_u = _flushed(part_u, sum_u, slot + current, d, D, ends)
            sum_dscale = _flushed(part_dscale, sum_dscale, slot + current, d, D, ends)
            sum_branch = _flushed(part_branch, sum_branch, slot + current, d, D, ends)
            sum_dgate = _flushed(part_dgate, sum_dgate, slot + current, d, D, ends)
            current = taken
        # What rows share is read again for every row, from cache: no registers are left to keep it in.
        if dy is not None:
            g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
            row_rstd = tl.load(rstd + row)
            xhat = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            if not RMS:  # beyond D, g is 0: what xhat is there does not matter
                xhat -= tl.load(mean + row)[:, None]
            xhat *= row_rstd[:, None]
            if dshift is not None:
                tl.store(dshift + at, g, mask=mask)
            if part_dy is not None:
                sum_dy += g
            u = g
            scale_row = cached_shared_row(scale, scale_table, b, scale_b, d, D, steps, SCALE)
            g *= 1.0 + of_tokens(scale, scale_row, b, t, k, scale_b, scale_t, d, mask, SCALE)
            if SCALE == 2:
                if dscale is not None or part_dscale is not None:
                    a = xhat
                    if weight is not None:
                        a *= cached_row(weight, d, D, steps)
                    if bias is not None:
                        a += cached_row(bias, d, D, steps)
                    a *= u
                    if dscale is not None:
                        tl.store(dscale + at, a, mask=mask)
                    if part_dscale is not None:
                        sum_dscale += a
                u = g
            if part_uxhat is not None:
                sum_uxhat += u * xhat
            if part_u is not None:
                sum_u += u
            if weight is not None:
                g *= cached_row(weight, d, D, steps)
            dx = row_norm_grad((g,), (xhat,), row_rstd, D, RMS, 0)[0]
            if dx_new is not None:
                dx += tl.load(dx_new + at, mask=mask, other=0.0).to(tl.float32)
        else:
            dx = tl.load(dx_new + at, mask=mask, other=0.0).to(tl.float32)
        if dresidual is not None:
            tl.store(dresidual + at, dx, mask=mask)
        if branch is not None:
            h = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
            if branch_rstd is not None:
                h_rstd = tl.load(branch_rstd + row)
                h *= h_rstd[:, None]
            if GATE != 2 and part_branch is not None:
                sum_branch += dx * h
            v = dx
            if gate is not None or gate_table is not None:
                gate_row = cached_shared_row(gate, gate_table, b, gate_b, d, D, steps, GATE)
                z = activated(of_tokens(gate, gate_row, b, t, k, gate_b, gate_t, d, mask, GATE), TANH)
                v *= z
            if GATE == 2:
                if dgate is not None or part_dgate is not None:
                    product = dx * h
                    if branch_weight is not None:
                        product *= cached_row(branch_weight, d, D, steps)
                    if TANH:
                        product *= 1.0 - z * z
                    if dgate is not None:
                        tl.store(dgate + at, product, mask=mask)
                    if part_dgate is not None:
                        sum_dgate += product
                if part_branch is not None:
                    sum_branch += v * h
            if dbranch is not None:
                if branch_weight is not None:
                    v *= cached_row(branch_weight, d, D, steps)
                if branch_rstd is not None:
                    v = row_norm_grad((v,), (h,), h_rstd, D, True, 0)[0]
                tl.store(dbranch + at, v, mask=mask)
    if index is not None:
        slot += current
    _flushed(part_dy, sum_dy, slot, d, D, True)
    _flushed(part_uxhat, sum_uxhat, slot, d, D, True)
    _flushed(part_u, sum_u, slot, d, D, True)
    _flushed(part_dscale, sum_dscale, slot, d, D, True)
    _flushed(part_branch, sum_branch, slot, d, D, True)
    _flushed(part_dgate, sum_dgate, slot, d, D, True)


def backward_steps(B: int, T: int, rows: int) -> int:
    """Tiles of `rows` rows that a program takes."""
    wanted = min(MOST_ROWS, max(LEAST_ROWS, B * T // PROGRAMS))
    return max(1, min(wanted // rows, cdiv(T, rows)))


def _holds(sums: dict[str, bool], branch: Branch, dtype: torch.dtype, index: Tensor | None) -> bool:
    """Whether a program has the registers for the gradients of norm and branch at once, so many sums among them
    (spills: python -m tests.triton.static). Rows longer than MAX_TUNED_D are not in that table: the usual forms spill
    16 bytes on sm_120, rare ones (per token, affine, with tables) more than 100."""
    count, half, per_token = sum(sums.values()), dtype != torch.float32, sums["part_dscale"] or sums["part_dgate"]
    if branch.branch.shape[-1] <= MAX_TUNED_D:
        return count <= 4 if half else count <= 3 and not per_token
    return half and count <= 3 and not (branch.rms or per_token or index is not None)


def _folded(v: Rows, kind: int) -> Rows:
    """A row per sample and its table in one, [B, D]: a program then has one of both in registers (long rows)."""
    return Rows(v.rows.float() + v.table) if v.rows is not None and v.table is not None and kind == PER_SAMPLE else v


def backward(
    dx_new: Tensor | None,
    dy: Tensor | None,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    branch_rstd: Tensor | None,
    branch: Branch | None,
    norm: Norm | None,
    index: Tensor | None,
    dtype: torch.dtype,
    needed: Sequence[bool],
) -> Grads:
    """x is what the norm was of; dtype that of the residual; needed as in Grads. dx_new, dy and x are dense; where no
    gradient reaches y, dy and norm are None; the index as in forward."""
    like_x = branch.branch if branch is not None else x
    assert like_x is not None and (norm is None) == (dy is None)
    B, T, D = like_x.shape
    gate = Rows() if branch is None else branch.gate
    shift, scale = (Rows(), Rows()) if norm is None else (norm.shift, norm.scale)
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    branch_weight = None if branch is None else branch.weight
    K = rows_of_a_sample(index, gate, shift, scale)
    index = None if K is None else index
    GATE, SHIFT, SCALE = (kind_of(v, index) for v in (gate, shift, scale))
    need = Grads(*needed)
    wants = Wants(
        gate=Want.of(gate, GATE, need.gate, need.gate_table),
        shift=Want.of(shift, SHIFT, need.shift, need.shift_table),
        scale=Want.of(scale, SCALE, need.scale, need.scale_table),
        branch_weight=bool(need.branch_weight) and branch_weight is not None,
        weight=bool(need.weight) and weight is not None,
        bias=bool(need.bias) and bias is not None,
    )
    sums = needed_sums(wants, GATE, SCALE, bias is not None)
    if branch is not None and norm is not None and not _holds(sums, branch, like_x.dtype, index):
        first = [True, *[False] * 4, *needed[5:]]
        norms = backward(dx_new, dy, x, mean, rstd, None, None, norm, index, torch.float32, first)
        dx = norms.residual
        branches = backward(dx, None, None, None, None, branch_rstd, branch, None, index, dtype, needed)
        return Grads(*branches[:5], *norms[5:])
    # Long rows: half as many threads, each with twice the registers (spills: python -m tests.triton.static).
    together = branch is not None and norm is not None
    per_thread = (max if D > MAX_TUNED_D and together else min)(BACKWARD_PER_THREAD)
    rows, block, warps = tile(D, per_thread)
    if index is not None:
        rows, warps = 1, max(1, block // (32 * per_thread))
    steps = backward_steps(B, T, rows)
    programs = cdiv(T, rows * steps)
    slots = programs if K is None else programs + K - 1

    size = B, slots, D
    parts = {name: like_x.new_empty(size, dtype=torch.float32) if wanted else None for name, wanted in sums.items()}
    dresidual = like_x.new_empty(like_x.shape, dtype=dtype) if need.residual else None
    dbranch = torch.empty_like(branch.branch) if branch is not None and need.branch else None
    dgate, dshift, dscale = (
        v.rows.new_empty(v.rows.shape) if v.rows is not None and (want.tokens or want.rows) else None
        for v, want in ((gate, wants.gate), (shift, wants.shift), (scale, wants.scale))
    )
    order = bounds = None
    if index is not None and K is not None:
        order, bounds = in_order(index, K)
    read_gate, read_scale = (_folded(v, kind) if D > MAX_TUNED_D else v for v, kind in ((gate, GATE), (scale, SCALE)))
    (gate_b, gate_t), (scale_b, scale_t) = strides(read_gate), strides(read_scale)
    operands = ((read_gate.rows, GATE), (read_scale.rows, SCALE))
    of_their_own = [v for v, kind in operands if kind in (PER_TOKEN, INDEXED)]
    streamed = [v for v in (dx_new, dy, x, like_x if branch is not None else None, *of_their_own) if v is not None]
    stages = backward_stages(rows, block, *streamed)
    if branch is not None and branch.rms and stages > 1:
        stages -= 1  # the norm of the branch takes the registers in which AMD holds a tile ahead (spills: the same)
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
        gate=read_gate.rows,
        gate_table=read_gate.table,
        branch_weight=branch_weight,
        weight=weight,
        bias=bias,
        scale=read_scale.rows,
        scale_table=read_scale.table,
        index=index,
        order=order,
        dresidual=dresidual,
        dbranch=dbranch,
        dgate=dgate if wants.gate.tokens else None,
        dshift=dshift if wants.shift.tokens else None,
        dscale=dscale if wants.scale.tokens else None,
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
        STAGES=stages,
    )
    shared = finish(parts, bounds, branch, norm, K, steps, slots, index, wants, dgate, dshift, dscale)
    return shared._replace(residual=dresidual, branch=dbranch)


def _compile(*case: Any) -> None:
    branch, norm, index = example(*case)
    x = branch.branch
    stat = x.new_empty(x.shape[:2], dtype=torch.float32)
    stats = stat, stat, stat if branch.rms else None
    backward(x, x, x, *stats, branch, norm, index, x.dtype, [True] * len(Grads._fields))


COMPILE_CASES = {case_name("residual_norm_modulate_bwd", *case): partial(_compile, *case) for case in COMPILED}
