"""What an op still computes while its branch is zero: residual + gate * bias, and gradients that are zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import zero
from .._layout import channels_last_format, is_settled
from ..backends.select import select
from ..reference import channel_view
from ..steps.flag import HOST


def weight_is_zero(op: str, zero_skip: int, weight: Tensor) -> bool:
    """Whether the host finds the weight of an op exactly zero, and so does not execute it; counted."""
    found = zero_skip == HOST and zero.is_exactly_zero(weight)
    zero.count(op, found)
    return found


def residual_alone(
    residual: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    dim: int,
    dtype: torch.dtype,
    empty: Callable[[], Tensor] | None,
    in_place: bool = False,
) -> Tensor:
    """residual + gate * bias; a fresh tensor, or the residual itself where it may be written `in_place`.

    bias, in the layer's dtype, runs along dimension `dim` (1 for a convolution, -1 for a linear); gate broadcasts
    against the output; `dtype` is that of gate * layer; empty() allocates what the layer returns, None: contiguous.
    """
    if residual is not None:
        if residual.dtype != dtype:
            residual = residual.to(torch.promote_types(residual.dtype, dtype))
        if (gate is None or bias is None) and is_settled(residual):
            backend = select("add_bias", residual)
            return backend.add_bias_in_place(residual, bias, dim) if in_place else backend.add_bias(residual, bias, dim)
    if empty is not None:
        branch = empty()
    else:
        assert residual is not None
        branch = residual.new_empty(residual.shape)
    if branch.dtype != dtype:
        branch = torch.empty_like(branch, dtype=dtype)
    if bias is None:
        branch.zero_()
    else:
        bias = bias + 0.0  # zero products are +0: a bias of -0 comes out of the layer as +0
        step = bias if dim == -1 else channel_view(bias, branch.dim())
        branch.copy_(step if gate is None else gate * step)
    # torch settles the memory format of the sum.
    return branch if residual is None else residual + branch


def zero_grad(t: Tensor) -> Tensor:
    """A gradient of t that is zero, in the format the ops return."""
    return torch.zeros_like(t, memory_format=channels_last_format(t) or torch.contiguous_format)
