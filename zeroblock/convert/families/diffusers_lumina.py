"""diffusers' blocks in the manner of Lumina: RMS norms before and after each layer, a scale without shift, and gates
through tanh. Lumina-Next and Lumina 2, Z-Image, Bria Fibo 2, Ideogram 4, Mochi, Nucleus, Qwen-Image 2.1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import SMALL
from .described import described
from .description import GatedBranch, Given, Row
from .diffusers_flux import clipped, rows_of
from .streams import Stream

_TEXT = 3


def _branches(
    attn: str, norm: str, after: str, ff: str, ff_norm: str, ff_after: str, call: Any = None
) -> tuple[GatedBranch, ...]:
    """Of four rows: scale and gate of attention, scale and gate of the feed-forward."""
    return (
        GatedBranch(attn, norm, scale=0, gate=1, tanh=True, after=after, call=call),
        GatedBranch(ff, ff_norm, scale=2, gate=3, tanh=True, after=ff_after),
    )


def _without_rows(branches: tuple[GatedBranch, ...], norm: str) -> tuple[GatedBranch, ...]:
    """The same block without a modulation, whose first norm has this name."""
    attn, ff = branches
    return (
        GatedBranch(attn.layer, norm, after=attn.after, call=attn.call),
        GatedBranch(ff.layer, ff.norm, after=ff.after),
    )


def _unmodulated(block: Any) -> str | None:
    return None if block.modulation else "it has no modulation"


def _modulated(block: Any) -> str | None:
    return "it has a modulation" if block.modulation else None


def _polar(*size: int) -> Tensor:
    """Rotations as complex numbers"""
    return torch.polar(torch.ones(size), torch.randn(size))


def _mask(tokens: int) -> Tensor:
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[1, -1] = False
    return mask


# ---- Lumina ---------------------------------------------------------------------------------------------------------


def _lumina2(
    block: Any, hidden_states: Tensor, attention_mask: Any, image_rotary_emb: Any, temb: Tensor | None = None
) -> Given:
    rows = rows_of(block.norm1, temb, 4) if block.modulation else ()  # type: ignore[arg-type]
    layers = {"attn": {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}}
    return Given((hidden_states,), rows, layers)


def _to_itself(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.attn(hidden_states=h, encoder_hidden_states=h, **layers["attn"])


def _lumina2_example(block: Any, side: int) -> tuple:
    D, T = block.attn.to_q.in_features, side**2
    temb = torch.randn(2, block.norm1.linear.in_features) if block.modulation else None
    return torch.randn(2, T, D), _mask(T), _polar(1, T, block.head_dim // 2), temb


_LUMINA = _branches("attn", "norm1.norm", "norm2", "feed_forward", "ffn_norm1", "ffn_norm2", _to_itself)
described(
    "Lumina2TransformerBlock",
    _LUMINA,
    given=_lumina2,
    example=_lumina2_example,
    linear="norm1.linear",
    variant=_unmodulated,
    about="diffusers models/transformers/transformer_lumina2.py.",
)
described(
    "Lumina2RefinerBlock",
    _without_rows(_LUMINA, "norm1"),
    given=_lumina2,
    example=_lumina2_example,
    classes=("Lumina2TransformerBlock",),
    variant=_modulated,
    about="diffusers models/transformers/transformer_lumina2.py, without modulation.",
)


def _lumina_next(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Any,
    image_rotary_emb: Any,
    encoder_hidden_states: Tensor,
    encoder_mask: Any,
    temb: Tensor,
    cross_attention_kwargs: dict[str, Any] | None = None,
) -> Given:
    more = cross_attention_kwargs or {}
    attend = {"attention_mask": attention_mask, "key_rotary_emb": image_rotary_emb} | more
    cross = {"attention_mask": encoder_mask, "key_rotary_emb": None} | more
    layers = {
        "gate": block.gate,
        "context": encoder_hidden_states,
        "angles": image_rotary_emb,
        "attn1": attend,
        "attn2": cross,
    }
    return Given((hidden_states,), rows_of(block.norm1, temb, 4), layers)


def _lumina_next_attends(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    angles = {"query_rotary_emb": layers["angles"]}
    own = block.attn1(hidden_states=h, encoder_hidden_states=h, **angles, **layers["attn1"])
    context = block.norm1_context(layers["context"])
    cross = block.attn2(hidden_states=h, encoder_hidden_states=context, **angles, **layers["attn2"])
    return block.attn2.to_out[0]((own + cross * layers["gate"].tanh().view(1, 1, -1, 1)).flatten(-2))


def _lumina_next_example(block: Any, side: int) -> tuple:
    D, T, context = block.attn1.to_q.in_features, side**2, block.attn2.to_k.in_features
    angles = _polar(1, T, block.head_dim // 2)
    text = torch.randn(2, _TEXT, context), _mask(_TEXT)
    return torch.randn(2, T, D), _mask(T), angles, *text, torch.randn(2, block.norm1.linear.in_features), {}


described(
    "LuminaNextDiTBlock",
    (
        GatedBranch(
            "attn1",
            "norm1.norm",
            scale=0,
            gate=1,
            tanh=True,
            after="norm2",
            call=_lumina_next_attends,
            others=("attn2", "norm1_context"),
        ),
        _LUMINA[1],
    ),
    given=_lumina_next,
    example=_lumina_next_example,
    linear="norm1.linear",
    about="diffusers models/transformers/lumina_nextdit2d.py.",
)

# ---- Z-Image, Bria Fibo 2 -------------------------------------------------------------------------------------------


def _z_image(
    block: Any,
    x: Tensor,
    attn_mask: Any,
    freqs_cis: Any,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Given:
    layers = {"attention": {"attention_mask": attn_mask, "freqs_cis": freqs_cis}}
    if not block.modulation:
        return Given((x,), (), layers)
    if noise_mask is None:
        return Given((x,), block.adaLN_modulation(adaln_input).chunk(4, dim=1), layers)
    both = torch.stack([block.adaLN_modulation(c) for c in (adaln_clean, adaln_noisy)], dim=1)
    return Given((x,), both.chunk(4, dim=-1), layers, index=((noise_mask == 1).int(),))


def _z_image_example(block: Any, side: int) -> tuple:
    T = side**2
    c = torch.randn(2, block.adaLN_modulation[0].in_features) if block.modulation else None
    clean = (None, None, None) if c is None else (None, torch.randn_like(c), torch.randn_like(c))
    return torch.randn(2, T, block.dim), _mask(T), _polar(2, T, block.head_dim // 2), c, *clean


def _z_image_options(block: Any) -> dict[str, tuple]:
    return {"noise_mask": (torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1]]),)} if block.modulation else {}


_Z_IMAGE = _branches("attention", "attention_norm1", "attention_norm2", "feed_forward", "ffn_norm1", "ffn_norm2")
for name, branches, variant in (
    ("ZImageTransformerBlock", _Z_IMAGE, _unmodulated),
    ("ZImageRefinerBlock", _without_rows(_Z_IMAGE, "attention_norm1"), _modulated),
):
    described(
        name,
        branches,
        given=_z_image,
        example=_z_image_example,
        options=_z_image_options,
        classes=("ZImageTransformerBlock",),
        linear="adaLN_modulation.0" if variant is _unmodulated else None,
        variant=variant,
        about="diffusers models/transformers/transformer_z_image.py.",
    )


# ---- Ideogram 4 -----------------------------------------------------------------------------------------------------


def _ideogram(
    block: Any, hidden_states: Tensor, attention_mask: Any, image_rotary_emb: Any, adaln_input: Tensor
) -> Given:
    layers = {"attention": {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}}
    return Given((hidden_states,), block.adaln_modulation(adaln_input).chunk(4, dim=-1), layers)


def _ideogram_example(block: Any, side: int) -> tuple:
    linear, T = block.adaln_modulation, side**2
    angles = torch.randn(2, T, block.attention.head_dim)
    mask = torch.ones(2, 1, T, T, dtype=torch.bool)
    x = torch.randn(2, T, linear.out_features // 4)
    return x, mask, (angles.cos(), angles.sin()), torch.randn(2, 1, linear.in_features)


described(
    "Ideogram4TransformerBlock",
    _Z_IMAGE,
    given=_ideogram,
    example=_ideogram_example,
    linear="adaln_modulation",
    about="diffusers models/transformers/transformer_ideogram4.py.",
)

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
    return torch.randn(2, side**2, D), torch.randn(2, _TEXT, context), torch.randn(2, D), _mask(_TEXT)


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
    return {"image_rotary_emb": ((_polar(SMALL**2, half), _polar(_TEXT, half)),), "attention_kwargs": ({},)}


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
