"""residual_norm_modulate by Triton's kernels: layouts settled, then the launchers of `zeroblock.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import dense_rows
from ..kernels import _modulation as _operands
from ..kernels import residual_norm_modulate as _forward
from ..kernels import residual_norm_modulate_bwd as _backward
from .base import MaybeTensor
from .reference import Reference
from .residual_norm import Branch, Needed, Norm, ResidualNorm, ResidualNormGrads, Rows, Stats


def _rows(v: Rows) -> _operands.Rows:
    return _operands.Rows(dense_rows(v.rows), dense_rows(v.table))


def _parts(branch: Branch | None, norm: Norm | None) -> tuple[_operands.Branch | None, _operands.Norm | None]:
    """Both as the kernels take them."""
    kernel_branch = kernel_norm = None
    if branch is not None:
        weight = dense_rows(branch.weight)
        rest = branch._replace(branch=branch.branch.contiguous(), gate=_rows(branch.gate), weight=weight)
        kernel_branch = _operands.Branch(*rest)
    if norm is not None:
        weight, bias = dense_rows(norm.weight), dense_rows(norm.bias)
        all_of_norm = norm._replace(weight=weight, bias=bias, shift=_rows(norm.shift), scale=_rows(norm.scale))
        kernel_norm = _operands.Norm(*all_of_norm)
    return kernel_branch, kernel_norm


def _takes(x: MaybeTensor, branch: Branch | None, norm: Norm | None, index: MaybeTensor) -> bool:
    """Not fp64 beside other dtypes, nor rows per sample beside indexed ones, which no function asks for."""
    operands = ([] if branch is None else [branch.gate]) + ([] if norm is None else [norm.shift, norm.scale])
    if index is not None and any(v.rows is not None and v.rows.dim() == 2 for v in operands):
        return False
    dtypes = [] if x is None else [x.dtype]
    dtypes += [] if branch is None else [branch.branch.dtype, branch.dtype]
    return torch.float64 not in dtypes + ([] if norm is None else [norm.dtype])


class TritonRows(Reference):
    def residual_norm_modulate(
        self, residual: Tensor, branch: Branch | None, norm: Norm | None, index: MaybeTensor
    ) -> ResidualNorm:
        if not _takes(residual, branch, norm, index):
            return super().residual_norm_modulate(residual, branch, norm, index)
        x_new, y, *stats = _forward.forward(residual.contiguous(), *_parts(branch, norm), index)
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
        if residual_dtype == torch.float64 or not _takes(x, branch, norm, index):
            return super().residual_norm_modulate_bwd(dx_new, dy, x, stats, branch, norm, index, residual_dtype, needed)
        dx_new, dy, x = (None if t is None else t.contiguous() for t in (dx_new, dy, x))
        grads = _backward.backward(dx_new, dy, x, *stats, *_parts(branch, norm), index, residual_dtype, needed)
        return ResidualNormGrads(*grads)
