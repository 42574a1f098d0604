"""diffusers' adaptive layer norms (`models/normalization.py`): norm and modulation in one pass.

They compute a norm, not a residual branch: the gates they return are used by the blocks around them
(diffusers_transformer.py, diffusers_mmdit.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..family import Family, lacks, register
from ..report import Obstacle
from .adaln import modulated


class _AdaLayerNorm(Family):
    eager_rounding = True

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, "silu", "linear", "norm")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {}

    def example(self, block: Any, side: int) -> tuple:
        norm = block.norm
        (D,) = norm.normalized_shape if hasattr(norm, "normalized_shape") else norm.dim  # diffusers' RMSNorm: dim
        return torch.randn(2, side**2, D), torch.randn(2, block.linear.in_features)


@register
class AdaLayerNormZero(_AdaLayerNorm):
    """(norm(x) * (1 + scale_msa) + shift_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp), all six of linear(silu(emb))

    Source: diffusers models/normalization.py.
    Use: zb.accelerate(transformer). Nothing is skipped here; the block that uses the gates does.
    Inference: one pass over x.
    Training forward: one pass; x and two numbers a token are saved for backward.
    Training backward: one pass.
    """

    name = "AdaLayerNormZero"
    classes = ("AdaLayerNormZero",)

    def example(self, block: Any, side: int) -> tuple:
        x, emb = super().example(block, side)
        if block.emb is None:
            return x, None, None, None, emb
        index = torch.zeros(2, dtype=torch.long)
        return x, index, index, torch.float32

    def forward(
        self,
        block: Any,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if block.emb is not None:
            emb = block.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = block.linear(block.silu(emb)).chunk(6, dim=1)
        return modulated(block.norm, x, shift, scale), *rest


@register
class AdaLayerNormZeroSingle(_AdaLayerNorm):
    """(norm(x) * (1 + scale) + shift, gate), all three of linear(silu(emb))

    Source: diffusers models/normalization.py (Flux).
    Use: zb.accelerate(transformer). Nothing is skipped here; the block that uses the gate does.
    Inference: one pass over x.
    Training forward: one pass; x and two numbers a token are saved for backward.
    Training backward: one pass.
    """

    name = "AdaLayerNormZeroSingle"
    classes = ("AdaLayerNormZeroSingle",)

    def forward(self, block: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        shift, scale, gate = block.linear(block.silu(emb)).chunk(3, dim=1)
        return modulated(block.norm, x, shift, scale), gate


@register
class SD35AdaLayerNormZeroX(_AdaLayerNorm):
    """AdaLayerNormZero with a second modulation of the same norm, nine vectors of linear(silu(emb))

    Source: diffusers models/normalization.py (Stable Diffusion 3.5).
    Use: zb.accelerate(transformer). Nothing is skipped here; the block that uses the gates does.
    Inference: one pass over x for each modulation.
    Training forward: one pass for each; x and two numbers a token are saved for backward.
    Training backward: one pass for each.
    """

    name = "SD35AdaLayerNormZeroX"
    classes = ("SD35AdaLayerNormZeroX",)

    def forward(self, block: Any, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        chunks = block.linear(block.silu(emb)).chunk(9, dim=1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = chunks
        first = modulated(block.norm, hidden_states, shift, scale)
        second = modulated(block.norm, hidden_states, shift2, scale2)
        return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


@register
class AdaLayerNormContinuous(_AdaLayerNorm):
    """norm(x) * (1 + scale) + shift, (scale, shift) = linear(silu(conditioning)); layer norm or RMS norm

    Source: diffusers models/normalization.py.
    Use: zb.accelerate(transformer). There is nothing to skip.
    Inference: one pass over x.
    Training forward: one pass; x and two numbers a token are saved for backward.
    Training backward: one pass.
    """

    name = "AdaLayerNormContinuous"
    classes = ("AdaLayerNormContinuous",)

    def forward(self, block: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        # The condition may come in float32 whatever the model computes in.
        scale, shift = block.linear(block.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return modulated(block.norm, x, shift, scale)
