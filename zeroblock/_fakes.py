"""What the fakes of all ops are made of, and those of the ops without a convolution or linear layer: shapes, dtypes,
strides."""

from __future__ import annotations

import torch
from torch import Tensor

from ._layout import empty_like_dense
from .reference import compute_dtype, promoted


def empty(like: Tensor, *size: int) -> Tensor:
    return like.new_empty(size or (0,))


def stats(x: Tensor, *size: int) -> Tensor:
    return x.new_empty(size, dtype=compute_dtype(x))


def flag(x: Tensor) -> Tensor:
    return x.new_empty(1, dtype=torch.int32)


def grad_like(*operands: Tensor | None, lead: Tensor) -> tuple[Tensor, ...]:
    """Fakes of small gradients: dense, in the shape and dtype of the operand; empty where it is absent."""
    return tuple(empty(lead) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in operands)


def asked(mask: list[bool], *operands: Tensor | None, lead: Tensor) -> tuple[Tensor, ...]:
    return grad_like(*(t if m else None for t, m in zip(operands, mask, strict=True)), lead=lead)


def group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu):
    N = x.shape[0]
    return empty_like_dense(x), stats(x, N, num_groups), stats(x, N, num_groups)


def group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu):
    return empty_like_dense(x), *grad_like(weight, bias, scale, shift, lead=x)


def layer_norm_modulate(x, shift, scale, weight, bias, eps):
    return x.new_empty(x.shape), stats(x, *x.shape[:2]), stats(x, *x.shape[:2])


def layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, weight, bias):
    return x.new_empty(x.shape), *grad_like(shift, scale, weight, bias, lead=x)


def gate_residual(residual, gate, branch):
    return empty_like_dense(residual).to(promoted(residual, gate, branch))


def gate_norm(residual, gate, branch, shift, scale, eps):
    x_new = branch.new_empty(branch.shape)
    return x_new, x_new.new_empty(x_new.shape), stats(x_new, *x_new.shape[:2]), stats(x_new, *x_new.shape[:2])


def gate_norm_bwd(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale):
    dresidual, dbranch = (branch.new_empty(branch.shape) for _ in range(2))
    dgate, dshift, dscale = grad_like(gate, shift, scale, lead=branch)
    return dresidual, dgate, dbranch, dshift, dscale
