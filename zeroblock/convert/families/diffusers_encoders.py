"""diffusers' transformer blocks without gates beside the denoisers' own: of conditions (ACE-Step, Anima, Bria FIBO 2,
I2VGen-XL), of autoencoders (MiniMax-H3, LTX-2), of tokens of sound, and between frames (Stable Video Diffusion)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import SMALL
from .described import described
from .description import GatedBranch, Given, Row
from .stand_in import of_tokens, width_of

_TEXT = 3


def _mask() -> Tensor:
    mask = torch.zeros(2, 1, SMALL**2, SMALL**2)
    mask[1, ..., -1] = -10000.0
    return mask


def _angles(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(tokens, width)
    return angles.cos(), angles.sin()


# ---- ACE-Step, Anima, Bria FIBO 2, I2VGen-XL -------------------------------------------------------------------------


def _ace_step(block: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None) -> Given:
    layers = {"image_rotary_emb": position_embeddings, "attention_mask": attention_mask}
    return Given((hidden_states,), (), {"self_attn": layers})


described(
    "AceStepEncoderLayer",
    (GatedBranch("self_attn", "input_layernorm"), GatedBranch("mlp", "post_attention_layernorm")),
    given=_ace_step,
    example=lambda block, side: (
        torch.randn(2, side**2, width_of(block.self_attn, "to_q", 0)),
        _angles(side**2, block.self_attn.head_dim),
    ),
    options=lambda block: {"attention_mask": (_mask(),)},
    about="diffusers pipelines/ace_step/modeling_ace_step.py.",
)


def _anima(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    target_attention_mask: Any = None,
    source_attention_mask: Any = None,
    position_embeddings: Any = None,
    source_position_embeddings: Any = None,
) -> Given:
    places = {"position_embeddings": position_embeddings, "encoder_position_embeddings": position_embeddings}
    cross = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": source_attention_mask}
    cross |= places | {"encoder_position_embeddings": source_position_embeddings}
    layers = {"self_attn": {"attention_mask": target_attention_mask, **places}, "cross_attn": cross}
    return Given((hidden_states,), (), layers)


def _anima_example(block: Any, side: int) -> tuple:
    attn, T = block.cross_attn, side**2
    D, width = attn.q_proj.in_features, attn.attention_head_dim
    own, other = _angles(T, width), _angles(_TEXT, width)
    text = torch.randn(2, _TEXT, attn.k_proj.in_features)
    return torch.randn(2, T, D), text, None, None, tuple(a[None] for a in own), tuple(a[None] for a in other)


described(
    "AnimaTextConditionerBlock",
    (
        GatedBranch("self_attn", "norm_self_attn", optional=True),
        GatedBranch("cross_attn", "norm_cross_attn"),
        GatedBranch("mlp", "norm_mlp"),
    ),
    given=_anima,
    example=_anima_example,
    options=lambda block: {
        "target_attention_mask": (_mask() > -1,),
        "source_attention_mask": (_mask()[..., :1, 1:] > -1,),
    },
    about="diffusers models/condition_embedders/condition_embedder_anima.py.",
)


def _perceiver(
    block: Any,
    latents: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Any = None,
    attention_mask: Any = None,
) -> Given:
    cross = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    return Given((latents,), (), {"cross_attention": cross, "self_attention": {"attention_mask": attention_mask}})


described(
    "BriaFibo2PerceiverLayer",
    (
        GatedBranch("cross_attention", "cross_attn_norm"),
        GatedBranch("self_attention", "self_attn_norm"),
        GatedBranch("ffn", "ffn_norm"),
    ),
    given=_perceiver,
    example=lambda block, side: (
        torch.randn(2, side**2, block.cross_attention.to_q.in_features),
        torch.randn(2, _TEXT, block.cross_attention.to_k.in_features),
    ),
    options=lambda block: {
        "encoder_attention_mask": (torch.tensor([[True] * _TEXT, [True, True, False]]),),
        "attention_mask": (torch.tensor([[True] * SMALL**2, [True, True, True, False]]),),
    },
    about="diffusers models/transformers/transformer_bria_fibo2.py.",
)
described(
    "I2VGenXLTransformerTemporalEncoder",
    (GatedBranch("attn1", "norm1"), GatedBranch("ff")),
    given=lambda block, hidden_states: Given((hidden_states,)),
    example=lambda block, side: (torch.randn(2, side**2, block.attn1.to_q.in_features),),
    about="diffusers models/unets/unet_i2vgen_xl.py.",
)

# ---- MiniMax-Music3, MiniMax-H3 --------------------------------------------------------------------------------------


def _depth_feeds(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return torch.nn.functional.silu(block.gate_proj(h)) * block.up_proj(h)


described(
    "MiniMaxMusic3DepthDecoderBlock",
    (
        GatedBranch("attn", "input_layernorm"),
        GatedBranch("gate_proj", "post_attention_layernorm", call=_depth_feeds, last="down_proj", others=("up_proj",)),
    ),
    given=lambda block, hidden_states: Given((hidden_states,)),
    example=lambda block, side: (torch.randn(2, side**2, block.attn.to_q.in_features),),
    about="diffusers models/transformers/minimax_music3_rvq_depth_decoder.py.",
)


def _minimax(block: Any, hidden_states: Tensor, rotary_emb: Any = None) -> Given | None:
    if hidden_states.dtype is not block.attn.to_q.weight.dtype:
        return None  # norms give what the layers take
    gates = Row(None, block.scale1), Row(None, block.scale2)
    return Given((hidden_states,), gates, {"attn": {"rotary_emb": rotary_emb}})


described(
    "MiniMaxH3VideoTransformerBlock",
    (GatedBranch("attn", "norm1", gate=0), GatedBranch("ff", "norm2", gate=1)),
    given=_minimax,
    example=lambda block, side: (torch.randn(2, side**2, len(block.scale1)),),
    options=lambda block: {"rotary_emb": (tuple(a[None, :, None] for a in _angles(SMALL**2, 2)),)},
    gates=lambda block, i: ((block.scale1, block.scale2)[i].detach(),),
    about="diffusers models/autoencoders/autoencoder_kl_minimax_h3.py.",
)

# ---- LTX-2's decoder: tokens in a grid ------------------------------------------------------------------------------


def _neighbours(block: Any, hidden_states: Tensor, block_mask: Any = None) -> Given:
    grid = hidden_states.shape[1:4]
    return Given((hidden_states.flatten(1, 3),), (), {"attn": (grid, block_mask)}, grid)


def _diffused(
    block: Any, hidden_states: Tensor, latent_context: Tensor, modulation: Any, block_mask: Any = None
) -> Given:
    grid = hidden_states.shape[1:4]
    rows = [Row(m.flatten(1, 3), t) for m, t in zip(modulation, block.scale_shift_table, strict=False)]
    layers = {"attn": (grid, block_mask), "context_proj": latent_context}
    return Given((hidden_states.flatten(1, 3),), rows, layers, grid)


def _looks_around(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    grid, mask = layers["attn"]
    return block.attn(h.unflatten(1, grid), mask).flatten(1, 3)


def _as_grid(block: Any, streams: tuple[Tensor, ...], grid: Any) -> Tensor:
    return streams[0].unflatten(1, grid)


def _grid_example(block: Any, side: int) -> tuple:
    D = len(block.norm1.weight)
    x = torch.randn(2, side, side, 1, D)
    if not hasattr(block, "context_proj"):
        return (x,)
    context = torch.randn(2, side, side, 1, block.context_proj.in_features)
    return x, context, tuple(torch.randn(2, 1, 1, 1, D) for _ in block.scale_shift_table)


for name, given, modulated in (
    ("LTX2VideoVaeNABlock", _neighbours, False),
    ("LTX2VideoVaeDiffusionNABlock", _diffused, True),
):
    context = GatedBranch(
        "context_proj", call=lambda block, h, layers: block.context_proj(layers["context_proj"]).flatten(1, 3)
    )
    scales, shifts = ((0, 3), (1, 4)) if modulated else ((None, None), (None, None))
    described(
        name,
        (
            *((context,) if modulated else ()),
            GatedBranch("attn", "norm1", shifts[0], scales[0], call=_looks_around),
            GatedBranch("mlp", "norm2", shifts[1], scales[1]),
        ),
        given=given,
        example=_grid_example,
        options=lambda block: {"block_mask": (torch.ones(3),)},
        finish=_as_grid,
        stand_ins={"attn": of_tokens},  # flex attention
        about="diffusers models/autoencoders/ltx2_diffusion_decoder.py.",
    )

# ---- between frames: Stable Video Diffusion; UVit --------------------------------------------------------------------


def _temporal(
    block: Any, hidden_states: Tensor, num_frames: int, encoder_hidden_states: Tensor | None = None
) -> Given | None:
    if block._chunk_size is not None:
        return None
    x = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2).flatten(0, 1)
    layers = {"attn1": {"encoder_hidden_states": None}, "attn2": {"encoder_hidden_states": encoder_hidden_states}}
    return Given((x,), (), layers, hidden_states.shape[1])


def _temporal_finish(block: Any, streams: tuple[Tensor, ...], tokens: int) -> Tensor:
    return streams[0].unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)


def _temporal_example(block: Any, side: int) -> tuple:
    x = torch.randn(2 * side, side, block.attn1.to_q.in_features)
    return x, side, None if block.attn2 is None else torch.randn(2 * side, _TEXT, block.attn2.to_k.in_features)


described(
    "TemporalBasicTransformerBlock",
    (
        GatedBranch("ff_in", "norm_in"),
        GatedBranch("attn1", "norm1"),
        GatedBranch("attn2", "norm2", optional=True),
        GatedBranch("ff", "norm3"),
    ),
    given=_temporal,
    finish=_temporal_finish,
    example=_temporal_example,
    variant=lambda block: None if block.is_res else "it changes the number of features",
    about="diffusers models/attention.py.",
)


def _skip_ff(block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, cross_attention_kwargs: Any) -> Given:
    context, more = encoder_hidden_states, cross_attention_kwargs or {}
    if block.kv_mapper is not None:
        context = block.kv_mapper(torch.nn.functional.silu(context))
    layers = {"encoder_hidden_states": context, **more}
    return Given((hidden_states,), (), {"attn1": layers, "attn2": layers})


described(
    "SkipFFTransformerBlock",
    (GatedBranch("attn1", "norm1"), GatedBranch("attn2", "norm2")),
    given=_skip_ff,
    example=lambda block, side: (
        torch.randn(2, side**2, block.attn1.to_q.in_features),
        torch.randn(2, _TEXT, (block.kv_mapper or block.attn1.to_k).in_features),
        None,
    ),
    about="diffusers models/attention.py.",
)
