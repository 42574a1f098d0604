"""The layers of the package for Hugging Face's kernels hub (tools/hub.py): forwards of diffusers' adaLN norms.

`kernels.kernelize` gives them to modules of these names. As the hub asks, a layer has no state and nothing but
`forward`, whose arguments are those of the forward that it replaces, and what it tells of itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import layer_norm_modulate

__all__ = ["AdaLayerNormContinuous", "AdaLayerNormZero", "AdaLayerNormZeroSingle"]


def _modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift; a norm of another kind as it computes itself."""
    if type(norm) is not nn.LayerNorm:
        return norm(x) * (1 + scale[:, None]) + shift[:, None]
    return layer_norm_modulate(x, shift, scale, eps=norm.eps, weight=norm.weight, bias=norm.bias)


class AdaLayerNormContinuous(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
        scale, shift = emb.chunk(2, dim=1)
        return _modulated(self.norm, x, shift, scale)


class AdaLayerNormZero(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, gate, *mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
        return _modulated(self.norm, x, shift, scale), gate, *mlp


class AdaLayerNormZeroSingle(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return _modulated(self.norm, x, shift, scale), gate
