"""The sums of residual_norm_modulate's backward: which are needed, and what their second stage makes of them.

math    `residual_norm_modulate_bwd.py`, where the sums are listed, has left partial sums in slots. `_finish` adds those
        of a group (a sample, or the tokens of a sample that take one indexed row), writes the gradients of its rows,
        and its addends to the gradients that all groups share: tables, affine parts, rows of all tokens.
grid    (groups, blocks of D).
order   the slots of a group as in `_reduce.column_sums`, then the groups likewise (`sum_partials`). No atomics.
zero    none, the kernel takes no flag.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._modulation import Branch, Norm, Rows, activated, kind_of, strides
from ._reduce import COLUMNS, LANES, column_sums, sum_partials
from ._rows import PER_TOKEN, cdiv

FINISH_WARPS = 8  # as in layer_norm_modulate


class Grads(NamedTuple):
    """In the dtypes of the operands; None where absent or not asked for."""

    residual: Tensor | None = None
    branch: Tensor | None = None
    gate: Tensor | None = None
    gate_table: Tensor | None = None
    branch_weight: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    shift: Tensor | None = None
    shift_table: Tensor | None = None
    scale: Tensor | None = None
    scale_table: Tensor | None = None


class Want(NamedTuple):
    """Which gradients of an operand are wanted: of rows per token, of rows per group, of what all groups share."""

    tokens: bool
    rows: bool
    row: bool  # of all tokens
    table: bool

    @classmethod
    def of(cls, v: Rows, kind: int, rows: object, table: object) -> Want:
        rows, one = bool(rows) and v.rows is not None, v.rows is not None and v.rows.dim() == 1
        per_token = kind == PER_TOKEN
        return cls(
            rows and per_token, rows and not per_token and not one, rows and one, bool(table) and v.table is not None
        )

    @property
    def shared(self) -> bool:
        return self.row or self.table

    @property
    def summed(self) -> bool:
        return self.rows or self.shared


class Wants(NamedTuple):
    gate: Want
    shift: Want
    scale: Want
    branch_weight: bool
    weight: bool
    bias: bool


def needed_sums(wants: Wants, gate: int, scale: int, has_bias: bool) -> dict[str, bool]:
    """Which sums the wanted gradients take; gate, scale: the kinds of these operands."""
    per_token, gate_per_token = scale == PER_TOKEN, gate == PER_TOKEN
    dscale = wants.scale.summed and not per_token
    return {
        "part_dy": wants.shift.summed or (not per_token and (wants.bias or (dscale and has_bias))),
        "part_uxhat": wants.weight or dscale,
        "part_u": wants.bias and per_token,
        "part_dscale": wants.scale.table and per_token,
        "part_branch": wants.branch_weight or (wants.gate.summed and not gate_per_token),
        "part_dgate": wants.gate.table and gate_per_token,
    }


def in_order(index: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """(tokens in the order of their rows [B, T], where in it the tokens of row k begin [B, K + 1])."""
    ordered, order = index.clamp(0, K - 1).sort(dim=1, stable=True)
    rows = torch.arange(K + 1, dtype=index.dtype, device=index.device).expand(len(index), -1).contiguous()
    return order, torch.searchsorted(ordered, rows, out_int32=True)


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
    part_dy,
    part_uxhat,
    part_u,
    part_dscale,
    part_branch,
    part_dgate,
    bounds,
    gate,
    gate_table,
    branch_weight,
    weight,
    bias,
    scale,
    scale_table,
    dgate,
    dshift,
    dscale,
    all_dgate,
    all_dbranch_weight,
    all_dweight,
    all_dbias,
    all_dshift,
    all_dscale,
    D,
    K,
    steps,
    slots,
    gate_b,
    gate_k,
    scale_b,
    scale_k,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
    TANH: tl.constexpr,
):
    """The gradients of the rows of group (b, k), and what it adds to those that all groups share."""
    b = (tl.program_id(0) // K).to(tl.int64)
    k = (tl.program_id(0) % K).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    at = (b * K + k) * D + d
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


def finish(
    parts: dict[str, Tensor | None],
    bounds: Tensor | None,
    branch: Branch | None,
    norm: Norm | None,
    K: int | None,
    steps: int,
    slots: int,
    index: Tensor | None,
    wants: Wants,
    dgate: Tensor | None,
    dshift: Tensor | None,
    dscale: Tensor | None,
) -> Grads:
    """All gradients but those of residual and branch; dgate, dshift, dscale, of rows, are written where per group."""
    like = next((part for part in parts.values() if part is not None), None)
    if like is None:
        return Grads(gate=dgate, shift=dshift, scale=dscale)
    B, _, D = like.shape
    groups = B * (K or 1)
    gate = Rows() if branch is None else branch.gate
    shift, scale = (Rows(), Rows()) if norm is None else (norm.shift, norm.scale)
    branch_weight = None if branch is None else branch.weight
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    (gate_b, gate_k), (scale_b, scale_k) = strides(gate), strides(scale)
    shared = {
        "all_dgate": wants.gate.shared,
        "all_dbranch_weight": wants.branch_weight,
        "all_dweight": wants.weight,
        "all_dbias": wants.bias,
        "all_dshift": wants.shift.shared,
        "all_dscale": wants.scale.shared,
    }
    addends = {name: like.new_empty(1, groups, D) if wanted else None for name, wanted in shared.items()}
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
        dgate=dgate if wants.gate.rows else None,
        dshift=dshift if wants.shift.rows else None,
        dscale=dscale if wants.scale.rows else None,
        **addends,
        D=D,
        K=K or 1,
        steps=steps,
        slots=slots,
        gate_b=gate_b,
        gate_k=gate_k,
        scale_b=scale_b,
        scale_k=scale_k,
        BLOCK_P=LANES,
        BLOCK_D=COLUMNS,
        GATE=kind_of(gate, index),
        SCALE=kind_of(scale, index),
        TANH=branch is not None and branch.tanh,
    )

    def total(name: str, operand: Tensor | None, wanted: bool) -> Tensor | None:
        addend = addends[name]
        return sum_partials(addend, operand.dtype)[0] if wanted and addend is not None and operand is not None else None

    return Grads(
        gate=total("all_dgate", gate.rows, wants.gate.row) if dgate is None else dgate,
        gate_table=total("all_dgate", gate.table, wants.gate.table),
        branch_weight=total("all_dbranch_weight", branch_weight, wants.branch_weight),
        weight=total("all_dweight", weight, wants.weight),
        bias=total("all_dbias", bias, wants.bias),
        shift=total("all_dshift", shift.rows, wants.shift.row) if dshift is None else dshift,
        shift_table=total("all_dshift", shift.table, wants.shift.table),
        scale=total("all_dscale", scale.rows, wants.scale.row) if dscale is None else dscale,
        scale_table=total("all_dscale", scale.table, wants.scale.table),
    )
