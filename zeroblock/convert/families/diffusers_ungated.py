"""diffusers' blocks without gates or modulation: Stable Diffusion's U-Nets and unCLIP's prior, OmniGen, Stable Audio,
Cosmos 3, MiniMax-Music3. Each branch is added in one pass with the norm that follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import SMALL
from .described import described
from .description import GatedBranch, Given

_TEXT = 3


def _width(attn: Any) -> int:
    width: int = attn.to_q.in_features
    return width


# ---- BasicTransformerBlock with plain norms --------------------------------------------------------------------------


def _basic(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Any = None,
    added_cond_kwargs: Any = None,
) -> Given | None:
    if cross_attention_kwargs or block._chunk_size is not None:
        return None
    own = {"encoder_hidden_states": encoder_hidden_states if block.only_cross_attention else None}
    across = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    x = block.norm1(hidden_states) if block.attn1 is None else hidden_states  # DreamLite's, without self-attention
    return Given((x,), (), {"attn1": own | {"attention_mask": attention_mask}, "attn2": across})


def _at_places(name: str) -> Any:
    """An attention, whose tokens are told where they are"""

    def attends(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
        h = h if block.pos_embed is None else block.pos_embed(h)
        y: Tensor = getattr(block, name)(h, **layers[name])
        return y

    return attends


def _basic_example(block: Any, side: int) -> tuple:
    tokens = side**2 if block.pos_embed is None else min(side**2, block.pos_embed.pe.shape[1])
    return torch.randn(2, tokens, block.dim), None, _context(block)


def _basic_variant(block: Any) -> str | None:
    return None if block.norm_type == "layer_norm" else f"norm_type {block.norm_type!r}"


def _context(block: Any) -> Tensor | None:
    D = block.cross_attention_dim
    return None if D is None or block.double_self_attention else torch.randn(2, _TEXT, D)


def _basic_options(block: Any) -> dict[str, tuple]:
    found: dict[str, tuple] = {"attention_mask": (torch.randn(2, 1, SMALL**2),), "cross_attention_kwargs": ({},)}
    # Norms of other kinds take these.
    found |= {"timestep": (torch.ones(2),), "class_labels": (torch.ones(2),), "added_cond_kwargs": ({},)}
    if block.attn2 is not None:
        tokens = SMALL**2 if block.attn2.to_k.in_features == block.dim and _context(block) is None else _TEXT
        found["encoder_attention_mask"] = (torch.randn(2, 1, tokens),)
    return found


described(
    "PlainTransformerBlock",
    (
        GatedBranch("attn1", "norm1", call=_at_places("attn1"), others=("pos_embed",), optional=True),
        GatedBranch("attn2", "norm2", call=_at_places("attn2"), others=("pos_embed",), optional=True),
        GatedBranch("ff", "norm3"),
    ),
    given=_basic,
    example=_basic_example,
    options=_basic_options,
    classes=("BasicTransformerBlock", "BasicTransformerBlockDreamLite"),
    variant=_basic_variant,
    about="diffusers models/attention.py; also of DreamLite.",
)

# ---- OmniGen, Stable Audio, MiniMax-Music3 ---------------------------------------------------------------------------


def _omnigen(block: Any, hidden_states: Tensor, attention_mask: Tensor, image_rotary_emb: Any) -> Given:
    return Given((hidden_states,), (), {"self_attn": (attention_mask, image_rotary_emb)})


def _omnigen_attends(block: Any, h: Tensor, layers: dict[str, Any]) -> Any:
    return block.self_attn(h, h, *layers["self_attn"][:1], image_rotary_emb=layers["self_attn"][1])


def _omnigen_example(block: Any, side: int) -> tuple:
    attn, T = block.self_attn, side**2
    angles = torch.randn(T, attn.to_q.out_features // attn.heads)
    return torch.randn(2, T, _width(attn)), torch.randn(2, 1, T, T), (angles.cos(), angles.sin())


described(
    "OmniGenBlock",
    (
        GatedBranch("self_attn", "input_layernorm", call=_omnigen_attends),
        GatedBranch("mlp", "post_attention_layernorm"),
    ),
    given=_omnigen,
    example=_omnigen_example,
    about="diffusers models/transformers/transformer_omnigen.py.",
)


def _stable_audio(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    rotary_embedding: Any = None,
) -> Given | None:
    if block._chunk_size is not None:
        return None
    own = {"attention_mask": attention_mask, "rotary_emb": rotary_embedding}
    across = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    return Given((hidden_states,), (), {"attn1": own, "attn2": across})


def _stable_audio_options(block: Any) -> dict[str, tuple]:
    T, heads = SMALL**2, block.attn1.heads
    angles = torch.randn(T, block.attn1.to_q.out_features // heads // 2)
    return {
        "attention_mask": (torch.randn(2, 1, T),),
        "encoder_attention_mask": (torch.randn(2, 1, _TEXT),),
        "rotary_embedding": ((angles.cos(), angles.sin()),),
    }


described(
    "StableAudioDiTBlock",
    (GatedBranch("attn1", "norm1"), GatedBranch("attn2", "norm2"), GatedBranch("ff", "norm3")),
    given=_stable_audio,
    example=lambda block, side: (
        torch.randn(2, side**2, _width(block.attn1)),
        None,
        torch.randn(2, _TEXT, block.attn2.to_k.in_features),
    ),
    options=_stable_audio_options,
    about="diffusers models/transformers/stable_audio_transformer.py.",
)


def _music(block: Any, hidden_states: Tensor, rotary_emb: Any) -> Given:
    return Given((hidden_states,), (), {"attn": (rotary_emb,)})


def _music_feeds(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    h, gate = block.ff_in(h).chunk(2, dim=-1)
    return h * torch.nn.functional.silu(gate)


def _music_example(block: Any, side: int) -> tuple:
    attn, T = block.attn, side**2
    angles = torch.randn(T, attn.head_dim)
    return torch.randn(2, T, _width(attn)), (angles.cos(), angles.sin())


described(
    "MiniMaxMusic3TransformerBlock",
    (
        GatedBranch("attn", "norm1", call=lambda block, h, layers: block.attn(h, *layers["attn"])),
        GatedBranch("ff_in", "norm2", call=_music_feeds, last="ff_out"),
    ),
    given=_music,
    example=_music_example,
    about="diffusers models/transformers/transformer_minimax_music3.py.",
)

# ---- Cosmos 3: two streams of one sample -----------------------------------------------------------------------------


def _cosmos3(block: Any, und_seq: Tensor, gen_seq: Tensor, rotary_emb: Any) -> Given:
    return Given((und_seq[None], gen_seq[None]), (), {"self_attn": rotary_emb})


def _cosmos3_attends(block: Any, h: tuple[Tensor, Tensor], layers: dict[str, Any]) -> tuple[Tensor, Tensor]:
    y, z = block.self_attn(h[0][0], h[1][0], layers["self_attn"])
    return y[None], z[None]


def _cosmos3_example(block: Any, side: int) -> tuple:
    T, D = side**2, block.hidden_size
    angles = [torch.randn(n, block.self_attn.head_dim) for n in (_TEXT, T)]
    rotary = tuple(f(a) for a in angles for f in (torch.cos, torch.sin))
    return torch.randn(_TEXT, D), torch.randn(T, D), rotary


described(
    "Cosmos3VLTextMoTDecoderLayer",
    (
        GatedBranch(
            "self_attn",
            "input_layernorm",
            call=_cosmos3_attends,
            context=GatedBranch("self_attn", "input_layernorm_moe_gen", stream=1),
        ),
        GatedBranch("mlp", "post_attention_layernorm"),
        GatedBranch("mlp_moe_gen", "post_attention_layernorm_moe_gen", stream=1),
    ),
    given=_cosmos3,
    example=_cosmos3_example,
    finish=lambda block, streams, more: (streams[0][0], streams[1][0]),
    about="diffusers models/transformers/transformer_cosmos3.py.",
)
