"""PixArt-alpha and PixArt-sigma (PixArt-alpha/PixArt-alpha `diffusion/model/nets`): adaLN-single, cross-attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks import adaln
from ...blocks.broadcast import tokens_and_condition
from ...blocks.decision import SKIPS, decide
from ...blocks.layers import is_plain_linear
from ...ops.residual_alone import residual_alone
from ..family import register
from .adaln import zeroing_tensors
from .dit import DiTBlock, FinalLayer, mlp_half


@register
class PixArtBlock(DiTBlock):
    """x = x + gate_msa * attn(modulate(norm1 x)); x = x + cross_attn(x, y, mask); x = x + gate_mlp * mlp(modulate(norm2
    x)); the six vectors are scale_shift_table + t; cross_attn.proj zero at the start.

    Source: PixArt-alpha/PixArt-alpha and PixArt-sigma, `PixArtBlock`, `PixArtMSBlock`.
    Use: zb.accelerate(model).
    Inference: while cross_attn.proj is zero the cross-attention is skipped.
    Training forward: cross_attn.proj is skipped.
    Training backward: of the cross-attention only proj's gradients are computed, the others are exact zeros.
    """

    name = "PixArtBlock"
    classes = ("PixArtBlock", "PixArtMSBlock")
    parts: tuple[str, ...] = ("norm1", "attn", "cross_attn.proj", "norm2", "mlp", "scale_shift_table")

    def inner_modules(self, block: Any) -> Iterable[nn.Module]:
        """All but the projection, which a single layer's family skips in training."""
        return [m for m in block.modules() if m is not block.cross_attn.proj]

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        proj = block.cross_attn.proj
        return {"cross_attn": zeroing_tensors(proj, proj.weight)}

    def example(self, block: Any, side: int) -> tuple:
        D = block.scale_shift_table.shape[1]
        return torch.randn(2, side**2, D), torch.randn(2, 3, D), torch.randn(2, 6 * D)

    def options(self, block: Any) -> dict[str, tuple]:
        """How many of the text's tokens belong to each sample, or which of them are not padding."""
        kept = torch.arange(3).expand(2, 3) < 2
        return {"mask": ([3, 3], kept, kept[:, None])}

    def forward(  # type: ignore[override]
        self, block: Any, x: Tensor, y: Tensor, t: Tensor, mask: Any = None, **kwargs: Any
    ) -> Tensor:
        dropped = getattr(block, "drop_path", None)
        active = dropped is not None and block.training and getattr(dropped, "drop_prob", 0.0)
        if x.dim() != 3 or active or kwargs or not self._fits(block):
            return self.eager(block, x, y, t, mask, **kwargs)
        vectors = (block.scale_shift_table[None] + t.reshape(x.shape[0], 6, -1)).unbind(1)
        x = self._half(x, vectors[adaln.MSA], block.norm1, block.attn, None)
        x = self._cross_attention(block, x, y, mask)
        return self._half(x, vectors[adaln.MLP], block.norm2, block.mlp, mlp_half(block.norm2, block.mlp))

    def _cross_attention(self, block: Any, x: Tensor, y: Tensor, mask: Any) -> Tensor:
        layer = block.cross_attn
        proj = layer.proj
        if not torch.is_grad_enabled() and is_plain_linear(proj):
            answer = decide(self.name, self.zero_skip, (proj.weight,), bypassed=(layer,), may_draw=False)
            if answer in SKIPS:
                return residual_alone(x, proj.bias, None, -1, proj.weight.dtype, None)
        return x + layer(x, y, mask)


@register
class T2IFinalLayer(FinalLayer):
    """linear(norm_final(x) * (1 + scale) + shift), (shift, scale) = scale_shift_table + t; linear zero at the start.

    Source: PixArt-alpha/PixArt-alpha and PixArt-sigma, `T2IFinalLayer`.
    Use: zb.accelerate(model).
    Inference: while linear is zero the result is its bias; norm, modulation and linear are skipped.
    Training forward: linear is skipped; norm and modulation run for its gradient.
    Training backward: only linear's gradients are computed, the others are exact zeros.
    """

    name = "T2IFinalLayer"
    classes = ("T2IFinalLayer",)
    parts: tuple[str, ...] = ("norm_final", "linear", "scale_shift_table")

    def example(self, block: Any, side: int) -> tuple:
        D = block.linear.in_features
        return torch.randn(2, side**2, D), torch.randn(2, D)

    def forward(self, block: Any, x: Tensor, t: Tensor) -> Tensor:
        if x.dim() != 3 or t.dim() != 2 or not self._fits(block):
            return self.eager(block, x, t)

        x, t = tokens_and_condition(x, t)

        def vectors(t: Tensor, table: Tensor) -> tuple[Tensor, ...]:
            return (table[None] + t[:, None]).unbind(1)

        activations = (x, t, block.scale_shift_table)
        return adaln.final_layer(self.name, self.zero_skip, activations, block.norm_final.eps, vectors, block.linear)
