"""The blocks of Alpha-VLLM/Lumina-Image-2.0, Tongyi-MAI/Z-Image and kohya-ss/musubi-tuner's Z-Image: RMS norms before
and after each layer, a scale without shift, gates through tanh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .described import described
from .description import GatedBranch, Given
from .diffusers_lumina import polar, token_mask
from .stand_in import of_tokens


def _branches(modulated: bool, attend: Any, feed: Any = None) -> tuple[GatedBranch, ...]:
    scales, gates = ((0, 2), (1, 3)) if modulated else ((None, None), (None, None))
    layers = (
        ("attention", "attention_norm1", "attention_norm2", attend),
        ("feed_forward", "ffn_norm1", "ffn_norm2", feed),
    )
    return tuple(
        GatedBranch(layer, norm, scale=scale, gate=gate, tanh=modulated, after=after, call=call)
        for (layer, norm, after, call), scale, gate in zip(layers, scales, gates, strict=True)
    )


def _unmodulated(block: Any) -> str | None:
    return None if block.modulation else "it has no modulation"


def _modulated(block: Any) -> str | None:
    return "it has a modulation" if block.modulation else None


def _rows(block: Any, adaln_input: Tensor | None) -> tuple[Tensor, ...]:
    if not block.modulation:
        return ()
    modulation: Any = block.adaLN_modulation  # of Z-Image a list of one layer
    rows = modulation[0](adaln_input) if len(modulation) == 1 else modulation(adaln_input)
    return rows.chunk(4, dim=1)


def _condition(block: Any) -> Tensor | None:
    return torch.randn(2, block.adaLN_modulation[-1].in_features) if block.modulation else None


# ---- Lumina-Image 2.0 ------------------------------------------------------------------------------------------------


def _lumina(block: Any, x: Tensor, x_mask: Any, freqs_cis: Any, adaln_input: Tensor | None = None) -> Given:
    return Given((x,), _rows(block, adaln_input), {"attention": (x_mask, freqs_cis)})


def _lumina_attends(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.attention(h, *layers["attention"])


def _lumina_example(block: Any, side: int) -> tuple:
    T = side**2
    return torch.randn(2, T, block.dim), token_mask(T), polar(2, T, block.head_dim // 2), _condition(block)


# ---- Z-Image ---------------------------------------------------------------------------------------------------------


def _authors(block: Any, x: Tensor, attn_mask: Any, freqs_cis: Any, adaln_input: Tensor | None = None) -> Given:
    layers = {"attention": {"attention_mask": attn_mask, "freqs_cis": freqs_cis}}
    return Given((x,), _rows(block, adaln_input), layers)


# ---- Z-Image of musubi-tuner -----------------------------------------------------------------------------------------


def _z_image(
    block: Any, x: Tensor, freqs_cis: Any, adaln_input: Tensor | None = None, attn_params: Any = None
) -> Given | None:
    if x.dtype is torch.float16:
        return None  # what its layers return is clipped
    return Given((x,), _rows(block, adaln_input), {"attention": {"freqs_cis": freqs_cis, "attn_params": attn_params}})


def _z_image_feeds(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.feed_forward(h, apply_fp16_downscale=True)


def _z_image_example(block: Any, side: int) -> tuple:
    T = side**2
    return torch.randn(2, T, block.dim), polar(2, T, block.head_dim // 2), _condition(block), 0.5


for kind, name, given, example, has, attend, feed in (
    ("JointTransformerBlock", "LuminaJoint", _lumina, _lumina_example, "ffn_norm2", _lumina_attends, None),
    ("ZImageTransformerBlock", "OriginalZImage", _authors, _lumina_example, "ffn_norm2", None, None),
    ("ZImageTransformerBlock", "MusubiZImage", _z_image, _z_image_example, "_forward", None, _z_image_feeds),
):
    for modulated in (True, False):
        described(
            f"{name}{'Transformer' if modulated else 'Refiner'}Block",
            _branches(modulated, attend, feed if modulated else None),
            given=given,
            example=example,
            classes=(kind,),
            linear=(f"adaLN_modulation.{1 if given is _lumina else 0}",) if modulated else None,
            variant=_unmodulated if modulated else _modulated,
            has=("modulation" if modulated else "dim", has),
            stand_ins={"attention": of_tokens},
            about={
                _lumina: "Alpha-VLLM/Lumina-Image-2.0 `JointTransformerBlock`.",
                _authors: "Tongyi-MAI/Z-Image `ZImageTransformerBlock`.",
                _z_image: "Z-Image, as kohya-ss/musubi-tuner has it.",
            }[given],
        )
