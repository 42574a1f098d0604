"""diffusers' CogView 3 and 4, GLM-Image, CogVideoX, ConsisID and EasyAnimate: two streams with one attention, some with
one feed-forward too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.remade import joined
from ..family import SMALL
from .adaln import gate_rows
from .described import described
from .description import Given
from .diffusers_flux import TEXT, rotary, rows_of, tokens
from .diffusers_joint import both_clipped, in_streams, joint


def _together(block: Any, h: tuple[Tensor, Tensor], layers: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One feed-forward of both streams, the context first"""
    x, context = h
    y = block.ff(joined([context, x], dim=1))
    return y[:, context.shape[1] :], y[:, : context.shape[1]]


# ---- CogView, GLM-Image ----------------------------------------------------------------------------------------------


def _cogview3(block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, emb: Tensor) -> Given:
    return Given((hidden_states, encoder_hidden_states), rows_of(block.norm1, emb, 12))


def _by_stream(rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rows that come for each stream in turn."""
    return (*rows[::2], *rows[1::2])


def _cogview4(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    attention_mask: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> Given:
    attn = {"image_rotary_emb": image_rotary_emb, "attention_mask": attention_mask, **(attention_kwargs or {})}
    rows = _by_stream(block.norm1.linear(temb).chunk(12, dim=-1))
    return Given((hidden_states, encoder_hidden_states), rows, {"attn1": attn})


def _glm(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    attention_mask: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
    kv_cache: Any = None,
) -> Given | None:
    if kv_cache is not None:
        return None
    return _cogview4(
        block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_mask, attention_kwargs
    )


def _cogview_example(block: Any, side: int) -> tuple:
    linear = block.norm1.linear
    return *tokens(linear.out_features // 12, side), torch.randn(2, linear.in_features)


def _cogview_options(block: Any) -> dict[str, tuple]:
    mask = torch.tensor([[1.0] * TEXT, [1.0] * (TEXT - 1) + [0.0]])
    return {
        "image_rotary_emb": (rotary(block.attn1, SMALL**2),),
        "attention_mask": (mask,),
        "attention_kwargs": ({},),
    }


described(
    "CogView3PlusTransformerBlock",
    (
        joint("attn1", "norm1.norm_x", "norm1.norm_c", 0),
        joint("ff", "norm2", "norm2_context", 3, _together),
    ),
    given=_cogview3,
    example=_cogview_example,
    linear="norm1.linear",
    finish=both_clipped,
    about="diffusers models/transformers/transformer_cogview3plus.py.",
)
for name, given in (("CogView4TransformerBlock", _cogview4), ("GlmImageTransformerBlock", _glm)):
    described(
        name,
        in_streams("attn1", "norm1.norm", "norm1.norm_context", "ff", "norm2", "ff", "norm2_context"),
        given=given,
        example=_cogview_example,
        options=_cogview_options,
        about="diffusers models/transformers/transformer_cogview4.py.",
    )

# ---- CogVideoX, ConsisID, EasyAnimate --------------------------------------------------------------------------------


def _cogvideo_rows(block: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """Of two linears, each with three rows for x and three for the context"""
    first, second = rows_of(block.norm1, temb, 6), rows_of(block.norm2, temb, 6)
    return (*first[:3], *second[:3], *first[3:], *second[3:])


def _cogvideo_gates(block: Any, i: int) -> tuple[Tensor, ...]:
    norm = block.norm1 if i % 6 < 3 else block.norm2
    return gate_rows(norm.linear, 6, i % 3 + 3 * (i // 6))


def _cogvideox(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> Given:
    layers = {"attn1": {"image_rotary_emb": image_rotary_emb, **(attention_kwargs or {})}}
    return Given((hidden_states, encoder_hidden_states), _cogvideo_rows(block, temb), layers)


def _consisid(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
) -> Given:
    return _cogvideox(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb)


def _cogvideo_example(block: Any, side: int) -> tuple:
    linear = block.norm1.linear
    return *tokens(linear.out_features // 6, side), torch.randn(2, linear.in_features)


def _of_each(block: Any, h: tuple[Tensor, Tensor], layers: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x, context = h
    return block.ff(x), (block.ff if block.txt_ff is None else block.txt_ff)(context)


def _easyanimate_variant(block: Any) -> str | None:
    return "it has a norm after the feed-forward" if block.norm3 is not None else None


for name, rows_given, ff in (
    ("CogVideoXBlock", _cogvideox, _together),
    ("ConsisIDBlock", _consisid, _together),
    ("EasyAnimateTransformerBlock", _consisid, _of_each),
):
    described(
        name,
        (joint("attn1", "norm1.norm", "norm1.norm", 0), joint("ff", "norm2.norm", "norm2.norm", 3, ff)),
        given=rows_given,
        gates=_cogvideo_gates,
        example=_cogvideo_example,
        options=lambda block: {"image_rotary_emb": (rotary(block.attn1, SMALL**2),), "attention_kwargs": ({},)},
        variant=_easyanimate_variant if ff is _of_each else None,
        about="diffusers, the block of CogVideoX.",
    )
