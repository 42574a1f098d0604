"""diffusers' Chroma, FLUX.2 and FLUX.3 (`models/transformers/transformer_{chroma,flux2,flux3}.py`): Flux's blocks,
whose rows come with the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.remade import joined
from ..family import SMALL
from .described import described
from .description import GatedBranch, Given
from .diffusers_flux import TEXT, TWO_STREAMS, adapts, kwargs_options, one_stream, rotary, text_first, tokens, whole

# ---- Chroma: the rows come with the call -----------------------------------------------------------------------------


def _chroma(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_mask: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Given | None:
    if joint_attention_kwargs or adapts(block):
        return None
    layers = {"attn": {"image_rotary_emb": image_rotary_emb, "attention_mask": _pairs(attention_mask)}}
    return Given((hidden_states, encoder_hidden_states), temb.unbind(1), layers)


def _chroma_single(
    block: Any,
    hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_mask: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Given | None:
    if joint_attention_kwargs:
        return None
    layers = {"attn": {"image_rotary_emb": image_rotary_emb, "attention_mask": _pairs(attention_mask)}}
    return Given((hidden_states,), temb.unbind(1), layers)


def _pairs(mask: Tensor | None) -> Tensor | None:
    """Which tokens attend to which, of the tokens that there are"""
    return None if mask is None else mask[:, None, None, :] * mask[:, None, :, None]


def _chroma_example(block: Any, side: int) -> tuple:
    (D,) = block.norm1.norm.normalized_shape
    return *tokens(D, side), torch.randn(2, 12, D)


def _chroma_single_example(block: Any, side: int) -> tuple:
    (D,) = block.norm.norm.normalized_shape
    return torch.randn(2, side**2, D), torch.randn(2, 3, D)


def _chroma_options(tokens: int) -> Any:
    def options(block: Any) -> dict[str, tuple]:
        mask = torch.ones(2, tokens)
        mask[1, -1] = 0.0
        given = {"image_rotary_emb": (rotary(block.attn, tokens),), "attention_mask": (mask,)}
        return given | {"joint_attention_kwargs": ({},)}

    return options


described(
    "ChromaTransformerBlock",
    TWO_STREAMS,
    given=_chroma,
    example=_chroma_example,
    options=_chroma_options(SMALL**2 + TEXT),
    finish=text_first,
    about="diffusers models/transformers/transformer_chroma.py.",
)
described(
    "ChromaSingleTransformerBlock",
    one_stream(),
    given=_chroma_single,
    example=_chroma_single_example,
    options=_chroma_options(SMALL**2),
    finish=whole,
    about="diffusers models/transformers/transformer_chroma.py.",
)


# ---- FLUX.2 and FLUX.3: one modulation for all blocks ----------------------------------------------------------------


def _flux2(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Given:
    layers = {"attn": {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}}
    rows = (*temb_mod_img.chunk(6, dim=-1), *temb_mod_txt.chunk(6, dim=-1))
    return Given((hidden_states, encoder_hidden_states), rows, layers)


def _flux2_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Given:
    x = hidden_states
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, x], dim=1)
    layers = {"attn": {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}}
    return Given((x,), temb_mod.chunk(3, dim=-1), layers, text_seq_len if split_hidden_states else None)


def _flux2_example(block: Any, side: int) -> tuple:
    (D,) = block.norm1.normalized_shape
    return *tokens(D, side), torch.randn(2, 1, 6 * D), torch.randn(2, 1, 6 * D)


def _flux2_single_example(block: Any, side: int) -> tuple:
    (D,) = block.norm.normalized_shape
    return *tokens(D, side), torch.randn(2, 1, 3 * D)


described(
    "Flux2TransformerBlock",
    (
        GatedBranch("attn", "norm1", 0, 1, 2, context=GatedBranch("attn", "norm1_context", 6, 7, 8, stream=1)),
        *TWO_STREAMS[1:],
    ),
    given=_flux2,
    example=_flux2_example,
    options=kwargs_options("joint_attention_kwargs"),
    finish=text_first,
    about="diffusers models/transformers/transformer_flux2.py.",
)
described(
    "Flux2SingleTransformerBlock",
    (GatedBranch("attn", "norm", 0, 1, 2),),
    given=_flux2_single,
    example=_flux2_single_example,
    options=lambda block: {
        **kwargs_options("joint_attention_kwargs")(block),
        "split_hidden_states": (True,),
        "text_seq_len": (2,),
    },
    finish=whole,
    about="diffusers models/transformers/transformer_flux2.py.",
)


def _flux3_mode(block: Any, hidden_states: Tensor, temb_mod: Tensor, image_rotary_emb: Any) -> Given:
    return Given((hidden_states,), temb_mod.chunk(3, dim=-1), {"attn": {"image_rotary_emb": image_rotary_emb}})


def _flux3_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod: Tensor,
    temb_mod_context: Tensor,
    image_rotary_emb: Any,
) -> Given:
    rows = (*temb_mod.chunk(3, dim=-1), *temb_mod_context.chunk(3, dim=-1))
    layers = {"attn": {"image_rotary_emb": image_rotary_emb}}
    return Given((hidden_states, encoder_hidden_states), rows, layers)


def _flux3_both(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.attn(hidden_states=h, **layers["attn"]) + block.ff(h)


def _flux3_of_two(block: Any, h: tuple[Tensor, Tensor], layers: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x, context = h
    y = _flux3_both(block, joined([context, x], dim=1), layers)
    return y[:, context.shape[1] :], y[:, : context.shape[1]]


def _flux3_rotary(block: Any, tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(tokens, block.attn.head_dim)
    return angles.cos(), angles.sin()


described(
    "Flux3ModeTransformerBlock",
    (GatedBranch("attn", "norm", 0, 1, 2, call=_flux3_both, others=("ff",)),),
    given=_flux3_mode,
    example=lambda block, side: (*_flux2_single_example(block, side)[::2], _flux3_rotary(block, side**2)),
    about="diffusers models/transformers/transformer_flux3.py.",
)
described(
    "Flux3SingleTransformerBlock",
    (
        GatedBranch(
            "attn",
            "norm",
            0,
            1,
            2,
            call=_flux3_of_two,
            context=GatedBranch("attn", "norm", 3, 4, 5, stream=1),
            others=("ff",),
        ),
    ),
    given=_flux3_single,
    example=lambda block, side: (
        *_flux2_single_example(block, side),
        torch.randn(2, 1, 3 * block.norm.normalized_shape[0]),
        _flux3_rotary(block, side**2 + TEXT),
    ),
    finish=lambda block, streams, more: (streams[1], streams[0]),
    about="diffusers models/transformers/transformer_flux3.py.",
)
