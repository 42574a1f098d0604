"""LTH14/mar's residual block of the diffusion loss: an MLP on rows, each with a modulation of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import register
from .described import family_of
from .description import GatedBlock, GatedBranch


def _rows(block: Any, y: Tensor) -> tuple[Tensor, ...]:
    return block.adaLN_modulation(y).chunk(3, dim=-1)


def _example(block: Any, side: int) -> tuple:
    linear = block.adaLN_modulation[-1]
    return torch.randn(side**2, linear.out_features // 3), torch.randn(side**2, linear.in_features)


register(
    family_of(
        GatedBlock(
            "MARResBlock",
            branches=(GatedBranch("mlp", norm="in_ln", shift=0, scale=1, gate=2),),
            rows=_rows,
            example=_example,
            classes=("ResBlock",),
            linear="adaLN_modulation.1",
            about="LTH14/mar `diffloss.ResBlock`.",
        )
    )
)
