"""diffusers' blocks of two streams with one attention that are not Flux's: Qwen-Image, CogView 3 and 4, GLM-Image,
CogVideoX, ConsisID, EasyAnimate, JoyImage, HiDream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import SMALL
from .described import described
from .description import GatedBranch, Given
from .diffusers_flux import TEXT, clipped, rotary, rows_of, tokens


def _joint(layer: str, norm: str, context: str, first: int, call: Any = None) -> GatedBranch:
    """A layer of both streams: rows 0 to 5 are x's, 6 to 11 the context's, each of attention and feed-forward."""
    i = first
    of_context = GatedBranch(layer, context, i + 6, i + 7, i + 8, stream=1)
    return GatedBranch(layer, norm, i, i + 1, i + 2, call=call, context=of_context)


def _streams(*names: str) -> tuple[GatedBranch, ...]:
    """Attention of both streams, then a feed-forward of each: (attn, its norms, ff, its norm, and the context's)."""
    attn, norm, context, ff, ff_norm, ff_context, ff_context_norm = names
    return (
        _joint(attn, norm, context, 0),
        GatedBranch(ff, ff_norm, 3, 4, 5),
        GatedBranch(ff_context, ff_context_norm, 9, 10, 11, stream=1),
    )


def _together(block: Any, h: tuple[Tensor, Tensor], layers: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One feed-forward of both streams, the context first"""
    x, context = h
    y = block.ff(torch.cat([context, x], dim=1))
    return y[:, context.shape[1] :], y[:, : context.shape[1]]


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
    img: Any = block.img_mod(temb)
    if (
        modulate_index is not None
    ):  # of each sample, a row for the tokens of the image and one for those of its references
        img = img.unflatten(0, (2, -1)).transpose(0, 1)
        temb = temb.chunk(2, dim=0)[0]
    rows = (*img.chunk(6, dim=-1), *block.txt_mod(temb).chunk(6, dim=-1))
    attn = {"encoder_hidden_states_mask": encoder_hidden_states_mask, "image_rotary_emb": image_rotary_emb}
    layers = {"attn": attn | (joint_attention_kwargs or {})}
    index = None if modulate_index is None else (modulate_index != 0).int()
    return Given((hidden_states, encoder_hidden_states), rows, layers, index=(index, None))


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
    _streams("attn", "img_norm1", "txt_norm1", "img_mlp", "img_norm2", "txt_mlp", "txt_norm2"),
    given=_qwen,
    example=_qwen_example,
    options=_qwen_options,
    linear=("img_mod.1", "txt_mod.1"),
    finish=lambda block, streams, more: both_clipped(block, streams, more)[::-1],
    about="diffusers models/transformers/transformer_qwenimage.py.",
)

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
        _joint("attn1", "norm1.norm_x", "norm1.norm_c", 0),
        _joint("ff", "norm2", "norm2_context", 3, _together),
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
        _streams("attn1", "norm1.norm", "norm1.norm_context", "ff", "norm2", "ff", "norm2_context"),
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


for name, given, ff in (
    ("CogVideoXBlock", _cogvideox, _together),
    ("ConsisIDBlock", _consisid, _together),
    ("EasyAnimateTransformerBlock", _consisid, _of_each),
):
    described(
        name,
        (_joint("attn1", "norm1.norm", "norm1.norm", 0), _joint("ff", "norm2.norm", "norm2.norm", 3, ff)),
        given=given,
        example=_cogvideo_example,
        options=lambda block: {"image_rotary_emb": (rotary(block.attn1, SMALL**2),), "attention_kwargs": ({},)},
        variant=_easyanimate_variant if ff is _of_each else None,
        about="diffusers, the block of CogVideoX.",
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
        _streams("attn", "img_norm1", "txt_norm1", "img_mlp", "img_norm2", "txt_mlp", "txt_norm2"),
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
    x, context = tokens(linear.in_features, side)
    context = None if attn.single else context
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
        _joint("attn1", "norm1_i", "norm1_t", 0, _hidream_attends),
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
