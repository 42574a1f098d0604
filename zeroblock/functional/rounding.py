"""rounding="eager": what the operators of PyTorch compute one after another, each rounding its result, with operands of
every form that ours take."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from ..backends.base import MaybeTensor
from ..ops.residual_norm_modulate import RMS
from ..reference_rows import flat_index
from .frames import settled
from .general import Gated, Modulated, check_branch, check_norm, rows_of


def eager_gated(op: str, residual: Tensor, a: Gated, index: MaybeTensor) -> Tensor:
    """residual + act(gate) * norm_b(branch)."""
    _checks.tokens(op, "residual", residual)
    check_branch(op, a, residual.shape[2])
    branch = a.branch
    if a.norm == "rms":
        branch = F.rms_norm(branch, branch.shape[2:], a.weight, a.eps)
    elif a.weight is not None:
        branch = branch * a.weight
    gate = eager_rows(op, "gate", residual, a.gate, a.table, index)
    if gate is not None:
        branch = (gate.tanh() if a.activation == "tanh" else gate) * branch
    x_new = (residual + branch).contiguous()
    return x_new if a.dtype is None else x_new.to(a.dtype)


def eager_norm(op: str, x: Tensor, a: Modulated, index: MaybeTensor) -> Tensor:
    """As PyTorch's operators round, one after another: norm(x), 1 + scale, the product, the sum."""
    _checks.tokens(op, "x", x)
    check_norm(op, a, x.shape[2])
    size = x.shape[2:]
    if a.norm == RMS:
        y = F.rms_norm(x, size, a.weight, a.eps)
    else:
        y = F.layer_norm(x, size, a.weight, a.bias, a.eps)
    return eager_modulation(op, y, a, index).to(a.dtype or x.dtype)


def eager_modulation(op: str, y: Tensor, a: Modulated, index: MaybeTensor) -> Tensor:
    """y * (1 + scale) + shift of a normalised y."""
    shift = eager_rows(op, "shift", y, a.shift, a.shift_table, index)
    scale = eager_rows(op, "scale", y, a.scale, a.scale_table, index)
    y = y if scale is None else y * (1 + scale)
    return y if shift is None else y + shift


def eager_rows(op: str, arg: str, x: Tensor, rows: MaybeTensor, table: MaybeTensor, index: MaybeTensor) -> MaybeTensor:
    """rows + table in their own dtype, as they broadcast against x."""
    rows, table = rows_of(rows, table)
    if rows is not None and rows.shape == (1,):  # a gate for everything
        return rows if table is None else rows + table
    forms = settled(op, [x], {arg: rows}, index)
    (v,) = forms.rows
    if v is None:
        return None
    if v.dim() == 3 and forms.index is not None:
        v = F.embedding(flat_index(forms.index, v.shape[1]), v.flatten(0, 1))
    v = v[:, None] if v.dim() == 2 else v
    v = v if table is None else v + table
    return v if v.dim() == 1 else v.expand(forms.tokens[0].shape).reshape(forms.size)
