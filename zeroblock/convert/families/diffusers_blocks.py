"""diffusers' blocks of one stream with rows of their own linear, attention and feed-forward one after the other: Stable
Diffusion 3.5's, PRX, Cosmos, AuraFlow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import SMALL
from .described import described
from .description import GatedBranch, Given
from .diffusers_flux import rows_of, tokens

_TEXT = 3

# ---- Stable Diffusion 3.5, of one stream ----------------------------------------------------------------------------

described(
    "SD3SingleTransformerBlock",
    (GatedBranch("attn", "norm1.norm", 0, 1, 2), GatedBranch("ff", "norm2", 3, 4, 5)),
    given=lambda block, hidden_states, temb: Given((hidden_states,), rows_of(block.norm1, temb, 6)),
    example=lambda block, side: tuple(torch.randn(2, *n, block.norm1.linear.in_features) for n in ((side**2,), ())),
    linear="norm1.linear",
    about="diffusers models/transformers/transformer_sd3.py.",
)

# ---- PRX ------------------------------------------------------------------------------------------------------------


def _prx(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Given:
    attn, mlp = block.modulation(temb)
    attend = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
    return Given((hidden_states,), (*attn, *mlp), {"attention": attend | {"image_rotary_emb": image_rotary_emb}})


def _prx_mlp(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.mlp_act(block.gate_proj(h)) * block.up_proj(h)


def _prx_example(block: Any, side: int) -> tuple:
    x, context = tokens(block.hidden_size, side)
    angles = torch.randn(2, 1, side**2, block.head_dim // 2, 2, 2)
    return x, context, torch.randn(2, block.hidden_size), angles


def _prx_options(block: Any) -> dict[str, tuple]:
    mask = torch.ones(2, _TEXT, dtype=torch.bool)
    mask[1, -1] = False
    return {"attention_mask": (mask,)}


described(
    "PRXBlock",
    (
        GatedBranch("attention", "img_pre_norm", 0, 1, 2),
        GatedBranch(
            "gate_proj",
            "post_attention_layernorm",
            3,
            4,
            5,
            call=_prx_mlp,
            last="down_proj",
            others=("up_proj", "mlp_act"),
        ),
    ),
    given=_prx,
    example=_prx_example,
    options=_prx_options,
    linear="modulation.lin",
    about="diffusers models/transformers/transformer_prx.py.",
)

# ---- Cosmos ---------------------------------------------------------------------------------------------------------


def _cosmos(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Any,
    embedded_timestep: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    extra_pos_emb: Tensor | None = None,
    attention_mask: Any = None,
    controlnet_residual: Tensor | None = None,
    latents: Tensor | None = None,
    block_idx: int | None = None,
) -> Given:
    x = hidden_states
    if block.before_proj is not None:
        x = block.before_proj(x) + latents
    if extra_pos_emb is not None:
        x = x + extra_pos_emb
    rows: list[Tensor] = []
    for norm in (block.norm1, block.norm2, block.norm3):
        three = norm.linear_2(norm.linear_1(norm.activation(embedded_timestep)))
        rows += (three if temb is None else three + temb).chunk(3, dim=-1)
    cross = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
    layers = {"attn1": {"image_rotary_emb": image_rotary_emb}, "attn2": cross}
    return Given((x,), rows, layers, controlnet_residual)


def _cosmos_finish(block: Any, streams: tuple[Tensor, ...], controlnet_residual: Tensor | None) -> Any:
    (x,) = streams
    x = x if controlnet_residual is None else x + controlnet_residual
    return x if block.after_proj is None else (x, block.after_proj(x))


def _cosmos_example(block: Any, side: int) -> tuple:
    linear = block.norm1.linear_2
    D = linear.out_features // 3
    width = getattr(block.attn2, "cross_attention_dim", None) or D
    x, text = torch.randn(2, side**2, D), torch.randn(2, _TEXT, width)
    context = (text, None) if block.img_context else text
    latents = torch.randn(2, side**2, D)  # which only the first block of a ControlNet adds
    return x, context, torch.randn(2, D), torch.randn(2, 3 * D), None, None, None, None, latents


def _cosmos_options(block: Any) -> dict[str, tuple]:
    linear, attn = block.norm1.linear_2, block.attn1
    D = linear.out_features // 3
    angles = torch.randn(SMALL**2, attn.inner_dim // attn.heads)
    added = torch.randn(2, SMALL**2, D)
    mask = torch.zeros(2, 1, 1, _TEXT)
    mask[1, ..., -1] = -10000.0
    found = {"image_rotary_emb": ((angles.cos(), angles.sin()),), "extra_pos_emb": (added,), "block_idx": (1,)}
    found |= {"attention_mask": ((mask, None) if block.img_context else mask,)}
    return found if block.after_proj is not None else found | {"controlnet_residual": (added,)}


described(
    "CosmosTransformerBlock",
    (
        GatedBranch("attn1", "norm1.norm", 0, 1, 2),
        GatedBranch("attn2", "norm2.norm", 3, 4, 5),
        GatedBranch("ff", "norm3.norm", 6, 7, 8),
    ),
    given=_cosmos,
    example=_cosmos_example,
    options=_cosmos_options,
    finish=_cosmos_finish,
    about="diffusers models/transformers/transformer_cosmos.py.",
)

# ---- AuraFlow: what attention adds is seen by the feed-forward alone ------------------------------------------------


def _aura(block: Any, hidden_states: Tensor, temb: Tensor, attention_kwargs: dict[str, Any] | None = None) -> Given:
    x = hidden_states
    return Given((x, x), rows_of(block.norm1, temb, 6), {"attn": attention_kwargs or {}})


def _aura_joint(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_kwargs: dict[str, Any] | None = None,
) -> Given:
    x, context = hidden_states, encoder_hidden_states
    rows = (*rows_of(block.norm1, temb, 6), *rows_of(block.norm1_context, temb, 6))
    return Given((x, context, x, context), rows, {"attn": attention_kwargs or {}})


def _aura_attends(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.attn(hidden_states=h, **layers["attn"])


def _aura_example(block: Any, side: int) -> tuple:
    D = block.norm1.linear.in_features
    joint = hasattr(block, "norm1_context")
    x, context = tokens(D, side)
    return (x, context, torch.randn(2, D)) if joint else (x, torch.randn(2, D))


described(
    "AuraFlowSingleTransformerBlock",
    (
        GatedBranch("attn", "norm1.norm", 0, 1, 2, call=_aura_attends, stream=1),
        GatedBranch("ff", "norm2", 3, 4, 5, reads=1),
    ),
    given=_aura,
    example=_aura_example,
    options=lambda block: {"attention_kwargs": ({},)},
    linear="norm1.linear",
    finish=lambda block, streams, more: streams[0],
    about="diffusers models/transformers/auraflow_transformer_2d.py.",
)
described(
    "AuraFlowJointTransformerBlock",
    (
        GatedBranch(
            "attn",
            "norm1.norm",
            0,
            1,
            2,
            stream=2,
            context=GatedBranch("attn", "norm1_context.norm", 6, 7, 8, stream=3),
        ),
        GatedBranch("ff", "norm2", 3, 4, 5, reads=2),
        GatedBranch("ff_context", "norm2_context", 9, 10, 11, stream=1, reads=3),
    ),
    given=_aura_joint,
    example=_aura_example,
    options=lambda block: {"attention_kwargs": ({},)},
    linear=("norm1.linear", "norm1_context.linear"),
    finish=lambda block, streams, more: (streams[1], streams[0]),
    about="diffusers models/transformers/auraflow_transformer_2d.py.",
)
