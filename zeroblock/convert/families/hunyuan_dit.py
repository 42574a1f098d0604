"""Tencent/HunyuanDiT (`hydit/modules/models.py`) and its twin in diffusers: norms in float32 with parameters, a shift
without scale or gate, and a long skip connection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.remade import joined
from ..family import NEVER_ZERO
from .described import described
from .description import GatedBranch, Given
from .stand_in import of_tokens, width_of

_TEXT = 3


def _skipped_to(block: Any, x: Tensor, skip: Tensor | None) -> Tensor:
    return x if block.skip_linear is None else block.skip_linear(block.skip_norm(joined([x, skip], dim=-1)))  # type: ignore[list-item]


def _skip(block: Any, x: Tensor) -> Tensor | None:
    return None if block.skip_linear is None else torch.randn_like(x)


def _never(block: Any, i: int) -> tuple[Tensor, ...]:
    return (NEVER_ZERO,)


# ---- the authors' ----------------------------------------------------------------------------------------------------


def _authors(
    block: Any,
    x: Tensor,
    c: Tensor | None = None,
    text_states: Tensor | None = None,
    img_clip_embedding: Tensor | None = None,
    t_scale: float = 1,
    i_scale: float = 1,
    freq_cis_img: Any = None,
    skip: Tensor | None = None,
    is_ipa: bool = False,
) -> Given:
    cross = text_states, img_clip_embedding, t_scale, i_scale, freq_cis_img, is_ipa
    x = _skipped_to(block, x, skip)
    return Given((x,), (block.default_modulation(c),), {"attn1": (freq_cis_img,), "attn2": cross})


def _attend(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.attn1(h, *layers["attn1"])[0]


def _cross(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.attn2(h, *layers["attn2"])[0]


def _authors_example(block: Any, side: int) -> tuple:
    linear, T = block.default_modulation[1], side**2
    x = torch.randn(2, T, linear.out_features)
    text, clip = torch.randn(2, 2, _TEXT, width_of(block.attn2, "kv_proj", x.shape[-1]))
    angles = torch.randn(T, 8)
    return x, torch.randn(2, linear.in_features), text, clip, 1, 1, (angles.cos(), angles.sin()), _skip(block, x), False


def _first_of(*args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (of_tokens(*args, **kwargs),)


described(
    "HunYuanDiTBlock",
    (
        GatedBranch("attn1", "norm1", shift=0, call=_attend),
        GatedBranch("attn2", "norm3", call=_cross),
        GatedBranch("mlp", "norm2"),
    ),
    given=_authors,
    example=_authors_example,
    gates=_never,
    has=("default_modulation",),
    stand_ins={"attn1": _first_of, "attn2": _first_of},
    about="Tencent/HunyuanDiT hydit/modules/models.py.",
)

# ---- diffusers' ------------------------------------------------------------------------------------------------------


def _diffusers(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    skip: Tensor | None = None,
) -> Given:
    norm, emb = block.norm1, temb
    shift = norm.linear(norm.silu(emb.to(torch.float32)).to(emb.dtype))  # type: ignore[union-attr]
    angles = {"image_rotary_emb": image_rotary_emb}
    layers = {"attn1": angles, "attn2": {"encoder_hidden_states": encoder_hidden_states} | angles}
    return Given((_skipped_to(block, hidden_states, skip),), (shift,), layers)


def _diffusers_example(block: Any, side: int) -> tuple:
    D, T, attn = block.norm1.linear.in_features, side**2, block.attn1
    x, text = torch.randn(2, T, D), torch.randn(2, _TEXT, block.attn2.to_k.in_features)
    angles = torch.randn(T, attn.inner_dim // attn.heads)
    return x, text, torch.randn(2, D), (angles.cos(), angles.sin()), _skip(block, x)


described(
    "HunyuanDiTBlock",
    (
        GatedBranch("attn1", "norm1.norm", shift=0),
        GatedBranch("attn2", "norm2"),
        GatedBranch("ff", "norm3"),
    ),
    given=_diffusers,
    example=_diffusers_example,
    gates=_never,
    about="diffusers models/transformers/hunyuan_transformer_2d.py.",
)
