"""residual_norm_modulate by the native CPU kernels. Import this module only when the extension is loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from .._version import NAMESPACE
from .base import MaybeTensor
from .reference import Reference
from .residual_norm import (
    Branch,
    Needed,
    Norm,
    ResidualNorm,
    ResidualNormGrads,
    Stats,
    native_backward,
    native_forward,
    row_dtypes,
    takes,
)

_native = getattr(torch.ops, NAMESPACE)
_forward = _native._residual_norm_modulate.default
_backward = _native._residual_norm_modulate_bwd.default


class CpuRows(Reference):
    def residual_norm_modulate(
        self, residual: Tensor, branch: Branch | None, norm: Norm | None, index: MaybeTensor
    ) -> ResidualNorm:
        x_dtype = residual.dtype if branch is None else branch.dtype
        y_dtype = x_dtype if norm is None else norm.dtype
        if not takes(residual.dtype, x_dtype, y_dtype, *row_dtypes(branch, norm)):
            return super().residual_norm_modulate(residual, branch, norm, index)
        return native_forward(_forward, residual, branch, norm, index, x_dtype, y_dtype)

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
        if not takes(*dtypes, residual_dtype, *row_dtypes(branch, norm)):
            rest = (branch, norm, index, residual_dtype, needed)
            return super().residual_norm_modulate_bwd(dx_new, dy, x, stats, *rest)
        return native_backward(_backward, dx_new, dy, x, stats, branch, norm, (index,), residual_dtype, needed)
