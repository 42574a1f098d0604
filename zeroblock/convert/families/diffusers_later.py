"""diffusers' blocks of Bria Fibo 2, Qwen-Image 2.1 and Stable Audio 3, and those without modulation that refine the
text of Krea 2 and MiniMax-H3; ERNIE-Image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..family import SMALL
from .described import described
from .description import GatedBranch, Given, Row
from .diffusers_flux import clipped

_TEXT = 3

# ---- Bria Fibo 2: Z-Image's block, with a cross-attention in some of them -------------------------------------------


def _fibo2(
    block: Any,
    x: Tensor,
    attn_mask: Any,
    freqs_cis: Any,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Any = None,
) -> Given:
    layers: dict[str, Any] = {"attention": {"attention_mask": attn_mask, "freqs_cis": freqs_cis}}
    cross = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    index = None
    if noise_mask is None:
        rows = block.adaLN_modulation(adaln_input).chunk(4, dim=1)
    else:
        both = torch.stack([block.adaLN_modulation(c) for c in (adaln_clean, adaln_noisy)], dim=1)
        rows, index = both.chunk(4, dim=-1), (noise_mask == 1).int()
    if block.cross_attention is not None:
        rows = (*rows, Row(None, block.cross_attn_gate.expand(x.shape[-1])))
    return Given((x,), rows, layers | {"cross_attention": cross}, which=(index,))


def _fibo2_example(block: Any, side: int) -> tuple:
    linear, T = block.adaLN_modulation[0], side**2
    D = linear.out_features // 4
    angles = torch.polar(torch.ones(2, T, 1), torch.randn(2, T, 1)).expand(2, T, D // block.attention.heads // 2)
    text = None if block.cross_attention is None else torch.randn(2, _TEXT, block.cross_attention.to_k.in_features)
    c = [torch.randn(2, linear.in_features) for _ in range(3)]
    return torch.randn(2, T, D), torch.ones(2, T, dtype=torch.bool), angles, c[0], None, c[1], c[2], text


def _fibo2_options(block: Any) -> dict[str, tuple]:
    found: dict[str, tuple] = {"noise_mask": (torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1]]),)}
    if block.cross_attention is not None:
        found["encoder_attention_mask"] = (torch.tensor([[True] * _TEXT, [True] * (_TEXT - 1) + [False]]),)
    return found


described(
    "BriaFibo2TransformerBlock",
    (
        GatedBranch("attention", "attention_norm1", scale=0, gate=1, tanh=True, after="attention_norm2"),
        GatedBranch("cross_attention", "cross_attn_norm1", gate=4, tanh=True, after="cross_attn_norm2", optional=True),
        GatedBranch("feed_forward", "ffn_norm1", scale=2, gate=3, tanh=True, after="ffn_norm2"),
    ),
    given=_fibo2,
    example=_fibo2_example,
    options=_fibo2_options,
    about="diffusers models/transformers/transformer_bria_fibo2.py.",
)

# ---- Qwen-Image 2.1: the text's tokens have the rows of t = 0 -------------------------------------------------------


def _qwen21(
    block: Any,
    hidden_states: Tensor,
    modulation: Tensor,
    rotary_emb: Any = None,
    attention_mask: Any = None,
    target_token_mask: Tensor | None = None,
    layer_cache: Any = None,
    kv_cache_mode: str | None = None,
    cache_write_slice: Any = None,
    segments: Any = None,
    key_valid: Any = None,
) -> Given | None:
    x, index = hidden_states, None
    if layer_cache is not None:
        return None
    if target_token_mask is not None:  # a row of each sample for its own image, the last for the rest
        own = torch.arange(x.shape[0], device=x.device)[:, None]
        index = torch.where(target_token_mask[None], own, x.shape[0])
    attn = {
        "attention_mask": attention_mask,
        "rotary_emb": rotary_emb,
        "layer_cache": layer_cache,
        "kv_cache_mode": kv_cache_mode,
        "cache_write_slice": cache_write_slice,
        "segments": segments,
        "key_valid": key_valid,
    }
    return Given((x,), modulation.chunk(4, dim=-1), {"attn": attn}, which=(index,))


def _qwen21_example(block: Any, side: int) -> tuple:
    D = block.attn.to_q.in_features
    mask = torch.arange(side**2) > 1
    return torch.randn(3, side**2, D), torch.randn(4, 4 * D), None, None, mask


def _qwen21_options(block: Any) -> dict[str, tuple]:
    half, T = block.attn.inner_dim // block.attn.heads // 2, SMALL**2
    valid = torch.tensor([[True] * T, [True] * T, [False] + [True] * (T - 1)])
    angles = torch.polar(torch.ones(T, half), torch.randn(T, half))
    return {"rotary_emb": (angles,), "segments": ([(0, 1, True), (1, 2, False)],), "key_valid": (valid,)}


described(
    "QwenImage21TransformerBlock",
    (
        GatedBranch("attn", "img_norm1", scale=0, gate=1, tanh=True),
        GatedBranch("img_mlp", "img_norm2", scale=2, gate=3, tanh=True),
    ),
    given=_qwen21,
    example=_qwen21_example,
    options=_qwen21_options,
    finish=lambda block, streams, more: clipped(streams[0]),
    about="diffusers models/transformers/transformer_qwenimage21.py.",
)

# ---- Stable Audio 3: gates through a sigmoid ------------------------------------------------------------------------


def _stable_audio3(
    block: Any,
    hidden_states: Tensor,
    context: Tensor,
    global_modulation: Tensor,
    rope: Any,
    context_mask: Any = None,
    local_seq: Tensor | None = None,
    num_memory_tokens: int = 0,
) -> Given:
    rows = [*(block.to_scale_shift_gate + global_modulation).chunk(6, dim=-1)]
    rows[2], rows[5] = torch.sigmoid(1 - rows[2]), torch.sigmoid(1 - rows[5])
    layers = {"self_attn": {"rope": rope}, "cross_attn": {"context": context, "context_mask": context_mask}}
    return Given((hidden_states,), rows, layers | {"to_local_embed": (local_seq, num_memory_tokens)})


def _local(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor | None:
    """For the tokens of the audio alone, which come after the memory's"""
    local_seq, memory = layers["to_local_embed"]
    return None if local_seq is None else F.pad(block.to_local_embed(local_seq), (0, 0, memory, 0))


def _stable_audio3_example(block: Any, side: int) -> tuple:
    D, T = block.to_scale_shift_gate.shape[0] // 6, side**2
    width = (
        block.cross_attn.to_kv.in_features if hasattr(block.cross_attn, "to_kv") else block.cross_attn.to_k.in_features
    )
    attn = block.self_attn
    rope = torch.randn(T, getattr(attn, "dim_heads", D) // 2)
    return torch.randn(2, T, D), torch.randn(2, _TEXT, width), torch.randn(2, 6 * D), rope


def _stable_audio3_options(block: Any) -> dict[str, tuple]:
    local = torch.randn(2, SMALL**2, block.to_local_embed[0].in_features)
    return {"local_seq": (local,), "context_mask": (torch.ones(2, _TEXT, dtype=torch.bool),), "num_memory_tokens": (1,)}


described(
    "StableAudio3DiTBlock",
    (
        GatedBranch("self_attn", "pre_norm", shift=1, scale=0, gate=2),
        GatedBranch("cross_attn", "cross_attend_norm"),
        GatedBranch("to_local_embed", call=_local),
        GatedBranch("ff", "ff_norm", shift=4, scale=3, gate=5),
    ),
    given=_stable_audio3,
    example=_stable_audio3_example,
    options=_stable_audio3_options,
    about="diffusers models/transformers/transformer_stable_audio3.py.",
)

# ---- without a modulation -------------------------------------------------------------------------------------------

_PLAIN = (GatedBranch("attn", "norm1"), GatedBranch("ff", "norm2"))


def _fused_text(block: Any, hidden_states: Tensor, attention_mask: Any = None) -> Given:
    return Given((hidden_states,), (), {"attn": {"attention_mask": attention_mask}})


described(
    "Krea2TextFusionBlock",
    _PLAIN,
    given=_fused_text,
    example=lambda block, side: (torch.randn(2, side**2, block.attn.to_q.in_features),),
    options=lambda block: {"attention_mask": (torch.randn(2, 1, SMALL**2, SMALL**2),)},
    about="diffusers models/transformers/transformer_krea2.py.",
)
described(
    "MiniMaxH3TokenRefinerBlock",
    _PLAIN,
    given=lambda block, hidden_states: Given((hidden_states,)),
    example=lambda block, side: (torch.randn(2, side**2, block.attn.to_q.in_features),),
    about="diffusers models/transformers/transformer_minimax_h3.py.",
)

# ---- ERNIE-Image: tokens before samples -----------------------------------------------------------------------------


def _ernie(block: Any, x: Tensor, rotary_pos_emb: Any, temb: Any, attention_mask: Any = None) -> Given:
    # A row for each token of each sample, all as one sample.
    rows = [row.expand_as(x).reshape(1, -1, x.shape[-1]) for row in temb]
    attend = {"attention_mask": attention_mask, "image_rotary_emb": rotary_pos_emb}
    return Given((x.reshape(1, -1, x.shape[-1]),), rows, {"self_attention": (x.shape, attend)}, x.shape)


def _ernie_attends(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    size, attend = layers["self_attention"]
    y = block.self_attention(h.view(size).permute(1, 0, 2), **attend)
    return y.permute(1, 0, 2).reshape(h.shape)


def _ernie_feeds(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    size, _ = layers["self_attention"]
    return block.mlp(h.view(size)).view(h.shape)


def _ernie_example(block: Any, side: int) -> tuple:
    attn, T = block.self_attention, side**2
    D = attn.to_q.in_features
    angles = torch.randn(3, T, 1, D // attn.heads)
    return torch.randn(T, 3, D), angles, tuple(torch.randn(T, 3, D) for _ in range(6))


described(
    "ErnieImageSharedAdaLNBlock",
    (
        GatedBranch("self_attention", "adaLN_sa_ln", 0, 1, 2, call=_ernie_attends),
        GatedBranch("mlp", "adaLN_mlp_ln", 3, 4, 5, call=_ernie_feeds),
    ),
    given=_ernie,
    example=_ernie_example,
    options=lambda block: {"attention_mask": (torch.ones(3, 1, 1, SMALL**2, dtype=torch.bool),)},
    fp32=True,
    finish=lambda block, streams, size: streams[0].view(size),
    about="diffusers models/transformers/transformer_ernie_image.py.",
)
