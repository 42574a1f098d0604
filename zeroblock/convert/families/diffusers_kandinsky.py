"""diffusers' Kandinsky 5 and 6, and MiniMax-H3, which has a row for each timestep and modality."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import SMALL
from .described import described
from .description import GatedBranch, Given

_TEXT = 3

# ---- Kandinsky 5 and 6 ----------------------------------------------------------------------------------------------


def _kandinsky5_text(block: Any, x: Tensor, time_embed: Tensor, rope: Any) -> Given:
    rows = block.text_modulation(time_embed).chunk(6, dim=-1)
    return Given((x,), rows, {"self_attention": {"rotary_emb": rope}})


def _kandinsky5(
    block: Any, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor, rope: Any, sparse_params: Any
) -> Given:
    rows = block.visual_modulation(time_embed).chunk(9, dim=-1)
    layers = {"self_attention": {"rotary_emb": rope, "sparse_params": sparse_params}}
    return Given((visual_embed,), rows, layers | {"cross_attention": {"encoder_hidden_states": text_embed}})


def _kandinsky6_text(block: Any, x: Tensor, time_embed: Tensor, rope: Any, attn_mask: Tensor | None = None) -> Given:
    rows = block.text_modulation(time_embed).chunk(6, dim=-1)
    return Given((x,), rows, {"attn": {"rotary_emb": rope, "attn_mask": attn_mask}})


def _kandinsky_example(block: Any, side: int) -> tuple:
    modulation = getattr(block, "text_modulation", None) or block.visual_modulation
    attn = getattr(block, "self_attention", None) or block.attn
    linear, T = modulation.out_layer, side**2
    D = attn.to_query.in_features if hasattr(attn, "to_query") else attn.to_q.in_features
    heads = getattr(attn, "num_heads", None) or attn.heads
    a = torch.randn(T, 1, D // heads // 2)
    angles = torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], dim=-1).unflatten(-1, (2, 2))
    x, t = torch.randn(2, T, D), torch.randn(2, linear.in_features)
    return (x, torch.randn(2, _TEXT, D), t, angles, None) if hasattr(block, "cross_attention") else (x, t, angles)


_FF = GatedBranch("feed_forward", "feed_forward_norm", 3, 4, 5)
for name, given, branches in (
    (
        "Kandinsky5TransformerEncoderBlock",
        _kandinsky5_text,
        (GatedBranch("self_attention", "self_attention_norm", 0, 1, 2), _FF),
    ),
    (
        "Kandinsky5TransformerDecoderBlock",
        _kandinsky5,
        (
            GatedBranch("self_attention", "self_attention_norm", 0, 1, 2),
            GatedBranch("cross_attention", "cross_attention_norm", 3, 4, 5),
            GatedBranch("feed_forward", "feed_forward_norm", 6, 7, 8),
        ),
    ),
    ("Kandinsky6TransformerEncoderBlock", _kandinsky6_text, (GatedBranch("attn", "attn_norm", 0, 1, 2), _FF)),
):
    described(
        name,
        branches,
        given=given,
        example=_kandinsky_example,
        options=lambda block: {"attn_mask": (torch.ones(2, 1, 1, SMALL**2, dtype=torch.bool),)},
        linear="visual_modulation.out_layer" if given is _kandinsky5 else "text_modulation.out_layer",
        fp32=True,
        about="diffusers, a block of Kandinsky 5 or 6.",
    )

# ---- MiniMax-H3: a row for each timestep and modality ---------------------------------------------------------------


def _minimax(
    block: Any,
    hidden_states: Tensor,
    temb: Tensor,
    adaln_indices: Tensor,
    rotary_emb: Any,
    attention_mask: Any = None,
) -> Given:
    layers = {"attn": (rotary_emb, attention_mask)}
    return Given((hidden_states,), block.adaln_proj(temb), layers, which=(adaln_indices,))


def _minimax_example(block: Any, side: int) -> tuple:
    proj, attn, T = block.adaln_proj, block.attn, side**2
    D = proj.hidden_size
    angles = torch.randn(T, attn.to_q.out_features // attn.heads)
    index = torch.randint(proj.linear.out_features // (6 * D) * 3, (T,))
    return torch.randn(2, T, D), torch.randn(3, proj.linear.in_features), index, (angles.cos(), angles.sin())


described(
    "MiniMaxH3TransformerBlock",
    (
        GatedBranch("attn", "norm1", 0, 1, 2, call=lambda block, h, layers: block.attn(h, *layers["attn"])),
        GatedBranch("ff", "norm2", 3, 4, 5),
    ),
    given=_minimax,
    example=_minimax_example,
    about="diffusers models/transformers/transformer_minimax_h3.py.",
)
