"""diffusers' LTX-2: a stream of video and one of audio, each attending to itself, to the text, and to the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.register import left_to_compiler
from ..family import Family, lacks, register
from ..report import Obstacle
from .description import Row
from .diffusers_wan import table_rows
from .operands import Gate, submodule
from .streams import Stream

_TEXT = 3


class _Side:
    """One of the two streams: its modules' names begin with `prefix`."""

    def __init__(self, block: Any, prefix: str, x: Tensor, temb: Tensor, text: Tensor, batch: int):
        self.block, self.prefix, self.stream, self.text = block, prefix, Stream(x.contiguous()), text
        self.rows = _rows(getattr(block, f"{prefix}scale_shift_table"), temb, batch)

    def module(self, name: str) -> Any:
        return submodule(self.block, self.prefix + name)

    def normed(self, norm: str, shift: Row | None = None, scale: Row | None = None) -> Tensor:
        return self.stream.normed(self.module(norm), shift, scale)

    def attend(self, angles: Any, mask: Any, more: dict[str, Any]) -> None:
        shift, scale, gate = self.rows[:3]
        h = self.normed("norm1", shift, scale)
        given = {"query_rotary_emb": angles, "attention_mask": mask, **more}
        self.stream.add(self.module("attn1")(hidden_states=h, encoder_hidden_states=None, **given), Gate(gate))

    def cross(self, mask: Any, has_rows: bool) -> None:
        """To the text"""
        shift, scale, gate = self.rows[6:9] if has_rows else (None, None, None)
        h = self.normed("norm2", shift, scale)
        given = {"encoder_hidden_states": self.text, "query_rotary_emb": None, "attention_mask": mask}
        self.stream.add(self.module("attn2")(h, **given), Gate(gate))

    def feed_forward(self) -> Tensor:
        shift, scale, gate = self.rows[3:6]
        self.stream.add(self.module("ff")(self.normed("norm3", shift, scale)), Gate(gate))
        return self.stream.settled()


def _rows(table: Tensor, temb: Tensor, batch: int) -> list[Row]:
    return [
        Row(row.rows.squeeze(1) if row.rows is not None and row.rows.shape[1] == 1 else row.rows, row.table)
        for row in table_rows(table, temb.reshape(batch, temb.shape[1], len(table), -1), 2)
    ]


@register
class LTX2VideoTransformerBlock(Family):
    """x + gate * attn(h), x + attn2(norm x, text), x + gate * attn(h, audio), x + gate * ff(h), h = modulate(norm x)

    The block of LTX-2, with RMS norms, of video and of audio. Source: diffusers models/transformers/
    transformer_ltx2.py. Where attention is perturbed the original runs.
    Use: zb.accelerate(transformer), before torch.compile.
    Inference: one pass for each norm, modulation and gate.
    Training forward: the same; nothing is skipped.
    Training backward: one pass for each.
    """

    name = "LTX2VideoTransformerBlock"
    eager_rounding = True
    remakes = True
    classes = ("LTX2VideoTransformerBlock",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        names = ("norm1", "attn1", "norm2", "attn2", "norm3", "ff", "scale_shift_table")
        missing = lacks(block, *names, *(f"audio_{n}" for n in names), "audio_to_video_norm", "video_to_audio_norm")
        return missing or lacks(block, "audio_to_video_attn", "video_to_audio_attn")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        layers = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
        return {name: (torch.empty(1, device="meta"),) for name in (*layers, "ff", "audio_ff")}

    def example(self, block: Any, side: int) -> tuple:
        D, A = block.scale_shift_table.shape[-1], block.audio_scale_shift_table.shape[-1]
        video, audio = torch.randn(2, side**2, D), torch.randn(2, side**2 + 1, A)
        text = torch.randn(2, _TEXT, block.attn2.to_k.in_features)
        audio_text = torch.randn(2, _TEXT, block.audio_attn2.to_k.in_features)
        rows, audio_rows = len(block.scale_shift_table), len(block.audio_scale_shift_table)
        temb = torch.randn(2, 1, rows * D), torch.randn(2, 1, audio_rows * A)
        crossing = torch.randn(2, 1, 4 * D), torch.randn(2, 1, 4 * A), torch.randn(2, 1, D), torch.randn(2, 1, A)
        prompts: tuple = (torch.randn(2, 1, 2 * text.shape[-1]), torch.randn(2, 1, 2 * audio_text.shape[-1]))
        T, A_T = side**2, side**2 + 1
        own = self._angles(block.attn1, T), self._angles(block.audio_attn1, A_T)
        cross = self._angles(block.audio_to_video_attn, T), self._angles(block.video_to_audio_attn, A_T)
        prompts = prompts if block.cross_attn_adaln else (None, None)
        return video, audio, text, audio_text, *temb, *crossing, *prompts, *own, *cross

    def options(self, block: Any) -> dict[str, tuple]:
        mask = torch.zeros(2, 1, _TEXT)
        mask[1, :, -1] = -10000.0
        found: dict[str, tuple] = {"use_a2v_cross_attention": (False,), "use_v2a_cross_attention": (False,)}
        found |= {"encoder_attention_mask": (mask,), "audio_encoder_attention_mask": (mask,), "all_perturbed": (False,)}
        found |= {"self_attention_mask": (torch.randn(2, 4, 4),), "audio_self_attention_mask": (torch.randn(2, 5, 5),)}
        found["a2v_cross_attention_mask"] = (torch.randn(2, 4, 5),)
        found["v2a_cross_attention_mask"] = (torch.randn(2, 5, 4),)
        return found

    def _angles(self, attn: Any, tokens: int) -> tuple[Tensor, Tensor]:
        width = attn.inner_dim if attn.rope_type == "interleaved" else attn.inner_dim // attn.heads // 2
        size = (1, tokens, width) if attn.rope_type == "interleaved" else (1, attn.heads, tokens, width)
        angles = torch.randn(size)
        return angles.cos(), angles.sin()

    def forward(
        self,
        block: Any,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        temb: Tensor,
        temb_audio: Tensor,
        temb_ca_scale_shift: Tensor,
        temb_ca_audio_scale_shift: Tensor,
        temb_ca_gate: Tensor,
        temb_ca_audio_gate: Tensor,
        temb_prompt: Tensor | None = None,
        temb_prompt_audio: Tensor | None = None,
        video_rotary_emb: Any = None,
        audio_rotary_emb: Any = None,
        ca_video_rotary_emb: Any = None,
        ca_audio_rotary_emb: Any = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        audio_self_attention_mask: Tensor | None = None,
        a2v_cross_attention_mask: Tensor | None = None,
        v2a_cross_attention_mask: Tensor | None = None,
        use_a2v_cross_attention: bool = True,
        use_v2a_cross_attention: bool = True,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        if left_to_compiler(hidden_states):
            return self.eager(
                block,
                hidden_states,
                audio_hidden_states,
                encoder_hidden_states,
                audio_encoder_hidden_states,
                temb,
                temb_audio,
                temb_ca_scale_shift,
                temb_ca_audio_scale_shift,
                temb_ca_gate,
                temb_ca_audio_gate,
                temb_prompt,
                temb_prompt_audio,
                video_rotary_emb,
                audio_rotary_emb,
                ca_video_rotary_emb,
                ca_audio_rotary_emb,
                encoder_attention_mask,
                audio_encoder_attention_mask,
                self_attention_mask,
                audio_self_attention_mask,
                a2v_cross_attention_mask,
                v2a_cross_attention_mask,
                use_a2v_cross_attention,
                use_v2a_cross_attention,
                perturbation_mask,
                all_perturbed,
            )
        text, audio_text, batch = encoder_hidden_states, audio_encoder_hidden_states, hidden_states.shape[0]
        if block.cross_attn_adaln:
            text = _modulated_text(text, block.prompt_scale_shift_table, temb_prompt, batch)
            audio_text = _modulated_text(audio_text, block.audio_prompt_scale_shift_table, temb_prompt_audio, batch)
        video = _Side(block, "", hidden_states, temb, text, batch)
        audio = _Side(block, "audio_", audio_hidden_states, temb_audio, audio_text, batch)
        perturbed: dict[str, Any] = {}
        if block.perturbed_attn:
            perturbed = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
        video.attend(video_rotary_emb, self_attention_mask, perturbed)
        audio.attend(audio_rotary_emb, audio_self_attention_mask, perturbed)
        video.cross(encoder_attention_mask, block.video_cross_attn_adaln)
        audio.cross(audio_encoder_attention_mask, block.audio_cross_attn_adaln)
        if use_a2v_cross_attention or use_v2a_cross_attention:
            table, audio_table = (
                block.video_a2v_cross_attn_scale_shift_table,
                block.audio_a2v_cross_attn_scale_shift_table,
            )
            x, y = video.stream, audio.stream
            rows, audio_rows = (
                _rows(table[:4], temb_ca_scale_shift, batch),
                _rows(audio_table[:4], temb_ca_audio_scale_shift, batch),
            )
            norm, audio_norm = block.audio_to_video_norm, block.video_to_audio_norm
            # Both ways start of the same video and audio.
            given = [
                (s.normed(n, r[1], r[0]), s.settled(), s.normed(n, r[3], r[2]))
                for s, n, r in ((x, norm, rows), (y, audio_norm, audio_rows))
            ]
            (to_video, _, of_video), (of_audio, _, to_audio) = given
            if use_a2v_cross_attention:
                (gate,) = _rows(table[4:], temb_ca_gate, batch)
                x.add(
                    block.audio_to_video_attn(
                        to_video,
                        encoder_hidden_states=of_audio,
                        query_rotary_emb=ca_video_rotary_emb,
                        key_rotary_emb=ca_audio_rotary_emb,
                        attention_mask=a2v_cross_attention_mask,
                    ),
                    Gate(gate),
                )
            if use_v2a_cross_attention:
                (gate,) = _rows(audio_table[4:], temb_ca_audio_gate, batch)
                y.add(
                    block.video_to_audio_attn(
                        to_audio,
                        encoder_hidden_states=of_video,
                        query_rotary_emb=ca_audio_rotary_emb,
                        key_rotary_emb=ca_video_rotary_emb,
                        attention_mask=v2a_cross_attention_mask,
                    ),
                    Gate(gate),
                )
        return video.feed_forward(), audio.feed_forward()


def _modulated_text(text: Tensor, table: Tensor, temb: Tensor | None, batch: int) -> Tensor:
    """text * (1 + scale) + shift; there is no norm."""
    if temb is None:
        shift, scale = table[None, None].to(device=text.device, dtype=text.dtype).unbind(dim=2)
    else:
        shift, scale = (table[None, None] + temb.reshape(batch, temb.shape[1], 2, -1)).unbind(dim=2)
    return text * (1 + scale) + shift
