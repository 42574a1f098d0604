"""residual_norm_modulate by the CUDA kernels: layouts settled, then the private ops of csrc/torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import MaybeTensor
from .cuda_convs import Kernels
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

# Columns that the threads of a block keep in registers: kMostRow of csrc/cuda/cuda_kernels.h.
MOST_ROW = 8192


def why_not_row(x: Tensor) -> str | None:
    """Why the reference serves rows of x, else None."""
    if x.shape[-1] > MOST_ROW:
        return f"rows of {x.shape[-1]} elements are longer than the {MOST_ROW} that a block keeps in registers"
    return None if takes(x.dtype) else f"the kernels have no {str(x.dtype).removeprefix('torch.')}"


def _rows(branch: Branch | None, norm: Norm | None) -> list[Tensor]:
    found = [] if branch is None else [branch.gate.rows]
    found += [] if norm is None else [norm.shift.rows, norm.scale.rows]
    return [rows for rows in found if rows is not None]


def _vectors(branch: Branch | None, norm: Norm | None) -> list[torch.dtype]:
    found = [] if branch is None else [branch.weight, branch.gate.table]
    found += [] if norm is None else [norm.weight, norm.bias, norm.shift.table, norm.scale.table]
    return [v.dtype for v in found if v is not None]


def _takes(x: Tensor, branch: Branch | None, norm: Norm | None, index: MaybeTensor, *dtypes: torch.dtype) -> bool:
    """Not fp64 among the operands, nor rows per sample beside indexed ones, which no function asks for."""
    if why_not_row(x) is not None or (index is not None and any(v.dim() == 2 for v in _rows(branch, norm))):
        return False
    return takes(*dtypes, *row_dtypes(branch, norm), *_vectors(branch, norm))


def _used(index: MaybeTensor, branch: Branch | None, norm: Norm | None) -> tuple[MaybeTensor, int]:
    """The index where an operand has rows to choose from, and of how many."""
    counts = [v.shape[1] for v in _rows(branch, norm) if v.dim() == 3]
    return (index, min(counts)) if index is not None and counts else (None, 1)


def _in_order(index: MaybeTensor, K: int) -> tuple[MaybeTensor, MaybeTensor]:
    """(tokens in the order of their rows [B, T], where in it the tokens of row k begin [B, K + 1])."""
    if index is None:
        return None, None
    ordered, order = index.clamp(0, K - 1).sort(dim=1, stable=True)
    rows = torch.arange(K + 1, dtype=index.dtype, device=index.device).expand(len(index), -1).contiguous()
    return order, torch.searchsorted(ordered, rows, out_int32=True)


class CudaRows(Reference):
    kernels: Kernels

    def residual_norm_modulate(
        self, residual: Tensor, branch: Branch | None, norm: Norm | None, index: MaybeTensor
    ) -> ResidualNorm:
        x_dtype = residual.dtype if branch is None else branch.dtype
        y_dtype = x_dtype if norm is None else norm.dtype
        if not _takes(residual, branch, norm, index, x_dtype, y_dtype):
            return super().residual_norm_modulate(residual, branch, norm, index)
        index, _ = _used(index, branch, norm)
        return native_forward(self.kernels.residual_norm, residual, branch, norm, index, x_dtype, y_dtype)

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
        like = dx_new if x is None else x
        assert like is not None
        dtypes = [t.dtype for t in (dx_new, dy) if t is not None]
        if not _takes(like, branch, norm, index, residual_dtype, *dtypes):
            return super().residual_norm_modulate_bwd(dx_new, dy, x, stats, branch, norm, index, residual_dtype, needed)
        chosen, K = _used(index, branch, norm)
        rows = chosen, *_in_order(chosen, K)
        bwd = self.kernels.residual_norm_bwd
        return native_backward(bwd, dx_new, dy, like, stats, branch, norm, rows, residual_dtype, needed)
