"""Wan-Video/Wan2.1 and Wan2.2 (`wan/modules/model.py`), and kohya-ss/musubi-tuner's copy: the transformer block and the
output head. Each has a table that is added to the timestep's vectors, [B, 6, C] in 2.1 and [B, L, 6, C] in 2.2.

The authors' streams are float32 from the first gate on, whatever autocast is; musubi's keep their dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.register import left_to_compiler
from ..family import Family, lacks, register
from ..report import Obstacle
from .described import described
from .description import GatedBranch, Given, Row
from .diffusers_wan import table_rows
from .stand_in import of_tokens
from .streams import Stream

_TEXT = 3


def _keeps_dtype(block: Any) -> bool:
    """musubi-tuner's"""
    return hasattr(block, "model_version")


def _takes(block: Any, x: Tensor, e: Tensor) -> bool:
    return e.dtype is torch.float32 and (x.dtype is torch.float32 or _keeps_dtype(block))


def _rows(
    block: Any, x: Any, e: Tensor, seq_lens: Any, grid_sizes: Any, freqs: Any, context: Any, context_lens: Any
) -> list[Row]:
    return table_rows(block.modulation, e, e.dim() - 2)


def _attend(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.self_attn(h, *layers["self_attn"])


def _cross(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    return block.cross_attn(h, *layers["cross_attn"])


def _gates(block: Any, i: int) -> tuple[Tensor, ...]:
    return block.modulation.detach()[0, i], torch.empty(1, device="meta")


for name, version, dim in (("WanAttentionBlock", "2.1", 3), ("Wan22AttentionBlock", "2.2", 4)):

    def _given(
        block: Any,
        x: Tensor,
        e: Tensor,
        seq_lens: Any,
        grid_sizes: Any,
        freqs: Any,
        context: Any,
        context_lens: Any,
        dim: int = dim,
    ) -> Given | None:
        if e.dim() != dim or not _takes(block, x, e):
            return None
        return Given((x,), (), {"self_attn": (seq_lens, grid_sizes, freqs), "cross_attn": (context, context_lens)})

    def _example(block: Any, side: int, dim: int = dim) -> tuple:
        C, T = block.modulation.shape[-1], side**2
        tokens = (T,) if dim == 4 else ()
        sizes = torch.full((2,), T), torch.tensor([[1, side, side]] * 2)
        freqs = torch.polar(torch.ones(1024, 1), torch.randn(1024, 1))
        return torch.randn(2, T, C), torch.randn(2, *tokens, 6, C), *sizes, freqs, torch.randn(2, _TEXT, C), None

    def _variant(block: Any, version: str = version) -> str | None:
        own = getattr(block, "model_version", version)
        return None if own == version else f"its model_version is {own}"

    described(
        name,
        (
            GatedBranch("self_attn", "norm1", 0, 1, 2, call=_attend),
            GatedBranch("cross_attn", "norm3", call=_cross),
            GatedBranch("ffn", "norm2", 3, 4, 5),
        ),
        rows=_rows,
        given=_given,
        example=_example,
        gates=_gates,
        fp32=True,
        classes=("WanAttentionBlock",),
        has=("modulation",),
        variant=_variant,
        stand_ins={"self_attn": of_tokens, "cross_attn": of_tokens},
        about=f"Wan-Video/Wan{version} `WanAttentionBlock`, kohya-ss/musubi-tuner.",
    )


@register
class WanHead(Family):
    """head(norm(x) * (1 + scale) + shift), shift and scale of the timestep and a table of its own

    Source: `Head` of Wan-Video/Wan2.1, kohya-ss/musubi-tuner. Under autocast the original runs.
    Use: zb.accelerate(model), before torch.compile.
    Inference: one pass over x for norm and modulation. There is nothing to skip.
    Training forward: the same.
    Training backward: one pass.
    """

    name = "WanHead"
    classes = ("Head",)
    eager_rounding = True
    dim = 2  # of the timestep's vectors

    def knows(self, block: nn.Module) -> bool:
        return super().knows(block) and getattr(block, "modulation", None) is not None

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, "norm.normalized_shape", "head.weight")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {}

    def example(self, block: Any, side: int) -> tuple:
        C, T = block.modulation.shape[-1], side**2
        return torch.randn(2, T, C), torch.randn(2, C) if self.dim == 2 else torch.randn(2, T, C)

    def forward(self, block: Any, x: Tensor, e: Tensor) -> Tensor:
        fits = x.dim() == 3 and e.dim() == self.dim and x.dtype == e.dtype == torch.float32
        if not fits or torch.is_autocast_enabled(x.device.type) or left_to_compiler(x):
            return self.eager(block, x, e)
        shift, scale = (Row(e, table) for table in block.modulation[0])
        return block.head(Stream(x).normed(block.norm, shift, scale))


@register
class Wan22Head(WanHead):
    """head(norm(x) * (1 + scale) + shift), shift and scale of each token's timestep and a table of its own

    Source: `Head` of Wan-Video/Wan2.2, kohya-ss/musubi-tuner. Under autocast the original runs.
    Use: zb.accelerate(model), before torch.compile.
    Inference: one pass over x for norm and modulation. There is nothing to skip.
    Training forward: the same.
    Training backward: one pass.
    """

    name = "Wan22Head"
    dim = 3
