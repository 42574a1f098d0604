"""residual_norm_modulate by the native CPU kernels. Import this module only when the extension is loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from .._version import NAMESPACE
from .base import MaybeTensor
from .reference import Reference
from .residual_norm import (
    DTYPE_IDS,
    Branch,
    Needed,
    Norm,
    ResidualNorm,
    ResidualNormGrads,
    Stats,
    native_branch,
    native_norm,
    needed_bits,
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
        x_new, y, *stats = _forward(
            residual.contiguous(),
            *native_branch(branch),
            0.0 if branch is None else branch.eps,
            0 if norm is None else 2 if norm.rms else 1,
            *native_norm(norm),
            index,
            0.0 if norm is None else norm.eps,
            DTYPE_IDS[x_dtype],
            DTYPE_IDS[y_dtype],
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
        if not takes(*dtypes, residual_dtype, *row_dtypes(branch, norm)):
            rest = (branch, norm, index, residual_dtype, needed)
            return super().residual_norm_modulate_bwd(dx_new, dy, x, stats, *rest)
        grads = _backward(
            None if dx_new is None else dx_new.contiguous(),
            None if dy is None else dy.contiguous(),
            x.contiguous(),
            *stats,
            *native_branch(branch),
            *native_norm(norm),
            index,
            DTYPE_IDS[residual_dtype],
            needed_bits(needed),
        )
        return ResidualNormGrads(*grads)
