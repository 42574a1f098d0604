"""diffusers' SANA-WM and its refiner, Wan-Animate 2, and the ControlNet of Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.register import left_to_compiler
from ..family import Family, lacks, register
from ..report import Obstacle
from .described import described
from .description import GatedBranch, Given, Row
from .diffusers_lumina import Z_IMAGE, polar, token_mask, unmodulated
from .diffusers_wan import table_gates, table_rows
from .operands import row_of
from .stand_in import of_tokens, width_of
from .streams import Stream

_TEXT = 3

# ---- SANA-WM: rows for each frame, and rays of a camera --------------------------------------------------------------


def _sana_wm(
    block: Any,
    x: Tensor,
    y: Tensor,
    t: Tensor,
    mask: Tensor | None = None,
    THW: Any = None,
    rotary_emb: Any = None,
    block_mask: Any = None,
    camera_conditions: Any = None,
    ucpe_ray_transforms: Any = None,
    plucker_emb: Tensor | None = None,
    frame_valid_mask: Any = None,
    chunk_size: int | None = None,
) -> Given | None:
    if frame_valid_mask is not None or (hasattr(block, "plucker_proj") and plucker_emb is None):
        return None
    t = t.reshape(x.shape[0], t.shape[2], 6, -1)
    which = _frame_of_token(x, t)
    rows = table_rows(block.scale_shift_table, t, 2)
    attend = {
        "HW": THW,
        "rotary_emb": rotary_emb,
        "block_mask": block_mask,
        "camera_conditions": camera_conditions,
        "chunk_size": block.chunk_size if chunk_size is None else chunk_size,
        "frame_valid_mask": None,
        "ucpe_ray_transforms": ucpe_ray_transforms,
    }
    layers = {"attn": attend, "plucker_proj": plucker_emb, "cross_attn": (y, mask), "mlp": {"HW": THW}}
    return Given((x,), rows, layers, which=(which,))


def _frame_of_token(x: Tensor, rows: Tensor) -> Tensor | None:
    """Which frame's row serves a token; None: there is one row for all."""
    (B, T), frames = x.shape[:2], rows.shape[1]
    if frames == 1:
        return None
    return torch.arange(frames, device=x.device).repeat_interleave(T // frames).expand(B, -1)


def _sana_wm_crosses(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    text, mask = layers["cross_attn"]
    return block.cross_attn(h, text, mask=mask)


def _sana_wm_example(block: Any, side: int) -> tuple:
    C, T = block.hidden_size, side**2
    x, text = torch.randn(2, T, C), torch.randn(2, 1, _TEXT, C)
    mask = torch.ones(2, _TEXT, dtype=torch.int16)
    rays = torch.randn(2, side, 4), {"P": torch.randn(2, T, 4)}, torch.randn(2, T, C)
    return x, text, torch.randn(2, 1, side, 6 * C), mask, (side, side, 1), torch.randn(T, 4), None, *rays, None, 7


described(
    "SanaVideoMSCamCtrlBlock",
    (
        GatedBranch("attn", "norm1", 0, 1, 2),
        GatedBranch(
            "plucker_proj",
            call=lambda block, h, layers: block.plucker_proj(layers["plucker_proj"]),
            optional=True,
        ),
        GatedBranch("cross_attn", call=_sana_wm_crosses),
        GatedBranch("mlp", "norm2", 3, 4, 5),
    ),
    given=_sana_wm,
    example=_sana_wm_example,
    gates=table_gates,
    stand_ins={"attn": of_tokens},
    about="diffusers models/transformers/transformer_sana_wm.py; its feed-forward is a convolution.",
)


def _refiner(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    video_rotary_emb: Any,
    encoder_attention_mask: Tensor | None = None,
    sink_rotary_emb: Any = None,
    kv_cache: Any = None,
    kv_cache_mode: str | None = None,
) -> Given:
    x = hidden_states
    rows = table_rows(block.scale_shift_table, temb.reshape(x.shape[0], temb.shape[1], 6, -1), 2)
    attend = {"query_rotary_emb": video_rotary_emb, "sink_rotary_emb": sink_rotary_emb}
    attend |= {"kv_cache": kv_cache, "kv_cache_mode": kv_cache_mode}
    cross = {"encoder_hidden_states": encoder_hidden_states, "query_rotary_emb": None}
    return Given((x,), rows, {"attn1": attend, "attn2": cross | {"attention_mask": encoder_attention_mask}})


def _refiner_example(block: Any, side: int) -> tuple:
    D = block.scale_shift_table.shape[-1]
    text = torch.randn(2, _TEXT, width_of(block.attn2, "to_k", D))
    angles = torch.randn(2, side**2, D)
    return torch.randn(2, side**2, D), text, torch.randn(2, 1, 6 * D), (angles.cos(), angles.sin())


def _refiner_options(block: Any) -> dict[str, tuple]:
    mask = torch.zeros(2, 1, _TEXT)
    mask[1, :, -1] = -10000.0
    found: dict[str, tuple] = {"encoder_attention_mask": (mask,), "sink_rotary_emb": (torch.randn(2),)}
    return found | {"kv_cache": (torch.randn(3),), "kv_cache_mode": ("inject",)}


described(
    "SanaWMLTX2RefinerTransformerBlock",
    (GatedBranch("attn1", "norm1", 0, 1, 2), GatedBranch("attn2", "norm2"), GatedBranch("ff", "norm3", 3, 4, 5)),
    given=_refiner,
    example=_refiner_example,
    options=_refiner_options,
    gates=table_gates,
    variant=lambda block: None if len(block.scale_shift_table) == 6 else "its cross-attention has rows",
    stand_ins={"attn1": of_tokens},  # which keeps keys and values
    about="diffusers models/transformers/transformer_sana_wm_refiner.py.",
)

# ---- Wan-Animate 2 ---------------------------------------------------------------------------------------------------


def _animate(
    block: Any,
    hidden_states: Tensor,
    temb: Tensor,
    encoder_hidden_states: Tensor,
    kv_cache: Any,
    kv_cache_mode: str,
    rotary_emb: Any,
    grid_sizes: Any,
    encoder_hidden_states_image: Tensor | None = None,
    reference_rotary_emb: Any = None,
    reference_grid_sizes: Any = None,
    attention_mask: Any = None,
    origin_latent_frames: int | None = None,
    origin_latent_hw: int | None = None,
) -> Given:
    attend = {
        "rotary_emb": rotary_emb,
        "grid_sizes": grid_sizes,
        "kv_cache": kv_cache,
        "kv_cache_mode": kv_cache_mode,
        "rope_stride": block.refer_stride if kv_cache_mode == "extract" else 1,
        "reference_rotary_emb": reference_rotary_emb,
        "reference_grid_sizes": reference_grid_sizes,
        "reference_rope_stride": block.refer_stride,
        "attention_mask": attention_mask,
        "origin_latent_frames": origin_latent_frames,
        "origin_latent_hw": origin_latent_hw,
    }
    cross = {"encoder_hidden_states": encoder_hidden_states, "encoder_hidden_states_image": encoder_hidden_states_image}
    return Given((hidden_states,), table_rows(block.modulation, temb, 1), {"self_attn": attend, "cross_attn": cross})


def _animate_gates(block: Any, i: int) -> tuple[Tensor, ...]:
    return block.modulation.detach()[0, i], torch.empty(1, device="meta")


def _animate_example(block: Any, side: int) -> tuple:
    D, T = block.modulation.shape[-1], side**2
    text, grid = torch.randn(2, _TEXT, D), torch.tensor([[1, side, side]] * 2)
    image = None if block.cross_attn.added_kv_proj_dim is None else torch.randn(2, _TEXT, D)
    reference = torch.randn(4), grid + 1, torch.randn(2), 3, 4
    return torch.randn(2, T, D), torch.randn(2, 6, D), text, None, "extract", torch.randn(3), grid, image, *reference


described(
    "WanAnimate2TransformerBlock",
    (
        GatedBranch("self_attn", "norm1", 0, 1, 2),
        GatedBranch("cross_attn", "norm3"),
        GatedBranch("ffn", "norm2", 3, 4, 5),
    ),
    given=_animate,
    example=_animate_example,
    gates=_animate_gates,
    fp32=True,
    stand_ins={"self_attn": of_tokens},  # which keeps keys and values, and is flex attention
    about="diffusers models/transformers/transformer_wan_animate_2.py.",
)

# ---- Z-Image's ControlNet: each block returns the hints so far, and its own ------------------------------------------


def _z_control(
    block: Any, c: Tensor, x: Tensor, attn_mask: Any, freqs_cis: Any, adaln_input: Tensor | None = None
) -> Given:
    hints = []
    if block.block_id == 0:
        c = block.before_proj(c) + x
    else:
        *hints, c = torch.unbind(c)
    layers = {"attention": {"attention_mask": attn_mask, "freqs_cis": freqs_cis}}
    return Given((c,), block.adaLN_modulation(adaln_input).chunk(4, dim=1), layers, hints)


def _z_control_example(block: Any, side: int) -> tuple:
    T = side**2
    before = () if block.block_id == 0 else (3,)
    angles, temb = polar(2, T, block.head_dim // 2), torch.randn(2, block.adaLN_modulation[0].in_features)
    return torch.randn(*before, 2, T, block.dim), torch.randn(2, T, block.dim), token_mask(T), angles, temb


described(
    "ZImageControlTransformerBlock",
    Z_IMAGE,
    given=_z_control,
    example=_z_control_example,
    finish=lambda block, streams, hints: torch.stack([*hints, block.after_proj(streams[0]), streams[0]]),
    linear="adaLN_modulation.0",
    variant=unmodulated,
    about="diffusers models/controlnets/controlnet_z_image.py.",
)


@register
class SanaWMFinalLayer(Family):
    """linear(norm_final(x) * (1 + scale) + shift), (shift, scale) = scale_shift_table + t, of each frame

    Source: `T2IFinalLayer` of diffusers models/transformers/transformer_sana_wm.py.
    Use: zb.accelerate(model), before torch.compile.
    Inference: one pass over x for norm and modulation. There is nothing to skip.
    Training forward: the same.
    Training backward: one pass.
    """

    name = "SanaWMFinalLayer"
    eager_rounding = True
    classes = ("T2IFinalLayer",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, "norm_final", "linear", "scale_shift_table")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {}

    def example(self, block: Any, side: int) -> tuple:
        D = block.linear.in_features
        return torch.randn(2, side**2, D), torch.randn(2, 1, side, D)

    def forward(self, block: Any, x: Tensor, t: Tensor) -> Tensor:
        if x.dim() != 3 or t.dim() != 4 or left_to_compiler(x):
            return self.eager(block, x, t)
        t = t.transpose(1, 2).squeeze(2)
        shift, scale = (row_of(Row(t, table)) for table in block.scale_shift_table)
        return block.linear(Stream(x, index=_frame_of_token(x, t)).normed(block.norm_final, shift, scale))
