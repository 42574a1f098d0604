"""diffusers' blocks in the manner of Lumina: RMS norms before and after each layer, a scale without shift, and gates
through tanh. Lumina-Next and Lumina 2, Z-Image, Ideogram 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.register import left_to_compiler
from ..family import Family, lacks, register
from ..report import Obstacle, Reason
from .described import described
from .description import GatedBranch, Given, Row
from .diffusers_flux import rows_of
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


def unmodulated(block: Any) -> str | None:
    return None if block.modulation else "it has no modulation"


def _modulated(block: Any) -> str | None:
    return "it has a modulation" if block.modulation else None


def polar(*size: int) -> Tensor:
    """Rotations as complex numbers"""
    return torch.polar(torch.ones(size), torch.randn(size))


def token_mask(tokens: int) -> Tensor:
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
    return torch.randn(2, T, D), token_mask(T), polar(1, T, block.head_dim // 2), temb


_LUMINA = _branches("attn", "norm1.norm", "norm2", "feed_forward", "ffn_norm1", "ffn_norm2", _to_itself)
described(
    "Lumina2TransformerBlock",
    _LUMINA,
    given=_lumina2,
    example=_lumina2_example,
    linear="norm1.linear",
    variant=unmodulated,
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
    angles = polar(1, T, block.head_dim // 2)
    text = torch.randn(2, _TEXT, context), token_mask(_TEXT)
    return torch.randn(2, T, D), token_mask(T), angles, *text, torch.randn(2, block.norm1.linear.in_features), {}


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

# ---- Z-Image ------------------------------------------------------------------------------------------------------


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
    return Given((x,), both.chunk(4, dim=-1), layers, which=((noise_mask == 1).int(),))


def _z_image_example(block: Any, side: int) -> tuple:
    T = side**2
    c = torch.randn(2, block.adaLN_modulation[0].in_features) if block.modulation else None
    clean = (None, None, None) if c is None else (None, torch.randn_like(c), torch.randn_like(c))
    return torch.randn(2, T, block.dim), token_mask(T), polar(2, T, block.head_dim // 2), c, *clean


def _z_image_options(block: Any) -> dict[str, tuple]:
    return {"noise_mask": (torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1]]),)} if block.modulation else {}


Z_IMAGE = _branches("attention", "attention_norm1", "attention_norm2", "feed_forward", "ffn_norm1", "ffn_norm2")
for name, branches, variant in (
    ("ZImageTransformerBlock", Z_IMAGE, unmodulated),
    ("ZImageRefinerBlock", _without_rows(Z_IMAGE, "attention_norm1"), _modulated),
):
    described(
        name,
        branches,
        given=_z_image,
        example=_z_image_example,
        options=_z_image_options,
        classes=("ZImageTransformerBlock",),
        linear="adaLN_modulation.0" if variant is unmodulated else None,
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
    Z_IMAGE,
    given=_ideogram,
    example=_ideogram_example,
    linear="adaln_modulation",
    about="diffusers models/transformers/transformer_ideogram4.py.",
)


@register
class ZImageFinalLayer(Family):
    """linear(norm_final(x) * (1 + scale)), scale = adaLN_modulation(c), also of Lumina's own code

    Source: `FinalLayer` of diffusers models/transformers/transformer_z_image.py.
    Use: zb.accelerate(model), before torch.compile.
    Inference: one pass over x for norm and scale. There is nothing to skip.
    Training forward: the same.
    Training backward: one pass.
    """

    name = "ZImageFinalLayer"
    eager_rounding = True
    classes = ("FinalLayer",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, "norm_final", "linear", "adaLN_modulation.1.out_features")
        if missing is not None or block.adaLN_modulation[1].out_features == block.linear.in_features:
            return missing
        return Obstacle(Reason.NAMESAKE, "its adaLN_modulation gives more than a scale")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {}

    def example(self, block: Any, side: int) -> tuple:
        return torch.randn(2, side**2, block.linear.in_features), torch.randn(2, block.adaLN_modulation[1].in_features)

    def forward(self, block: Any, x: Tensor, c: Tensor | None = None) -> Tensor:
        if c is None or x.dim() != 3 or left_to_compiler(x):
            return self.eager(block, x, c)
        return block.linear(Stream(x).normed(block.norm_final, None, Row(block.adaLN_modulation(c))))
