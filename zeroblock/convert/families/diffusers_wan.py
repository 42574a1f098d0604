"""diffusers' Wan 2.1 and 2.2 and what was built on it: VACE, Animate, ChronoEdit, SkyReels-V2, AnyFlow, Helios,
ACE-Step.

A table of six vectors is added to the timestep's (of every token in Wan 2.2 TI2V), norms and gates are computed in
float32, and between self-attention and feed-forward stands a cross-attention without gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import SMALL
from .described import described
from .description import GatedBranch, Given, Row

_TEXT = 3


def table_rows(table: Tensor, temb: Tensor, dim: int) -> list[Row]:
    """The rows of temb, its vectors along `dim`, each with the vector of the table that is added to it."""
    return [Row(rows, t) for rows, t in zip(temb.unbind(dim), table.reshape(-1, table.shape[-1]), strict=True)]


def table_gates(block: Any, i: int) -> tuple[Tensor, ...]:
    """A row of the table is zero, and so are the timestep's"""
    table = block.scale_shift_table.detach()
    return table.reshape(-1, table.shape[-1])[i], torch.empty(1, device="meta")


def _branches(call: Any = None, crossing: Any = None) -> tuple[GatedBranch, ...]:
    return (
        GatedBranch("attn1", "norm1", 0, 1, 2, call=call or _attend),
        GatedBranch("attn2", "norm2", call=crossing or _cross),
        GatedBranch("ffn", "norm3", 3, 4, 5),
    )


def _attend(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.attn1(h, None, *layers["attn1"])


def _cross(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.attn2(h, layers["attn2"], None, None)


def _wan(block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Given:
    return Given((hidden_states,), (), {"attn1": (None, rotary_emb), "attn2": encoder_hidden_states})


def _wan_rows(block: Any, hidden_states: Any, encoder_hidden_states: Any, temb: Tensor, rotary_emb: Any) -> list[Row]:
    # A row for each token in Wan 2.2 TI2V.
    return table_rows(block.scale_shift_table, temb, 2 if temb.dim() == 4 else 1)


def _skyreels(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    attention_mask: Tensor | None,
) -> Given:
    rows = table_rows(block.scale_shift_table, temb, 1)
    return Given((hidden_states,), rows, {"attn1": (attention_mask, rotary_emb), "attn2": encoder_hidden_states})


def _angles(block: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each for both halves of a head's features"""
    width = block.attn1.inner_dim // block.attn1.heads
    angles = torch.randn(1, tokens, 1, width // 2).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def _example(block: Any, side: int) -> tuple:
    D, T = block.scale_shift_table.shape[-1], side**2
    return torch.randn(2, T, D), torch.randn(2, _TEXT, D), torch.randn(2, 6, D), _angles(block, T)


described(
    "WanTransformerBlock",
    _branches(),
    rows=_wan_rows,
    given=_wan,
    example=_example,
    gates=table_gates,
    fp32=True,
    about="diffusers models/transformers/transformer_wan.py, also of Wan Animate and ChronoEdit.",
)
described(
    "SkyReelsV2TransformerBlock",
    _branches(),
    given=_skyreels,
    example=lambda block, side: (*_example(block, side), None),
    options=lambda block: {"attention_mask": (torch.randn(1, 1, SMALL**2, SMALL**2),)},
    gates=table_gates,
    fp32=True,
    about="diffusers models/transformers/transformer_skyreels_v2.py.",
)

# ---- VACE -----------------------------------------------------------------------------------------------------------


def _vace(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> Given:
    control = control_hidden_states
    if block.proj_in is not None:
        control = block.proj_in(control) + hidden_states
    rows = table_rows(block.scale_shift_table, temb, 1)
    return Given((control,), rows, {"attn1": (None, rotary_emb), "attn2": encoder_hidden_states})


def _vace_example(block: Any, side: int) -> tuple:
    x, context, temb, angles = _example(block, side)
    return x, context, torch.randn_like(x), temb, angles


described(
    "WanVACETransformerBlock",
    _branches(),
    given=_vace,
    example=_vace_example,
    gates=table_gates,
    fp32=True,
    finish=lambda block, streams, more: (None if block.proj_out is None else block.proj_out(streams[0]), streams[0]),
    about="diffusers models/transformers/transformer_wan_vace.py.",
)

# ---- AnyFlow, Helios ------------------------------------------------------------------------------------------------


def _anyflow(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    attention_mask: Any,
    kv_cache: Any = None,
    kv_cache_flag: Any = None,
) -> Given | None:
    if kv_cache is not None:
        return None
    attn1 = {"rotary_emb": rotary_emb, "attention_mask": attention_mask}
    rows = table_rows(block.scale_shift_table, temb, 2)
    return Given((hidden_states,), rows, {"attn1": attn1, "attn2": {"encoder_hidden_states": encoder_hidden_states}})


def _anyflow_example(block: Any, side: int) -> tuple:
    x, context, _, _ = _example(block, side)
    half = block.attn1.inner_dim // block.attn1.heads // 2
    angles = torch.polar(torch.ones(1, 1, side**2, half), torch.randn(1, 1, side**2, half))
    return x, context, torch.randn(2, side**2, 6, x.shape[-1]), {"query": angles, "key": angles}, None


described(
    "AnyFlowTransformerBlock",
    (
        GatedBranch("attn1", "norm1", 0, 1, 2),
        GatedBranch("attn2", "norm2"),
        GatedBranch("ffn", "norm3", 3, 4, 5),
    ),
    given=_anyflow,
    example=_anyflow_example,
    gates=table_gates,
    fp32=True,
    variant=lambda block: "its attention is causal, over blocks of tokens" if block.is_causal else None,
    about="diffusers models/transformers/transformer_anyflow.py.",
)


def _helios(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    original_context_length: int | None = None,
) -> Given | None:
    rows = table_rows(block.scale_shift_table, temb, 2 if temb.dim() == 4 else 1)
    layers = {"attn1": (None, rotary_emb, original_context_length)}
    return Given((hidden_states,), rows, layers | {"attn2": (encoder_hidden_states, original_context_length)})


def _helios_crosses(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    """Of the tokens after the history alone, where it guides"""
    context, length = layers["attn2"]
    if not block.guidance_cross_attn:
        return block.attn2(h, context, None, None, length)
    history = h.shape[1] - length
    y = block.attn2(h[:, history:], context, None, None, length)
    return torch.nn.functional.pad(y, (0, 0, history, 0))


def _helios_example(block: Any, side: int) -> tuple:
    x, context, temb, _ = _example(block, side)
    width = block.attn1.inner_dim // block.attn1.heads
    return x, context, temb, torch.randn(2, side**2, 2 * width), side**2 - 1


described(
    "HeliosTransformerBlock",
    _branches(crossing=_helios_crosses),
    given=_helios,
    example=_helios_example,
    gates=table_gates,
    fp32=True,
    about="diffusers models/transformers/transformer_helios.py.",
)

# ---- ACE-Step -------------------------------------------------------------------------------------------------------


def _ace_step(
    block: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Given | None:
    if block.use_cross_attention and encoder_hidden_states is None:
        return None
    attend = {"image_rotary_emb": position_embeddings, "attention_mask": attention_mask}
    cross = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    rows = table_rows(block.scale_shift_table, temb, 1)
    return Given((hidden_states,), rows, {"self_attn": attend, "cross_attn": cross})


def _ace_step_example(block: Any, side: int) -> tuple:
    D, T = block.scale_shift_table.shape[-1], side**2
    attn = block.self_attn
    angles = torch.randn(T, attn.head_dim)
    context = torch.randn(2, _TEXT, D) if block.use_cross_attention else None
    return torch.randn(2, T, D), (angles.cos(), angles.sin()), torch.randn(2, 6, D), None, context


described(
    "AceStepTransformerBlock",
    (
        GatedBranch("self_attn", "self_attn_norm", 0, 1, 2),
        GatedBranch("cross_attn", "cross_attn_norm", optional=True),
        GatedBranch("mlp", "mlp_norm", 3, 4, 5),
    ),
    given=_ace_step,
    gates=table_gates,
    example=_ace_step_example,
    options=lambda block: {"attention_mask": (torch.randn(2, 1, SMALL**2, SMALL**2),)},
    about="diffusers models/transformers/ace_step_transformer.py.",
)
