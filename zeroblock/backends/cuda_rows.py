"""residual_norm_modulate by the CUDA kernels: layouts settled, then the private ops of csrc/torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import MaybeTensor
from .cuda_convs import Kernels
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
        x_new, y, *stats = self.kernels.residual_norm(
            residual.contiguous(),
            *native_branch(branch),
            0.0 if branch is None else branch.eps,
            0 if norm is None else 2 if norm.rms else 1,
            *native_norm(norm),
            _used(index, branch, norm)[0],
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
        like = dx_new if x is None else x
        assert like is not None
        dtypes = [t.dtype for t in (dx_new, dy) if t is not None]
        if not _takes(like, branch, norm, index, residual_dtype, *dtypes):
            return super().residual_norm_modulate_bwd(dx_new, dy, x, stats, branch, norm, index, residual_dtype, needed)
        chosen, K = _used(index, branch, norm)
        grads = self.kernels.residual_norm_bwd(
            None if dx_new is None else dx_new.contiguous(),
            None if dy is None else dy.contiguous(),
            like.contiguous(),
            *stats,
            *native_branch(branch),
            *native_norm(norm),
            chosen,
            *_in_order(chosen, K),
            DTYPE_IDS[residual_dtype],
            needed_bits(needed),
        )
        return ResidualNormGrads(*grads)
