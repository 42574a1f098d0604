"""diffusers' Mochi and Nucleus-Image: scales without shift and gates through tanh, in two streams or one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import SMALL
from .described import described
from .description import GatedBranch, Given, Row
from .diffusers_flux import clipped, rows_of
from .diffusers_lumina import polar, token_mask
from .streams import Stream

_TEXT = 3

# ---- Mochi ----------------------------------------------------------------------------------------------------------


def _mochi(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: Any = None,
) -> Given:
    rows = rows_of(block.norm1, temb, 4)
    attn = {"attention_mask": encoder_attention_mask, "image_rotary_emb": image_rotary_emb}
    if not block.context_pre_only:
        rows = (*rows, *rows_of(block.norm1_context, temb, 4))
        return Given((hidden_states, encoder_hidden_states), rows, {"attn1": attn})
    norm = block.norm1_context
    scale = norm.linear_1(norm.silu(temb).to(encoder_hidden_states.dtype))
    context = Stream(encoder_hidden_states, fp32=True).normed(norm.norm, None, Row(scale))
    return Given((hidden_states,), rows, {"attn1": attn | {"encoder_hidden_states": context}}, encoder_hidden_states)


def _mochi_of_x(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.attn1(hidden_states=h, **layers["attn1"])[0]


def _mochi_example(block: Any, side: int) -> tuple:
    D, context = block.attn1.to_q.in_features, block.attn1.add_k_proj.in_features
    return torch.randn(2, side**2, D), torch.randn(2, _TEXT, context), torch.randn(2, D), token_mask(_TEXT)


def _mochi_options(block: Any) -> dict[str, tuple]:
    angles = torch.randn(SMALL**2, block.attn1.heads, block.attn1.inner_dim // block.attn1.heads // 2)
    return {"image_rotary_emb": ((angles.cos(), angles.sin()),)}


_MOCHI_ATTN = GatedBranch("attn1", "norm1.norm", scale=0, gate=1, tanh=True, after="norm2")
_MOCHI_FF = GatedBranch("ff", "norm3", scale=2, gate=3, tanh=True, after="norm4")
_MOCHI_CONTEXT = GatedBranch("attn1", "norm1_context.norm", scale=4, gate=5, tanh=True, after="norm2_context", stream=1)
for name, branches, of_x in (
    (
        "MochiTransformerBlock",
        (
            GatedBranch(**(vars(_MOCHI_ATTN) | {"context": _MOCHI_CONTEXT})),
            _MOCHI_FF,
            GatedBranch("ff_context", "norm3_context", scale=6, gate=7, tanh=True, after="norm4_context", stream=1),
        ),
        False,
    ),
    ("MochiLastBlock", (GatedBranch(**(vars(_MOCHI_ATTN) | {"call": _mochi_of_x})), _MOCHI_FF), True),
):
    described(
        name,
        branches,
        given=_mochi,
        example=_mochi_example,
        options=_mochi_options,
        classes=("MochiTransformerBlock",),
        variant=lambda block, of_x=of_x: (  # type: ignore[misc]
            None if block.context_pre_only is of_x else "it is the last block" if of_x is False else "it has a context"
        ),
        linear="norm1.linear" if of_x else ("norm1.linear", "norm1_context.linear"),
        fp32=True,
        finish=(lambda block, streams, more: (streams[0], more)) if of_x else None,
        about="diffusers models/transformers/transformer_mochi.py.",
    )

# ---- Nucleus, Qwen-Image 2.1: no norm after the layers --------------------------------------------------------------


def _nucleus(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> Given:
    more = attention_kwargs or {}
    rows = [r.clamp(-2.0, 2.0) if i % 2 else r for i, r in enumerate(block.img_mod(temb).chunk(4, dim=-1))]
    context = None if more.get("cached_txt_key") is not None else block.encoder_proj(encoder_hidden_states)
    attn = {"encoder_hidden_states": context, "image_rotary_emb": image_rotary_emb, **more}
    return Given((hidden_states,), rows, {"attn": attn})


def _nucleus_example(block: Any, side: int) -> tuple:
    linear = block.encoder_proj
    return torch.randn(2, side**2, block.dim), torch.randn(2, _TEXT, linear.in_features), torch.randn(2, block.dim)


def _nucleus_options(block: Any) -> dict[str, tuple]:
    half = block.attn.inner_dim // block.attn.heads // 2
    return {"image_rotary_emb": ((polar(SMALL**2, half), polar(_TEXT, half)),), "attention_kwargs": ({},)}


described(
    "NucleusMoEImageTransformerBlock",
    (
        GatedBranch("attn", "pre_attn_norm", scale=0, gate=1, tanh=True),
        GatedBranch("img_mlp", "pre_mlp_norm", scale=2, gate=3, tanh=True),
    ),
    given=_nucleus,
    example=_nucleus_example,
    options=_nucleus_options,
    variant=lambda block: "its experts see the norm without modulation too" if block.moe_enabled else None,
    linear="img_mod.1",
    finish=lambda block, streams, more: clipped(streams[0]),
    about="diffusers models/transformers/transformer_nucleusmoe_image.py, of the blocks without experts.",
)
