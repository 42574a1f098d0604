"""residual_norm_modulate of `reference.py`: forward by the definition, backward by explicit formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import compute_dtype, row_moments
from ..reference_rows import flat_index, gated_branch, norm_modulate, operand_rows, rms_rstd
from .base import MaybeTensor
from .residual_norm import Branch, Norm, ResidualNorm, ResidualNormGrads, Rows, Stats


def forward(residual: Tensor, branch: Branch | None, norm: Norm | None, index: MaybeTensor) -> ResidualNorm:
    x, x_new, y = residual, None, None
    mean = rstd = branch_rstd = None
    if branch is not None:
        added = gated_branch(branch.branch, *branch.gate, index, branch.tanh, branch.rms, branch.weight, branch.eps)
        x = x_new = (residual.to(added.dtype) + added).to(branch.dtype).contiguous()
        branch_rstd = rms_rstd(branch.branch, branch.eps) if branch.rms else None
    if norm is not None:
        mean, rstd = (None, rms_rstd(x, norm.eps)) if norm.rms else row_moments(x, norm.eps)
        operands = (*norm.shift, *norm.scale, index, norm.eps, norm.dtype)
        y = norm_modulate(x, norm.rms, norm.weight, norm.bias, *operands).contiguous()
    return ResidualNorm(x_new, y, Stats(mean, rstd, branch_rstd))


def backward(
    dx_new: MaybeTensor,
    dy: MaybeTensor,
    x: MaybeTensor,
    stats: Stats,
    branch: Branch | None,
    norm: Norm | None,
    index: MaybeTensor,
    residual_dtype: torch.dtype,
) -> ResidualNormGrads:
    """As layer_norm_modulate_bwd; then, with d the gradient of x_new, d * act(gate) goes through norm_b to branch and
    d * norm_b(branch) through act to gate."""
    grads = ResidualNormGrads()
    d = dx_new
    if norm is not None:
        assert dy is not None and x is not None
        grads, d = _norm_backward(dx_new, dy, x, stats, norm, index)
    assert d is not None
    if branch is not None:
        grads = _branch_backward(grads, d, stats, branch, index)
    return grads._replace(residual=d.to(residual_dtype).contiguous())


def _norm_backward(
    dx_new: MaybeTensor, dy: Tensor, x: Tensor, stats: Stats, norm: Norm, index: MaybeTensor
) -> tuple[ResidualNormGrads, Tensor]:
    wide, mean, rstd = compute_dtype(x), stats.mean, stats.rstd
    assert rstd is not None
    xhat = (x.to(wide) if mean is None else x.to(wide) - mean[..., None]) * rstd[..., None]
    affine = xhat if norm.weight is None else xhat * norm.weight.to(wide)
    affine = affine if norm.bias is None else affine + norm.bias.to(wide)
    scale, dy = operand_rows(*norm.scale, index, wide), dy.to(wide)
    da = dy if scale is None else dy * (1 + scale)
    g = da if norm.weight is None else da * norm.weight.to(wide)
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
    dx = rstd[..., None] * (dx if norm.rms else dx - g.mean(-1, keepdim=True))
    dshift, dshift_table = _sums(dy, norm.shift, index)
    dscale, dscale_table = _sums(dy * affine, norm.scale, index)
    grads = ResidualNormGrads(
        weight=_sum(da * xhat, norm.weight),
        bias=_sum(da, norm.bias),
        shift=dshift,
        shift_table=dshift_table,
        scale=dscale,
        scale_table=dscale_table,
    )
    return grads, dx if dx_new is None else dx + dx_new.to(wide)


def _branch_backward(
    grads: ResidualNormGrads, d: Tensor, stats: Stats, branch: Branch, index: MaybeTensor
) -> ResidualNormGrads:
    wide = compute_dtype(branch.branch)
    rstd = stats.branch_rstd
    d, h = d.to(wide), branch.branch.to(wide)
    hhat = h if rstd is None else h * rstd[..., None]
    normed = hhat if branch.weight is None else hhat * branch.weight.to(wide)
    gate = operand_rows(*branch.gate, index, wide)
    dnormed = d
    dgate: tuple[MaybeTensor, MaybeTensor] = (None, None)
    if gate is not None:
        factor = gate.tanh() if branch.tanh else gate
        dfactor = d * normed
        dgate = _sums(dfactor * (1 - factor.square()) if branch.tanh else dfactor, branch.gate, index)
        dnormed = d * factor
    dh = dnormed if branch.weight is None else dnormed * branch.weight.to(wide)
    if rstd is not None:
        dh = rstd[..., None] * (dh - hhat * (dh * hhat).mean(-1, keepdim=True))
    return grads._replace(
        branch=dh.to(branch.branch.dtype, copy=dh is d).contiguous(),
        gate=dgate[0],
        gate_table=dgate[1],
        branch_weight=_sum(dnormed * hhat, branch.weight),
    )


def _sum(grad: Tensor, operand: MaybeTensor) -> MaybeTensor:
    """A full [B, T, D] gradient, summed to that of [D]."""
    return None if operand is None else grad.flatten(0, -2).sum(0).to(operand.dtype)


def _sums(grad: Tensor, operand: Rows, index: MaybeTensor) -> tuple[MaybeTensor, MaybeTensor]:
    """A full [B, T, D] gradient, summed to those of rows and table."""
    rows, table = operand
    if rows is None or rows.dim() == 1:
        return _sum(grad, rows), _sum(grad, table)
    if rows.dim() == 2:
        total = grad.sum(1)
    elif index is None:
        total = grad
    else:
        B, K = rows.shape[:2]
        total = torch.ops.aten.embedding_dense_backward(grad, flat_index(index, K), B * K, -1, False).view(rows.shape)
    drows = total.to(rows.dtype, copy=total is grad).contiguous()
    return drows, _sum(grad, table)
