"""diffusers' blocks of two streams with one attention that are not Flux's: Qwen-Image, JoyImage, HiDream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import SMALL
from .described import described
from .description import GatedBranch, Given
from .diffusers_flux import TEXT, clipped, tokens


def joint(layer: str, norm: str, context: str, first: int, call: Any = None) -> GatedBranch:
    """A layer of both streams: rows 0 to 5 are x's, 6 to 11 the context's, each of attention and feed-forward."""
    i = first
    of_context = GatedBranch(layer, context, i + 6, i + 7, i + 8, stream=1)
    return GatedBranch(layer, norm, i, i + 1, i + 2, call=call, context=of_context)


def in_streams(*names: str) -> tuple[GatedBranch, ...]:
    """Attention of both streams, then a feed-forward of each: (attn, its norms, ff, its norm, and the context's)."""
    attn, norm, context, ff, ff_norm, ff_context, ff_context_norm = names
    return (
        joint(attn, norm, context, 0),
        GatedBranch(ff, ff_norm, 3, 4, 5),
        GatedBranch(ff_context, ff_context_norm, 9, 10, 11, stream=1),
    )


def both_clipped(block: Any, streams: tuple[Tensor, ...], more: Any) -> tuple[Tensor, Tensor]:
    x, context = streams
    return clipped(x), clipped(context)


# ---- Qwen-Image ------------------------------------------------------------------------------------------------------


def _qwen(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Any = None,
) -> Given | None:
    if (modulate_index is not None) is not block.zero_cond_t:
        return None
    attn = {"encoder_hidden_states_mask": encoder_hidden_states_mask, "image_rotary_emb": image_rotary_emb}
    layers = {"attn": attn | (joint_attention_kwargs or {})}
    index = None if modulate_index is None else (modulate_index != 0).int()
    return Given((hidden_states, encoder_hidden_states), (), layers, which=(index, None))


def _qwen_rows(
    block: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    encoder_hidden_states_mask: Any,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
    modulate_index: Any = None,
) -> tuple[Tensor, ...]:
    img: Any = block.img_mod(temb)
    if modulate_index is not None:
        # Of each sample, a row for the tokens of the image and one for those of its references.
        img = img.unflatten(0, (2, -1)).transpose(0, 1)
        temb = temb.chunk(2, dim=0)[0]
    return *img.chunk(6, dim=-1), *block.txt_mod(temb).chunk(6, dim=-1)


def _qwen_example(block: Any, side: int) -> tuple:
    mask = torch.tensor([[True] * TEXT, [True] * (TEXT - 1) + [False]])
    if not block.zero_cond_t:
        return *tokens(block.dim, side), mask, torch.randn(2, block.dim)
    # Two conditions of each sample: of three, none of which a proof takes away.
    x, context = torch.randn(3, side**2, block.dim), torch.randn(3, TEXT, block.dim)
    return x, context, mask[[0, 1, 0]], torch.randn(6, block.dim), None, None, torch.randint(2, (3, side**2))


def _qwen_options(block: Any) -> dict[str, tuple]:
    half = block.attention_head_dim // 2
    angles = tuple(torch.polar(torch.ones(n, half), torch.randn(n, half)) for n in (SMALL**2, TEXT))
    return {"image_rotary_emb": (angles,), "joint_attention_kwargs": ({},)}


described(
    "QwenImageTransformerBlock",
    in_streams("attn", "img_norm1", "txt_norm1", "img_mlp", "img_norm2", "txt_mlp", "txt_norm2"),
    rows=_qwen_rows,
    given=_qwen,
    example=_qwen_example,
    options=_qwen_options,
    linear=("img_mod.1", "txt_mod.1"),
    finish=lambda block, streams, more: both_clipped(block, streams, more)[::-1],
    about="diffusers models/transformers/transformer_qwenimage.py.",
)

# ---- JoyImage --------------------------------------------------------------------------------------------------------


def _joy(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None
) -> Given:
    rows = (*block.img_mod(temb), *block.txt_mod(temb))
    return Given((hidden_states, encoder_hidden_states), rows, {"attn": {"image_rotary_emb": image_rotary_emb}})


def _joy_plus(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_mask: Tensor | None = None,
) -> Given:
    given = _joy(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb)
    given.layers["attn"]["attention_mask"] = attention_mask
    return given


def _joy_example(block: Any, side: int) -> tuple:
    return *tokens(block.dim, side), torch.randn(2, 6, block.dim)


def _joy_plus_options(block: Any) -> dict[str, tuple]:
    given = _joy_options(block)
    (vis, _), *_ = given["image_rotary_emb"]
    return given | {"image_rotary_emb": (tuple(t.expand(2, -1, -1) for t in vis),)}


def _joy_options(block: Any) -> dict[str, tuple]:
    vis, txt = (tuple(torch.randn(n, block.attention_head_dim) for _ in range(2)) for n in (SMALL**2, TEXT))
    mask = torch.ones(2, 1, 1, SMALL**2 + TEXT, dtype=torch.bool)
    mask[1, ..., -1] = False
    return {"image_rotary_emb": ((vis, None), (vis, txt)), "attention_mask": (mask,)}


for name, given, options in (
    ("JoyImageTransformerBlock", _joy, _joy_options),
    ("JoyImageEditPlusTransformerBlock", _joy_plus, _joy_plus_options),
):
    described(
        name,
        in_streams("attn", "img_norm1", "txt_norm1", "img_mlp", "img_norm2", "txt_mlp", "txt_norm2"),
        given=given,
        example=_joy_example,
        options=options,
        about="diffusers models/transformers/transformer_joyimage.py.",
    )

# ---- HiDream ---------------------------------------------------------------------------------------------------------


def _hidream(
    block: Any,
    hidden_states: Tensor,
    hidden_states_masks: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    image_rotary_emb: Tensor | None = None,
) -> Given:
    rows = block.adaLN_modulation(temb).chunk(12, dim=-1)
    layers = {"attn1": (hidden_states_masks, image_rotary_emb)}
    return Given((hidden_states, encoder_hidden_states), rows, layers)  # type: ignore[arg-type]


def _hidream_single(
    block: Any,
    hidden_states: Tensor,
    hidden_states_masks: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    image_rotary_emb: Tensor | None = None,
) -> Given:
    layers = {"attn1": (hidden_states_masks, image_rotary_emb)}
    return Given((hidden_states,), block.adaLN_modulation(temb).chunk(6, dim=-1), layers)


def _hidream_attends(block: Any, h: Any, layers: dict[str, Any]) -> Any:
    masks, angles = layers["attn1"]
    if isinstance(h, Tensor):
        return block.attn1(h, masks, image_rotary_emb=angles)
    return block.attn1(h[0], masks, h[1], image_rotary_emb=angles)


def _hidream_example(block: Any, side: int) -> tuple:
    linear, attn = block.adaLN_modulation[-1], block.attn1
    x, text = tokens(linear.in_features, side)
    context = None if attn.single else text
    n = side**2 + (0 if attn.single else TEXT)
    angles = torch.randn(1, n, 1, attn.inner_dim // attn.heads // 2, 2, 2)
    return x, None, context, torch.randn(2, linear.in_features), angles


def _hidream_options(block: Any) -> dict[str, tuple]:
    mask = torch.ones(2, SMALL**2)
    mask[1, -1] = 0.0
    return {"hidden_states_masks": (mask,)}


described(
    "HiDreamImageTransformerBlock",
    (
        joint("attn1", "norm1_i", "norm1_t", 0, _hidream_attends),
        GatedBranch("ff_i", "norm3_i", 3, 4, 5),
        GatedBranch("ff_t", "norm3_t", 9, 10, 11, stream=1),
    ),
    given=_hidream,
    example=_hidream_example,
    options=_hidream_options,
    linear="adaLN_modulation.1",
    about="diffusers models/transformers/transformer_hidream_image.py.",
)
described(
    "HiDreamImageSingleTransformerBlock",
    (GatedBranch("attn1", "norm1_i", 0, 1, 2, call=_hidream_attends), GatedBranch("ff_i", "norm3_i", 3, 4, 5)),
    given=_hidream_single,
    example=_hidream_example,
    options=_hidream_options,
    linear="adaLN_modulation.1",
    about="diffusers models/transformers/transformer_hidream_image.py.",
)
