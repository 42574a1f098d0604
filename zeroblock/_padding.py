"""The padding of a convolution as ops are told it, in integers: one for each dimension, zeros on both sides; or, in the
long form, three: in front, behind, and 1 where the edge is repeated."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

Sides = list[tuple[int, int, int]]


def is_padded(padding: Sequence[int], weight: Tensor) -> bool:
    """Whether this is the long form."""
    return len(padding) != weight.dim() - 2


def sides(padding: Sequence[int]) -> Sides:
    """The three of each dimension, in the long form."""
    return list(zip(padding[::3], padding[1::3], padding[2::3], strict=True))


def padded(h: Tensor, padding: Sequence[int]) -> Tensor:
    """h with padding in the long form: a copy; h itself where there is none."""
    for repeated, mode in enumerate(("constant", "replicate")):
        widths = [n if s[2] == repeated else 0 for s in reversed(sides(padding)) for n in s[:2]]
        h = F.pad(h, widths, mode=mode).to(h.dtype) if any(widths) else h  # autocast repeats edges in float32
    return h
