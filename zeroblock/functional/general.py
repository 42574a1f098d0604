"""Calls of the op residual_norm_modulate: the arguments of several public functions in its form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, ops, zero
from .. import reference as ref
from .._dtypes import FLOATING, FLOATING_NAMES
from ..backends.base import MaybeTensor
from ..ops.residual_norm_modulate import LAYER, NO_NORM, RMS, definition
from .frames import settled

NORMS = {"layer": LAYER, "rms": RMS}


class Gated(NamedTuple):
    """act(gate + table) * norm_b(branch), as a user gives it."""

    branch: Tensor
    gate: MaybeTensor = None
    table: MaybeTensor = None
    activation: str | None = None
    norm: str | None = None
    weight: MaybeTensor = None
    eps: float = 1e-6
    dtype: torch.dtype | None = None  # of x_new; None: promoted


class Modulated(NamedTuple):
    """norm(x) [* weight + bias] * (1 + scale + scale_table) + shift + shift_table, as a user gives it."""

    norm: int
    weight: MaybeTensor = None
    bias: MaybeTensor = None
    shift: MaybeTensor = None
    scale: MaybeTensor = None
    shift_table: MaybeTensor = None
    scale_table: MaybeTensor = None
    eps: float = 1e-6
    dtype: torch.dtype | None = None  # of y; None: that of x

    def tensors(self) -> dict[str, MaybeTensor]:
        tables = {"shift_table": self.shift_table, "scale_table": self.scale_table}
        return {"weight": self.weight, "bias": self.bias, "shift": self.shift, "scale": self.scale, **tables}


def residual_norm(
    op: str, residual: Tensor, gated: Gated | None, modulated: Modulated | None, index: MaybeTensor, mixed: bool
) -> tuple[Any, Any]:
    """(x_new, y); None what there is not. The tensors have been checked to be tensors of a floating dtype; mixed:
    whether of more than one."""
    name = "x" if gated is None else "residual"
    _checks.tokens(op, name, residual)
    D, tokens, rows = residual.shape[2], [residual], {}
    if gated is not None:
        check_branch(op, gated, D)
        if gated.branch.dim() != 3:
            _checks.same_shape(op, "branch", gated.branch, "residual", residual.shape)
        tokens.append(gated.branch)
        gate, gate_table = rows_of(gated.gate, gated.table)
        rows["gate"] = _wide(gate, D)
    if modulated is not None:
        check_norm(op, modulated, D)
        shift, shift_table = rows_of(modulated.shift, modulated.shift_table)
        scale, scale_table = rows_of(modulated.scale, modulated.scale_table)
        rows.update(shift=shift, scale=scale)
    forms = settled(op, tokens, rows, index)
    taken, x, branch = iter(forms.rows), forms.tokens[0], None
    wide = torch.float64
    branch_part: tuple[Any, ...] = (None, None, None, False, False, None, 0.0)
    x_dtype = residual.dtype
    if gated is not None:
        branch, gate = forms.tokens[1], next(taken)
        added = (residual, branch, gate, gate_table)
        if gated.dtype is not None:
            x_dtype = gated.dtype
        elif mixed:
            x_dtype = ref.promoted(*(t for t in added if t is not None))
        if mixed and any(t is not None and t.dtype == wide for t in (*added, gated.weight)):
            x, branch = x.double(), branch.double()
        rms = gated.norm == "rms"
        branch_part = (branch, gate, gate_table, gated.activation == "tanh", rms, gated.weight, float(gated.eps))
    norm_part: tuple[Any, ...] = (NO_NORM, *(None,) * 6)
    y_dtype, eps = x_dtype, 0.0
    if modulated is not None:
        shift, scale = next(taken), next(taken)
        y_dtype, eps = modulated.dtype or x_dtype, float(modulated.eps)
        norm_part = (modulated.norm, modulated.weight, modulated.bias, shift, shift_table, scale, scale_table)
        if mixed and x_dtype != wide and any(t is not None and t.dtype == wide for t in norm_part[1:]):
            if branch is None:
                x = x.double()
            else:  # the norm is wider than what it is of
                x_new, _ = residual_norm(op, residual, gated, None, index, True)
                modulated = modulated._replace(dtype=y_dtype)
                return x_new, residual_norm(op, x_new.double(), None, modulated, index, True)[1]
    arguments = (x, *branch_part, *norm_part, forms.index, eps, x_dtype, y_dtype)
    run = definition if zero.transforms_active() else ops.residual_norm_modulate
    x_new, y = run(*arguments)[:2]
    return None if gated is None else _view(x_new, forms.size), None if modulated is None else _view(y, forms.size)


def _view(t: MaybeTensor, size: torch.Size) -> Tensor:
    assert t is not None
    return t if t.shape == size else t.view(size)


def check_gated(op: str, residual: Any, a: Gated, norm: Modulated | None = None) -> bool:
    """That all are tensors of a floating dtype, on one device. Whether there is more than one dtype."""
    branch, gate, table, weight = a.branch, a.gate, a.table, a.weight
    if norm is None:
        return _checks.floating(
            op, 2, residual=residual, branch=branch, gate=gate, gate_table=table, branch_weight=weight
        )
    return _checks.floating(
        op,
        2,
        residual=residual,
        branch=branch,
        gate=gate,
        gate_table=table,
        branch_weight=weight,
        weight=norm.weight,
        bias=norm.bias,
        shift=norm.shift,
        scale=norm.scale,
        shift_table=norm.shift_table,
        scale_table=norm.scale_table,
    )


def rows_of(rows: MaybeTensor, table: MaybeTensor) -> tuple[MaybeTensor, MaybeTensor]:
    """A table without rows is a row for everything."""
    return (table, None) if rows is None else (rows, table)


def _wide(gate: MaybeTensor, D: int) -> MaybeTensor:
    """A gate [1] as a row, whose gradient is then summed in fp32 at least."""
    if gate is None or gate.dim() != 1 or gate.shape[0] != 1 or D == 1:
        return gate
    return gate.to(ref.compute_dtype(gate)).expand(D)


def check_branch(op: str, a: Gated, D: int) -> None:
    _checks.choice(op, "gate_activation", a.activation, (None, "tanh"))
    _checks.choice(op, "branch_norm", a.norm, (None, "rms"))
    if a.activation is not None and a.gate is None and a.table is None:
        raise _checks.fail(op, "gate_activation", "be None without a gate", repr(a.activation))
    _checks.shapes(op, (D,), "[D]", gate_table=a.table, branch_weight=a.weight)
    _checks.eps_value(op, a.eps)
    dtype(op, "out_dtype", a.dtype)


def check_norm(op: str, a: Modulated, D: int) -> None:
    _checks.shapes(op, (D,), "[D]", weight=a.weight, bias=a.bias, shift_table=a.shift_table, scale_table=a.scale_table)
    _checks.eps_value(op, a.eps)
    dtype(op, "y_dtype", a.dtype)


def dtype(op: str, arg: str, value: Any) -> None:
    if value is not None and value not in FLOATING:
        raise TypeError(f"{op}: {arg} must be {FLOATING_NAMES}, got {value!r}")
