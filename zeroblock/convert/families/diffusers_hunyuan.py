"""diffusers' HunyuanVideo (1.0, 1.5, FramePack), HunyuanImage 2.1 and Motif-Video: Flux's blocks with the text behind
the image, and the blocks that refine the text, whose norms have no modulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.remade import joined
from ..family import SMALL
from .described import described
from .description import GatedBranch, Given
from .diffusers_flux import TEXT, TWO_STREAMS, one_stream, rotary, rows_of, tokens

# ---- two streams -----------------------------------------------------------------------------------------------------


def _two(block: Any, x: Tensor, context: Tensor, temb: Tensor, mask: Tensor | None, angles: Any) -> Given:
    rows = (*rows_of(block.norm1, temb, 6), *rows_of(block.norm1_context, temb, 6))
    return Given((x, context), rows, {"attn": {"attention_mask": mask, "image_rotary_emb": angles}})


def _video(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Given:
    return _two(block, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis)


def _image(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Given:
    return _two(block, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb)


def _motif(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    image_embed_seq_len: int = 0,
) -> Given:
    return _two(block, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb)


def _crosses(block: Any) -> str | None:
    return "it has a cross-attention to what attention gave" if block.cross_attn is not None else None


def _two_example(block: Any, side: int) -> tuple:
    D = block.norm1.linear.in_features
    return *tokens(D, side), torch.randn(2, D)


def _mask(side: int = SMALL) -> Tensor:
    mask = torch.ones(2, 1, 1, side**2 + TEXT, dtype=torch.bool)
    mask[1, ..., -1] = False
    return mask


def _with_text_mask(block: Any, side: int) -> tuple:
    return *_two_example(block, side), torch.tensor([[True] * TEXT, [True] * (TEXT - 1) + [False]])


def _with_angles(block: Any) -> dict[str, tuple]:
    return {"freqs_cis": (rotary(block.attn, SMALL**2),)}


def _two_options(block: Any) -> dict[str, tuple]:
    angles = (rotary(block.attn, SMALL**2),)
    return {"attention_mask": (_mask(),), "freqs_cis": angles, "image_rotary_emb": angles, "image_embed_seq_len": (1,)}


for name, given, example in (
    ("HunyuanVideoTransformerBlock", _video, _two_example),
    ("HunyuanVideo15TransformerBlock", _video, _with_text_mask),
    ("HunyuanImageTransformerBlock", _image, _two_example),
    ("MotifVideoTransformerBlock", _motif, _two_example),
):
    described(
        name,
        TWO_STREAMS,
        given=given,
        example=example,
        options=_with_angles if example is _with_text_mask else _two_options,
        linear=("norm1.linear", "norm1_context.linear"),
        variant=_crosses if given is _motif else None,
        about="diffusers, a two-stream block of HunyuanVideo.",
    )

# ---- one stream ------------------------------------------------------------------------------------------------------


def _one(block: Any, x: Tensor, context: Tensor, temb: Tensor, mask: Tensor | None, angles: Any) -> Given:
    text = context.shape[1]
    attn = {"attention_mask": mask, "image_rotary_emb": angles}
    return Given((torch.cat([x, context], dim=1),), rows_of(block.norm, temb, 3), {"attn": attn, "text": text}, text)


def _video_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Given:
    return _one(block, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb)


def _motif_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    image_embed_seq_len: int = 0,
) -> Given:
    given = _one(block, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb)
    given.layers["image"] = image_embed_seq_len
    return given


def _beside(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    """Attention of image and text, and the MLP, side by side"""
    x, context = h[:, : -layers["text"]], h[:, -layers["text"] :]
    attn, of_context = block.attn(hidden_states=x, encoder_hidden_states=context, **layers["attn"])
    if getattr(block, "cross_attn", None) is not None:
        image = layers["image"]
        attn = attn + block.cross_attn(attn, encoder_hidden_states=context, image_embed_seq_len=image, **layers["attn"])
    return joined([torch.cat([attn, of_context], dim=1), block.act_mlp(block.proj_mlp(h))], dim=2)


def _image_first(block: Any, streams: tuple[Tensor, ...], text: int) -> tuple[Tensor, Tensor]:
    return streams[0][:, :-text], streams[0][:, -text:]


def _one_example(block: Any, side: int) -> tuple:
    D = block.norm.linear.in_features
    return *tokens(D, side), torch.randn(2, D)


for name, given in (
    ("HunyuanVideoSingleTransformerBlock", _video_single),
    ("HunyuanImageSingleTransformerBlock", _video_single),
    ("MotifVideoSingleTransformerBlock", _motif_single),
):
    described(
        name,
        one_stream(_beside, "cross_attn"),
        given=given,
        example=_one_example,
        options=lambda block: {
            "attention_mask": (_mask(),),
            "image_rotary_emb": (rotary(block.attn, SMALL**2),),
            "image_embed_seq_len": (1,),
        },
        linear="norm.linear",
        finish=_image_first,
        about="diffusers, a one-stream block of HunyuanVideo.",
    )

# ---- the first frame's tokens have rows of their own ----------------------------------------------------------------


def _with_own_rows(norm: Any, temb: Tensor, token_replace_emb: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """Rows of the frames and of the first one"""
    both = [norm.linear(norm.silu(emb)) for emb in (temb, token_replace_emb)]
    return torch.stack(torch.broadcast_tensors(*both), dim=1).chunk(chunks, dim=-1)


def _is_first(x: Tensor, num_tokens: int) -> Tensor:
    """For each token the number of its row"""
    return (torch.arange(x.shape[1], device=x.device) < num_tokens).int()


def _replaced(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Any = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> Given:
    assert token_replace_emb is not None and num_tokens is not None
    own = _with_own_rows(block.norm1, temb, token_replace_emb, 6)
    rows = (*own, *rows_of(block.norm1_context, temb, 6))
    layers = {"attn": {"attention_mask": attention_mask, "image_rotary_emb": freqs_cis}}
    streams = (hidden_states, encoder_hidden_states)
    return Given(streams, rows, layers, which=(_is_first(hidden_states, num_tokens), None))


def _replaced_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> Given:
    assert token_replace_emb is not None and num_tokens is not None
    given = _one(block, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb)
    rows = _with_own_rows(block.norm, temb, token_replace_emb, 3)
    x: Any = given.streams[0]
    return given._replace(rows=rows, which=(_is_first(x, num_tokens),))


def _replaced_example(block: Any, side: int) -> tuple:
    x, context, temb = _one_example(block, side) if hasattr(block, "norm") else _two_example(block, side)
    return x, context, temb, None, None, torch.randn_like(temb), 1


described(
    "HunyuanVideoTokenReplaceTransformerBlock",
    TWO_STREAMS,
    given=_replaced,
    example=_replaced_example,
    options=_two_options,
    about="diffusers models/transformers/transformer_hunyuan_video.py, of image to video.",
)
described(
    "HunyuanVideoTokenReplaceSingleTransformerBlock",
    one_stream(_beside),
    given=_replaced_single,
    example=_replaced_example,
    options=_two_options,
    finish=_image_first,
    about="diffusers models/transformers/transformer_hunyuan_video.py, of image to video.",
)

# ---- the refiners of the text ----------------------------------------------------------------------------------------


def _refined(block: Any, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None = None) -> Given:
    return Given((hidden_states,), block.norm_out(temb), {"attn": {"attention_mask": attention_mask}})


def _refined_example(block: Any, side: int) -> tuple:
    linear = block.norm_out.linear
    return torch.randn(2, side**2, linear.out_features // 2), torch.randn(2, linear.in_features)


for name in ("HunyuanVideo", "HunyuanVideo15", "HunyuanImage"):
    described(
        f"{name}IndividualTokenRefinerBlock",
        (GatedBranch("attn", "norm1", gate=0), GatedBranch("ff", "norm2", gate=1)),
        given=_refined,
        example=_refined_example,
        options=lambda block: {"attention_mask": (_mask()[..., : SMALL**2],)},
        linear="norm_out.linear",
        about="diffusers, of the token refiner of HunyuanVideo.",
    )
