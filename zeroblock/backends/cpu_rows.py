"""residual_norm_modulate by the native CPU kernels. Import this module only when the extension is loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import KERNELS
from .._layout import dense_rows
from .._version import NAMESPACE
from .base import MaybeTensor
from .reference import Reference
from .residual_norm import Branch, Needed, Norm, ResidualNorm, ResidualNormGrads, Rows, Stats

_native = getattr(torch.ops, NAMESPACE)
_forward = _native._residual_norm_modulate.default
_backward = _native._residual_norm_modulate_bwd.default
_DTYPE_IDS = {dtype: i for i, dtype in enumerate(KERNELS)}  # their places in ZB_DTYPES
_takes = frozenset(KERNELS).issuperset


def _rows(a: Rows) -> tuple[MaybeTensor, MaybeTensor]:
    return dense_rows(a.rows), a.table


def _gate(branch: Branch | None) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor, bool, bool, MaybeTensor]:
    """branch, gate, table, tanh, rms, weight"""
    if branch is None:
        return None, None, None, False, False, None
    return branch.branch.contiguous(), *_rows(branch.gate), branch.tanh, branch.rms, branch.weight


def _modulation(norm: Norm | None) -> tuple[MaybeTensor, ...]:
    if norm is None:
        return (None,) * 6
    return norm.weight, norm.bias, *_rows(norm.shift), *_rows(norm.scale)


def _row_dtypes(branch: Branch | None, norm: Norm | None) -> list[torch.dtype]:
    rows = [branch.branch, branch.gate.rows] if branch is not None else []
    rows += [norm.shift.rows, norm.scale.rows] if norm is not None else []
    return [t.dtype for t in rows if t is not None]


class CpuRows(Reference):
    def residual_norm_modulate(
        self, residual: Tensor, branch: Branch | None, norm: Norm | None, index: MaybeTensor
    ) -> ResidualNorm:
        x_dtype = residual.dtype if branch is None else branch.dtype
        y_dtype = x_dtype if norm is None else norm.dtype
        if not _takes((residual.dtype, x_dtype, y_dtype, *_row_dtypes(branch, norm))):
            return super().residual_norm_modulate(residual, branch, norm, index)
        x_new, y, *stats = _forward(
            residual.contiguous(),
            *_gate(branch),
            0.0 if branch is None else branch.eps,
            0 if norm is None else 2 if norm.rms else 1,
            *_modulation(norm),
            index,
            0.0 if norm is None else norm.eps,
            _DTYPE_IDS[x_dtype],
            _DTYPE_IDS[y_dtype],
        )
        return ResidualNorm(x_new, y, Stats(*stats))

    def residual_norm_modulate_bwd(
        self,
        dx_new: MaybeTensor,
        dy: MaybeTensor,
        x: MaybeTensor,
        stats: Stats,
        branch: Branch | None,
        norm: Norm | None,
        index: MaybeTensor,
        residual_dtype: torch.dtype,
        needed: Needed,
    ) -> ResidualNormGrads:
        x = dx_new if x is None else x
        assert x is not None
        dtypes = [t.dtype for t in (dx_new, dy, x) if t is not None]
        if not _takes((*dtypes, residual_dtype, *_row_dtypes(branch, norm))):
            rest = (branch, norm, index, residual_dtype, needed)
            return super().residual_norm_modulate_bwd(dx_new, dy, x, stats, *rest)
        grads = _backward(
            None if dx_new is None else dx_new.contiguous(),
            None if dy is None else dy.contiguous(),
            x.contiguous(),
            *stats,
            *_gate(branch),
            *_modulation(norm),
            index,
            _DTYPE_IDS[residual_dtype],
            sum(1 << i for i, n in enumerate(needed) if n),
        )
        return ResidualNormGrads(*grads)
