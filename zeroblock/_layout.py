"""Memory formats: which one an op works in, and how a tensor gets there."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last_format(x: Tensor) -> torch.memory_format | None:
    """The channels-last format of x when it is laid out so and not also contiguous, else None (work in NC*S)."""
    if x.is_contiguous():
        return None
    layout = _CHANNELS_LAST.get(x.dim())
    return layout if layout is not None and x.is_contiguous(memory_format=layout) else None


def as_layout(x: Tensor, layout: torch.memory_format | None) -> Tensor:
    """x itself when it is already dense in `layout` (None: contiguous), else a copy that is."""
    return x.contiguous(memory_format=torch.contiguous_format if layout is None else layout)


def empty_like_dense(x: Tensor) -> Tensor:
    """What the ops return for x: same shape and dtype, in the format that `channels_last_format` names."""
    layout = channels_last_format(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format if layout is None else layout)


def add_residual(residual: Tensor | None, branch: Tensor) -> Tensor:
    """residual + branch in the memory format of that sum; in place on the fresh branch where that format is its own."""
    if residual is None:
        return branch
    if residual.dtype == branch.dtype and (residual.stride() == branch.stride() or 0 in residual.stride()):
        return branch.add_(residual)
    return residual + branch
