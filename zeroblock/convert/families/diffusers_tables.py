"""diffusers' blocks that add a table of their own to the vectors of the timestep, in the tokens' dtype: LTX-Video,
SANA and SANA-Video, Allegro, LongCat's AudioDiT, Krea 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..family import SMALL
from .described import described
from .description import GatedBranch, Given
from .diffusers_wan import table_gates, table_rows

_TEXT = 3


def _text_mask() -> Tensor:
    mask = torch.zeros(2, 1, _TEXT)
    mask[1, :, -1] = -10000.0
    return mask


# ---- LTX-Video ------------------------------------------------------------------------------------------------------


def _ltx(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> Given:
    x, table = hidden_states, block.scale_shift_table
    rows = table_rows(table, temb.reshape(x.shape[0], temb.shape[1], len(table), -1), 2)
    cross = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    layers = {"attn1": {"encoder_hidden_states": None, "image_rotary_emb": image_rotary_emb}}
    return Given((x,), rows, layers | {"attn2": cross | {"image_rotary_emb": None}})


def _ltx_example(block: Any, side: int) -> tuple:
    D, context = block.scale_shift_table.shape[-1], block.attn2.to_k.in_features
    return torch.randn(2, side**2, D), torch.randn(2, _TEXT, context), torch.randn(2, 1, 6 * D)


def _ltx_options(block: Any) -> dict[str, tuple]:
    angles = torch.randn(2, SMALL**2, block.scale_shift_table.shape[-1])
    return {"image_rotary_emb": ((angles.cos(), angles.sin()),), "encoder_attention_mask": (_text_mask(),)}


described(
    "LTXVideoTransformerBlock",
    (
        GatedBranch("attn1", "norm1", 0, 1, 2),
        GatedBranch("attn2"),
        GatedBranch("ff", "norm2", 3, 4, 5),
    ),
    given=_ltx,
    gates=table_gates,
    example=_ltx_example,
    options=_ltx_options,
    about="diffusers models/transformers/transformer_ltx.py.",
)

# ---- SANA -----------------------------------------------------------------------------------------------------------


def _sana(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Given:
    x = hidden_states
    rows = table_rows(block.scale_shift_table, timestep.reshape(x.shape[0], 6, -1), 1)  # type: ignore[union-attr]
    cross = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    return Given((x,), rows, {"attn2": cross, "ff": (height, width)})


def _sana_video(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rotary_emb: Any = None,
) -> Given:
    x = hidden_states
    t = timestep.reshape(x.shape[0], timestep.shape[1], 6, -1)  # type: ignore[union-attr]
    cross = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    layers = {"attn1": {"rotary_emb": rotary_emb}, "attn2": cross, "ff": (frames, height, width)}
    return Given((x,), table_rows(block.scale_shift_table, t, 2), layers)


def _as_image(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    y = block.ff(h.unflatten(1, layers["ff"]).permute(0, 3, 1, 2))
    return y.flatten(2, 3).permute(0, 2, 1)


def _as_video(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.ff(h.unflatten(1, layers["ff"])).flatten(1, 3)


def _sana_example(block: Any, side: int) -> tuple:
    D = block.scale_shift_table.shape[-1]
    context = torch.randn(2, _TEXT, block.attn2.to_k.in_features)
    return torch.randn(2, side**2, D), None, context, None, torch.randn(2, 6 * D), side, side


def _sana_video_example(block: Any, side: int) -> tuple:
    D = block.scale_shift_table.shape[-1]
    x, *rest = _sana_example(block, side)
    rest[3] = torch.randn(2, 1, 6 * D)
    angles = torch.randn(1, 1, side**2, block.attn1.inner_dim // block.attn1.heads // 2).repeat_interleave(2, dim=-1)
    return x, *rest[:4], 1, side, side, (angles.cos().transpose(1, 2), angles.sin().transpose(1, 2))


for name, given, example, feed in (
    ("SanaTransformerBlock", _sana, _sana_example, _as_image),
    ("SanaVideoTransformerBlock", _sana_video, _sana_video_example, _as_video),
):
    described(
        name,
        (
            GatedBranch("attn1", "norm1", 0, 1, 2),
            GatedBranch("attn2", optional=True),
            GatedBranch("ff", "norm2", 3, 4, 5, call=feed),
        ),
        given=given,
        gates=table_gates,
        example=example,
        options=lambda block: {"encoder_attention_mask": (_text_mask(),)},
        about="diffusers, a block of SANA; its feed-forward is a convolution.",
    )

# ---- Allegro --------------------------------------------------------------------------------------------------------


def _allegro(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Given:
    x = hidden_states
    rows = table_rows(block.scale_shift_table, temb.reshape(x.shape[0], 6, -1), 1)  # type: ignore[union-attr]
    cross = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    attend = {"encoder_hidden_states": None, "attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
    return Given((x,), rows, {"attn1": attend, "attn2": cross | {"image_rotary_emb": None}})


def _allegro_example(block: Any, side: int) -> tuple:
    D, context = block.scale_shift_table.shape[-1], block.attn2.to_k.in_features
    return torch.randn(2, side**2, D), torch.randn(2, _TEXT, context), torch.randn(2, 6 * D)


def _allegro_options(block: Any) -> dict[str, tuple]:
    width = block.attn1.inner_dim // block.attn1.heads // 3
    angles = [torch.randn(1, SMALL**2, width) for _ in range(3)]
    at = [torch.zeros(1, SMALL**2, dtype=torch.long)] * 3
    return {
        "image_rotary_emb": (([(a[0].cos(), a[0].sin()) for a in angles], at),),
        "attention_mask": (torch.zeros(2, 1, SMALL**2).index_fill(2, torch.tensor([3]), -10000.0),),
        "encoder_attention_mask": (_text_mask(),),
    }


described(
    "AllegroTransformerBlock",
    (
        GatedBranch("attn1", "norm1", 0, 1, 2),
        GatedBranch("attn2", optional=True),
        GatedBranch("ff", "norm2", 3, 4, 5),
    ),
    given=_allegro,
    gates=table_gates,
    example=_allegro_example,
    options=_allegro_options,
    about="diffusers models/transformers/transformer_allegro.py.",
)

# ---- LongCat's AudioDiT: layer norms by function --------------------------------------------------------------------


def _audio(
    block: Any,
    hidden_states: Tensor,
    timestep_embed: Tensor,
    cond: Tensor,
    mask: Tensor | None = None,
    cond_mask: Tensor | None = None,
    rope: Any = None,
    cond_rope: Any = None,
    adaln_global_out: Tensor | None = None,
) -> Given | None:
    rows: Any
    if block.adaln_type == "local":
        if adaln_global_out is not None:
            return None
        if block.adaln_use_text_cond:
            timestep_embed = timestep_embed + cond.sum(1) / cond_mask.sum(1, keepdim=True).clamp(min=1).to(cond.dtype)  # type: ignore[union-attr]
        rows = block.adaln_mlp(timestep_embed).chunk(6, dim=-1)
    else:
        table = block.adaln_scale_shift.unflatten(0, (6, -1))
        rows = table_rows(table, adaln_global_out.unflatten(1, (6, -1)), 1)  # type: ignore[union-attr]
    attend = {"attention_mask": mask, "audio_rotary_emb": rope}
    cross = {"post_attention_mask": mask, "attention_mask": cond_mask, "prompt_rotary_emb": cond_rope}
    return Given(
        (hidden_states,), rows, {"self_attn": attend, "cross_attn": (cond, cross | {"audio_rotary_emb": rope})}
    )


def _audio_crosses(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    cond, more = layers["cross_attn"]
    return block.cross_attn(hidden_states=h, encoder_hidden_states=block.cross_attn_norm_c(cond), **more)


def _audio_example(block: Any, side: int) -> tuple:
    D, context = block.self_attn.to_q.in_features, block.cross_attn.to_k.in_features if block.use_cross_attn else 4
    mask = torch.ones(2, _TEXT, dtype=torch.bool)
    x, t, cond = torch.randn(2, side**2, D), torch.randn(2, D), torch.randn(2, _TEXT, context)
    rows = torch.randn(2, 6 * D) if block.adaln_type == "global" else None
    return x, t, cond, None, mask, None, None, rows


def _audio_options(block: Any) -> dict[str, tuple]:
    attn = block.self_attn
    mask = torch.ones(2, SMALL**2, dtype=torch.bool)
    mask[1, -1] = False

    def angles(tokens: int) -> tuple[Tensor, Tensor]:
        a = torch.randn(tokens, attn.inner_dim // attn.heads)
        return a.cos(), a.sin()

    return {"mask": (mask,), "rope": (angles(SMALL**2),), "cond_rope": (angles(_TEXT),)}


described(
    "AudioDiTBlock",
    (
        GatedBranch("self_attn", 1e-6, scale=1, shift=2, gate=0),
        GatedBranch("cross_attn", "cross_attn_norm", call=_audio_crosses, optional=True, others=("cross_attn_norm_c",)),
        GatedBranch("ffn", 1e-6, scale=4, shift=5, gate=3),
    ),
    given=_audio,
    example=_audio_example,
    options=_audio_options,
    about="diffusers models/transformers/transformer_longcat_audio_dit.py.",
)

# ---- Krea 2: its norms are of weight + 1 -----------------------------------------------------------------------------


def _krea(
    block: Any, hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any, attention_mask: Tensor | None = None
) -> Given:
    layers = {"attn": {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}}
    return Given((hidden_states,), table_rows(block.scale_shift_table, temb.unflatten(-1, (6, -1)), -2), layers)


def _krea_example(block: Any, side: int) -> tuple:
    D = block.scale_shift_table.shape[-1]
    angles = torch.randn(side**2, block.attn.head_dim)
    return torch.randn(2, side**2, D), torch.randn(2, 1, 6 * D), (angles.cos(), angles.sin())


described(
    "Krea2TransformerBlock",
    (GatedBranch("attn", "norm1", 1, 0, 2), GatedBranch("ff", "norm2", 4, 3, 5)),
    given=_krea,
    example=_krea_example,
    options=lambda block: {"attention_mask": (torch.randn(2, 1, SMALL**2, SMALL**2),)},
    about="diffusers models/transformers/transformer_krea2.py.",
)
