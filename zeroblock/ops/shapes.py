"""What the fakes of the ops are made of: shapes, dtypes, strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference as ref
from .._layout import channels_last_format
from .._padding import is_padded, sides
from ..backends.base import ConvGrads
from ..reference import compute_dtype
from ..steps.conv_bwd import conv_grads as library_grads


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


# ---- convolutions, in either form of padding (steps/padded.py) -------------------------------------------------------


def conv(h: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    x, left = _library_input(h, weight, padding)
    return ref.conv(x, weight, bias, left)


def conv_grads(
    dy: Tensor, h: Tensor, weight: Tensor, has_bias: bool, padding: Sequence[int], mask: Sequence[bool]
) -> ConvGrads:
    x, left = _library_input(h, weight, padding)
    dh, dweight, dbias = library_grads(dy, x, weight, has_bias, left, mask)
    if dh is not None and x is not h:
        dh = torch.empty_like(h, memory_format=channels_last_format(dh) or torch.contiguous_format)
    return dh, dweight, dbias


def _library_input(h: Tensor, weight: Tensor, padding: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
    """Input and padding of the library's convolution that gives the same shapes and strides."""
    if not is_padded(padding, weight):
        return h, padding
    dims = zip(h.shape[2:], sides(padding), strict=True)
    size = (*h.shape[:2], *(n + front + back for n, (front, back, _) in dims))
    layout = channels_last_format(h) or torch.contiguous_format
    return torch.empty(size, dtype=h.dtype, device=h.device, memory_format=layout), [0] * (weight.dim() - 2)
