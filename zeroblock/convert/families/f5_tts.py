"""SWivid/F5-TTS's DiT block, whose first norm holds the modulation of both branches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import register
from .described import family_of
from .description import GatedBlock, GatedBranch


def _rows(block: Any, t: Tensor, mask: Any = None, rope: Any = None) -> tuple[Tensor, ...]:
    norm = block.attn_norm
    return norm.linear(norm.silu(t)).chunk(6, dim=1)


def _attend(block: Any, h: Tensor, t: Tensor, mask: Any = None, rope: Any = None) -> Tensor:
    return block.attn(x=h, mask=mask, rope=rope)


def _example(block: Any, side: int) -> tuple:
    linear = block.attn_norm.linear
    return torch.randn(2, side**2, linear.out_features // 6), torch.randn(2, linear.in_features)


def _options(block: Any) -> dict[str, tuple]:
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    # Angles of each token and channel of a head, and the scale of a rotation that fades with distance (1: it does not).
    rope = (torch.randn(1, 4, block.attn.to_q.out_features // block.attn.heads), 1.0)
    return {"mask": (mask,), "rope": (rope,)}


register(
    family_of(
        GatedBlock(
            "F5DiTBlock",
            branches=(
                GatedBranch("attn", norm="attn_norm.norm", shift=0, scale=1, gate=2, call=_attend),
                GatedBranch("ff", norm="ff_norm", shift=3, scale=4, gate=5),
            ),
            rows=_rows,
            example=_example,
            options=_options,
            classes=("DiTBlock",),
            linear="attn_norm.linear",
            about="SWivid/F5-TTS `DiTBlock`.",
        )
    )
)
