"""What the fakes of the ops are made of: shapes, dtypes, strides."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import compute_dtype


def empty(like: Tensor, *size: int) -> Tensor:
    return like.new_empty(size or (0,))


def statistics(x: Tensor, *size: int) -> Tensor:
    """Means, or the like, of x."""
    return x.new_empty(size, dtype=compute_dtype(x))


def flag(x: Tensor) -> Tensor:
    """`skipped` of an op."""
    return x.new_empty(1, dtype=torch.int32)


def small_grads(*operands: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
    """Gradients of small operands: dense, in the shape and dtype of the operand; empty where it is absent."""
    return tuple(empty(like) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in operands)


def grads_where(mask: list[bool], *operands: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
    """`small_grads` of the operands that the mask asks for, else empty."""
    return small_grads(*(t if m else None for t, m in zip(operands, mask, strict=True)), like=like)


def add(residual: Tensor | None, branch: Tensor) -> Tensor:
    return branch if residual is None else residual + branch
