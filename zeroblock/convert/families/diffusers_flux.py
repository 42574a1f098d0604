"""diffusers' blocks in the manner of Flux: two streams with one attention, then one stream whose attention and MLP run
side by side (`models/transformers/transformer_{flux,flux2,flux3,longcat_image,bria,bria_fibo,ovis_image,chroma}`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.remade import joined
from ..family import SMALL
from .described import described
from .description import GatedBranch, Given, Joined

# What a proof has as text.
TEXT = 3

TWO_STREAMS = (
    GatedBranch("attn", "norm1.norm", 0, 1, 2, context=GatedBranch("attn", "norm1_context.norm", 6, 7, 8, stream=1)),
    GatedBranch("ff", "norm2", 3, 4, 5),
    GatedBranch("ff_context", "norm2_context", 9, 10, 11, stream=1),
)


def clipped(x: Tensor) -> Tensor:
    """diffusers keeps fp16 streams finite."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def rows_of(norm: Any, emb: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """The rows that diffusers' AdaLayerNormZero makes of its condition."""
    return norm.linear(norm.silu(emb)).chunk(chunks, dim=-1)


def beside(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    """Attention and MLP of the same tokens, side by side"""
    return joined([block.attn(hidden_states=h, **layers["attn"]), block.act_mlp(block.proj_mlp(h))], dim=2)


def one_stream(call: Any = None, *others: str) -> tuple[GatedBranch, ...]:
    """The branch of a block in which attention and MLP run side by side; `others` of its modules take part too."""
    others = ("proj_mlp", "act_mlp", *others)
    return (GatedBranch("attn", "norm.norm", 0, 1, 2, call=call or beside, last="proj_out", others=others),)


def text_first(block: Any, streams: tuple[Tensor, ...], more: Any) -> tuple[Tensor, Tensor]:
    x, context = streams
    return clipped(context), x


def whole(block: Any, streams: tuple[Tensor, ...], text: int | None) -> Any:
    """The stream, and where it holds `text` tokens before the others', both parts."""
    x = clipped(streams[0])
    return x if text is None else (x[:, :text], x[:, text:])


def tokens(D: int, side: int) -> tuple[Tensor, Tensor]:
    """Image and text for a proof."""
    return torch.randn(2, side**2, D), torch.randn(2, TEXT, D)


def rotary(attn: Any, tokens: int = SMALL**2 + TEXT) -> tuple[Tensor, Tensor]:
    """(cos, sin) of a proof's tokens."""
    angles = torch.randn(tokens, attn.inner_dim // attn.heads)
    return angles.cos(), angles.sin()


def adapts(block: Any) -> bool:
    """What an image prompt's adapter adds has no gate."""
    return hasattr(block.attn.processor, "to_k_ip")


def kwargs_options(attention: str) -> Any:
    """With the name of the argument that goes to the attention processor."""
    return lambda block: {"image_rotary_emb": (rotary(block.attn),), attention: ({},)}


# ---- Flux, LongCat-Image, Bria, Ovis ---------------------------------------------------------------------------------


def _flux(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Given | None:
    if joint_attention_kwargs or adapts(block):
        return None
    return Given((hidden_states, encoder_hidden_states), (), {"attn": {"image_rotary_emb": image_rotary_emb}})


def _rows(
    block: Any, hidden_states: Any, encoder_hidden_states: Any, temb: Tensor, image_rotary_emb: Any = None, **more: Any
) -> tuple[Tensor, ...]:
    return *rows_of(block.norm1, temb, 6), *rows_of(block.norm1_context, temb, 6)


def _single_rows(
    block: Any, hidden_states: Any, encoder_hidden_states: Any, temb: Tensor, image_rotary_emb: Any = None, **more: Any
) -> tuple[Tensor, ...]:
    return rows_of(block.norm, temb, 3)


def _bria(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> Given | None:
    return _flux(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)


def _flux_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Given | None:
    if joint_attention_kwargs:
        return None
    x = Joined(encoder_hidden_states, hidden_states)
    return Given((x,), (), {"attn": {"image_rotary_emb": image_rotary_emb}}, encoder_hidden_states.shape[1])


def _bria_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> Given | None:
    return _flux_single(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)


def _fibo_single(
    block: Any,
    hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Given | None:
    if joint_attention_kwargs:
        return None
    return Given((hidden_states,), (), {"attn": {"image_rotary_emb": image_rotary_emb}})


def _fibo_rows(
    block: Any, hidden_states: Any, temb: Tensor, image_rotary_emb: Any = None, joint_attention_kwargs: Any = None
) -> tuple[Tensor, ...]:
    return rows_of(block.norm, temb, 3)


def _ovis_beside(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    mlp, gate = block.proj_mlp(h).split([block.mlp_hidden_dim, block.mlp_hidden_dim], dim=-1)
    return joined([block.attn(hidden_states=h, **layers["attn"]), block.act_mlp(gate) * mlp], dim=2)


def _of_two(block: Any, side: int) -> tuple:
    D = block.norm1.linear.in_features
    return *tokens(D, side), torch.randn(2, D)


def _of_one(block: Any, side: int) -> tuple:
    D = block.norm.linear.in_features
    return *tokens(D, side), torch.randn(2, D)


for origin, given, single, kwargs in (
    ("Flux", _flux, _flux_single, "joint_attention_kwargs"),
    ("LongCatImage", _flux, _flux_single, "joint_attention_kwargs"),
    ("Bria", _bria, _bria_single, "attention_kwargs"),
    ("BriaFibo", _flux, _fibo_single, "joint_attention_kwargs"),
    ("OvisImage", _flux, _flux_single, "joint_attention_kwargs"),
):
    described(
        f"{origin}TransformerBlock",
        TWO_STREAMS,
        rows=_rows,
        given=given,
        example=_of_two,
        options=kwargs_options(kwargs),
        linear=("norm1.linear", "norm1_context.linear"),
        finish=text_first,
        about="diffusers, a two-stream block of Flux.",
    )
    described(
        f"{origin}SingleTransformerBlock",
        one_stream(_ovis_beside) if origin == "OvisImage" else one_stream(),
        rows=_fibo_rows if single is _fibo_single else _single_rows,
        given=single,
        example=_of_one if single is not _fibo_single else lambda block, side: _of_one(block, side)[::2],
        options=(
            kwargs_options(kwargs)
            if single is not _fibo_single
            else lambda block: {"image_rotary_emb": (rotary(block.attn, SMALL**2),), "joint_attention_kwargs": ({},)}
        ),
        linear="norm.linear",
        finish=whole,
        about="diffusers, a one-stream block of Flux.",
    )
