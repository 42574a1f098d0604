"""What an op of the group memory_bound is."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Op(NamedTuple):
    """An op as a function of the tensors here: a block's modulation is one [N, k * C], as its linear layer gives it."""

    eager: Callable[..., Tensor | tuple[Tensor, ...]]
    own: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[[Shape, torch.dtype], tuple[Tensor, ...]]
    passes: dict[str, int]  # by mode: how often an activation is read or written at least


def normal(shape: Shape, dtype: torch.dtype, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return (mean + std * torch.randn(shape)).to(dtype)
