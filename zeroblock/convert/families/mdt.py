"""sail-sg/MDT's transformer block: DiT's, with a long skip connection and tokens that may be masked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...ops.remade import joined
from ..family import register
from .described import family_of
from .description import GatedBlock, GatedBranch


def _rows(block: Any, c: Tensor, skip: Tensor | None = None, ids_keep: Tensor | None = None) -> tuple[Tensor, ...]:
    return block.adaLN_modulation(c).chunk(6, dim=1)


def _attend(block: Any, h: Tensor, c: Tensor, skip: Tensor | None = None, ids_keep: Tensor | None = None) -> Tensor:
    return block.attn(h, ids_keep=ids_keep)


def _skipped_to(block: Any, x: Tensor, c: Tensor, skip: Tensor | None = None, ids_keep: Tensor | None = None) -> Tensor:
    return x if block.skip_linear is None else block.skip_linear(joined([x, skip], dim=-1))  # type: ignore[list-item]


def _example(block: Any, side: int) -> tuple:
    D = block.adaLN_modulation[-1].in_features
    # Its relative positions are for so many tokens.
    tokens = math.prod(block.attn.rel_pos_bias.window_size)
    skip = () if block.skip_linear is None else (torch.randn(2, tokens, D),)
    return torch.randn(2, tokens, D), torch.randn(2, D), *skip


def _options(block: Any) -> dict[str, tuple]:
    tokens = math.prod(block.attn.rel_pos_bias.window_size)
    return {"ids_keep": (torch.stack([torch.randperm(tokens) for _ in range(2)]),)}


register(
    family_of(
        GatedBlock(
            "MDTBlock",
            branches=(
                GatedBranch("attn", norm="norm1", shift=0, scale=1, gate=2, call=_attend),
                GatedBranch("mlp", norm="norm2", shift=3, scale=4, gate=5),
            ),
            rows=_rows,
            example=_example,
            options=_options,
            linear="adaLN_modulation.1",
            first=_skipped_to,
            about="sail-sg/MDT.",
        )
    )
)
