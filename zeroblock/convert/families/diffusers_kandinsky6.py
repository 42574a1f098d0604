"""diffusers' Kandinsky 6: a stream of video and one of audio, each attending to itself and to the text, then both to
each other; and its super-resolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.register import left_to_compiler
from ..family import Family, lacks, register
from ..report import Obstacle
from .described import described
from .description import GatedBranch, Given, Row
from .operands import Gate
from .stand_in import of_tokens
from .streams import Stream

_TEXT = 3
_LAYERS = ("self_attention", "cross_attention", "feed_forward")


class _Side:
    """One of the two streams, whose norms, layers and modulation `part` holds."""

    def __init__(self, part: Any, x: Tensor, temb: Tensor):
        self.part, self.stream = part, Stream(x.contiguous(), fp32=True)
        self.rows = _rows(part.visual_modulation(temb).chunk(9, dim=-1))

    def attend(self, rope: Any) -> None:
        shift, scale, gate = self.rows[:3]
        h = self.stream.normed(self.part.self_attention_norm, shift, scale)
        self.stream.add(self.part.self_attention(h, rotary_emb=rope), Gate(gate))

    def cross(self, text: Tensor, mask: Any) -> Tensor:
        """Returns the tokens as the text's queries are made of them."""
        shift, scale, gate = self.rows[3:6]
        h = self.stream.normed(self.part.cross_attention_norm, shift, scale)
        self.stream.add(self.part.cross_attention(h, encoder_hidden_states=text, attn_mask=mask), Gate(gate))
        return h

    def feed_forward(self) -> Tensor:
        shift, scale, gate = self.rows[6:]
        h = self.stream.normed(self.part.feed_forward_norm, shift, scale)
        self.stream.add(self.part.feed_forward(h), Gate(gate))
        return self.stream.settled()


def _rows(vectors: Any) -> list[Row]:
    return [Row(v) for v in vectors]


@register
class Kandinsky6FusedTransformerDecoderBlock(Family):
    """x + gate * attn(h), x + gate * attn(h, text), x + gate * attn(h, other stream), x + gate * ff(h), h = modulate(x)

    The block of Kandinsky 6, of video and of audio. Source: diffusers models/transformers/transformer_kandinsky6.py.
    Use: zb.accelerate(transformer), before torch.compile.
    Inference: one pass for each norm, modulation and gate.
    Training forward: the same; nothing is skipped.
    Training backward: one pass for each.
    """

    name = "Kandinsky6FusedTransformerDecoderBlock"
    eager_rounding = True
    remakes = True
    classes = ("Kandinsky6FusedTransformerDecoderBlock",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        parts = (
            f"{side}_dec_block.{layer}" for side in ("video", "audio") for layer in ("visual_modulation", *_LAYERS)
        )
        own = (f"{way}_{part}" for way in ("va", "av") for part in ("cross_attention", "modulation", "normalization"))
        return lacks(block, *parts, *own)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        names = [f"{side}_dec_block.{layer}" for side in ("video", "audio") for layer in _LAYERS]
        return {name: (torch.empty(1, device="meta"),) for name in (*names, "va_cross_attention", "av_cross_attention")}

    def example(self, block: Any, side: int) -> tuple:
        video, audio = block.video_dec_block, block.audio_dec_block
        T, A = side**2, side**2 + 1
        tokens, texts, times, angles = [], [], [], []
        for part, n in ((video, T), (audio, A)):
            attn, linear = part.self_attention, part.visual_modulation.out_layer
            D = attn.to_query.in_features
            tokens.append(torch.randn(2, n, D))
            texts.append(torch.randn(2, _TEXT, D))
            times.append(torch.randn(2, linear.in_features))
            a = torch.randn(n, 1, D // attn.num_heads // 2)
            angles.append(torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], dim=-1).unflatten(-1, (2, 2)))
        return *tokens, *texts, tuple(times), *angles

    def options(self, block: Any) -> dict[str, tuple]:
        mask = torch.ones(2, 1, 1, _TEXT, dtype=torch.bool)
        mask[1, ..., -1] = False
        return {"attn_mask": (mask,)}

    def forward(
        self,
        block: Any,
        vis: Tensor | None,
        aud: Tensor | None,
        text_v: Tensor,
        text_a: Tensor,
        time_embed: tuple[Tensor, Tensor],
        vis_rope: Any,
        aud_rope: Any,
        attn_mask: Any = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        if left_to_compiler(next((x for x in (vis, aud) if x is not None), text_v)):
            return self.eager(block, vis, aud, text_v, text_a, time_embed, vis_rope, aud_rope, attn_mask)
        t_v, t_a = time_embed
        video = None if vis is None else _Side(block.video_dec_block, vis, t_v)
        audio = None if aud is None else _Side(block.audio_dec_block, aud, t_a)
        queries = []
        for side, rope, text in ((video, vis_rope, text_v), (audio, aud_rope, text_a)):
            if side is not None:
                side.attend(rope)
                queries.append(side.cross(text, attn_mask))
        if video is not None and audio is not None:
            times = (t_v, t_a) if block.fix_modulation else (t_a, t_v)
            ropes = (vis_rope, aud_rope) if block.ca_rope else (None, None)
            _meet(block, (video.stream, audio.stream), queries, times, ropes)
        return None if video is None else video.feed_forward(), None if audio is None else audio.feed_forward()


def _meet(
    block: Any, streams: tuple[Stream, Stream], queries: list[Tensor], times: tuple[Tensor, Tensor], ropes: Any
) -> None:
    """Each attends to what the other asked the text."""
    video, audio = block.va_modulation(times[0]), block.av_modulation(times[1])
    D, A = block.model_dim, block.model_dim_a
    if block.cross_gates:  # each modulation holds the gate of the other stream
        shift, scale, audio_gate = _rows(video.split([D, D, A], dim=-1))
        audio_shift, audio_scale, gate = _rows(audio.split([A, A, D], dim=-1))
    else:
        shift, scale, gate = _rows(video.chunk(3, dim=-1))
        audio_shift, audio_scale, audio_gate = _rows(audio.chunk(3, dim=-1))
    x, y = streams
    h, k = x.normed(block.va_normalization, shift, scale), y.normed(block.av_normalization, audio_shift, audio_scale)
    own, other = ropes
    to_video = block.va_cross_attention(h, encoder_hidden_states=queries[1], rope_q=own, rope_kv=other)
    to_audio = block.av_cross_attention(k, encoder_hidden_states=queries[0], rope_q=other, rope_kv=own)
    x.add(to_video, Gate(gate))
    y.add(to_audio, Gate(audio_gate))


# ---- Kandinsky 6, super-resolution -----------------------------------------------------------------------------------


def _kandinsky_sr(block: Any, hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor, sparse_params: Any) -> Given:
    rows = block.visual_modulation(temb).chunk(6, dim=-1)
    return Given((hidden_states,), rows, {"self_attention": (rotary_emb, sparse_params)})


def _kandinsky_sr_attends(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.self_attention(h, *layers["self_attention"])


def _kandinsky_sr_example(block: Any, side: int) -> tuple:
    linear = block.visual_modulation.out_layer
    x, temb = torch.randn(2, side**2, linear.out_features // 6), torch.randn(2, linear.in_features)
    return x, temb, torch.randn(side**2, 2), {"sta_mask": torch.ones(2, 2), "threshold": 0.5}


described(
    "Kandinsky6SRTransformerBlock",
    (
        GatedBranch("self_attention", "self_attention_norm", 0, 1, 2, call=_kandinsky_sr_attends),
        GatedBranch("feed_forward", "feed_forward_norm", 3, 4, 5),
    ),
    given=_kandinsky_sr,
    example=_kandinsky_sr_example,
    linear="visual_modulation.out_layer",
    fp32=True,
    stand_ins={"self_attention": of_tokens},  # flex attention
    about="diffusers models/transformers/transformer_kandinsky6_sr.py.",
)
