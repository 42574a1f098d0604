"""FoundationVision/VAR's transformer block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..family import register
from .described import family_of
from .description import GatedBlock, GatedBranch


def _rows(block: Any, cond_BD: Tensor, attn_bias: Any) -> tuple[Tensor, ...]:
    """gates, scales and shifts, each of attention and of the MLP; a table of the block's own, or of the condition"""
    if block.shared_aln:
        return (block.ada_gss + cond_BD).unbind(2)
    return block.ada_lin(cond_BD).view(-1, 6, block.C).unbind(1)


def _example(block: Any, side: int) -> tuple:
    condition = torch.randn(2, 1, 6, block.C) if block.shared_aln else torch.randn(2, block.D)
    tokens = side**2
    return torch.randn(2, tokens, block.C), condition, torch.randn(1, 1, tokens, tokens)


def _drops(block: Any) -> bool:
    """Stochastic depth may be active, or a fused MLP that the ops do not know."""
    dropping = block.training and not isinstance(block.drop_path, nn.Identity)
    return dropping or getattr(block.ffn, "fused_mlp_func", None) is not None


register(
    family_of(
        GatedBlock(
            "AdaLNSelfAttn",
            branches=(
                GatedBranch(
                    "attn",
                    norm="ln_wo_grad",
                    gate=0,
                    scale=2,
                    shift=4,
                    call=lambda block, h, cond_BD, attn_bias: block.attn(h, attn_bias=attn_bias),
                ),
                GatedBranch("ffn", norm="ln_wo_grad", gate=1, scale=3, shift=5),
            ),
            rows=_rows,
            example=_example,
            unless=_drops,
            about="FoundationVision/VAR; with active stochastic depth the original runs.",
        )
    )
)
