"""Lightricks/LTX-Video's transformer block (`ltx_video/models/transformers/attention.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .described import described
from .description import GatedBranch, Given
from .diffusers_wan import table_gates, table_rows
from .stand_in import of_tokens, width_of

_TEXT = 3


def _given(
    block: Any,
    hidden_states: Tensor,
    freqs_cis: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    skip_layer_mask: Tensor | None = None,
    skip_layer_strategy: Any = None,
) -> Given | None:
    x, table = hidden_states, block.scale_shift_table
    if x.dim() != 3 or x.shape[1] == 1 or cross_attention_kwargs or skip_layer_mask is not None:
        return None
    if block._chunk_size is not None or block.only_cross_attention:
        return None
    rows = table_rows(table, timestep.unflatten(-1, (len(table), -1)), 2)  # type: ignore[union-attr]
    attn1 = {"freqs_cis": freqs_cis, "encoder_hidden_states": None, "attention_mask": attention_mask}
    attn1 |= {"skip_layer_mask": None, "skip_layer_strategy": skip_layer_strategy}
    attn2 = {"freqs_cis": freqs_cis, "encoder_hidden_states": encoder_hidden_states}
    return Given((x,), rows, {"attn1": attn1, "attn2": attn2 | {"attention_mask": encoder_attention_mask}})


def _example(block: Any, side: int) -> tuple:
    D, T = block.scale_shift_table.shape[-1], side**2
    angles = torch.randn(1, T, D)
    masks = torch.zeros(2, 1, T), torch.zeros(2, 1, _TEXT)
    context = torch.randn(2, _TEXT, width_of(block.attn2, "to_k", D))
    return torch.randn(2, T, D), (angles.cos(), angles.sin()), masks[0], context, masks[1], torch.randn(2, 1, 6 * D)


described(
    "LTXBasicTransformerBlock",
    (
        GatedBranch("attn1", "norm1", 0, 1, 2),
        GatedBranch("attn2", optional=True),
        GatedBranch("ff", "norm2", 3, 4, 5),
    ),
    given=_given,
    example=_example,
    gates=table_gates,
    classes=("BasicTransformerBlock",),
    has=("adaptive_norm",),
    variant=lambda block: (
        None if block.adaptive_norm == "single_scale_shift" else f"its adaptive_norm is {block.adaptive_norm}"
    ),
    stand_ins={"attn1": of_tokens, "attn2": of_tokens},
    about="Lightricks/LTX-Video `BasicTransformerBlock`.",
)
