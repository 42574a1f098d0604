"""openai/improved-diffusion and openai/guided-diffusion, and what was built on their U-Net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _resblock, zero
from ..reference import channel_view
from ._core import Family, lacks, register


@register
class ResBlock(Family):
    """y = skip(x_upd x) + conv2(dropout(silu(norm2(conv1(h_upd(silu(norm1 x))), emb)))), conv2 zero at the start.

    Source: openai/guided-diffusion and openai/improved-diffusion `unet.ResBlock`, CompVis/latent-diffusion and
    lllyasviel/ControlNet `openaimodel.ResBlock`, openai/consistency_models, openai/glide-text2im; use_fp16 too.
    Use: zb.accelerate(model). The block's own use_checkpoint stays in charge.
    Inference: while conv2's weight is zero everything but skip(x_upd x) is skipped.
    Training forward: conv2 is skipped; norm, activation and dropout are recomputed for its gradient.
    Training backward: only conv2's and the shortcut's gradients are computed, the others are exact zeros.
    """

    name = "guided-resblock"
    classes = ("ResBlock",)
    method = "_forward"

    def match(self, block: Any, path: str, root: nn.Module) -> str | None:
        missing = lacks(block, "in_layers.2", "out_layers.3", "emb_layers", "skip_connection", "_forward")
        return missing or (None if self._fits(block) else "its layers are not the plain ones the fused ops take")

    def forward(self, block: Any, x: Tensor, emb: Any) -> Tensor:
        if not self._fits(block):
            return self.eager(block, x, emb)
        return _resblock.forward(self._layers(block), x, emb)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"out_layers.3": (block.out_layers[3].weight,)}

    def example(self, block: Any) -> tuple:
        conv, linear = block.in_layers[2], block.emb_layers[-1]
        return torch.randn(2, conv.in_channels, *[4] * len(conv.kernel_size)), torch.randn(2, linear.in_features)

    def _fits(self, block: Any) -> bool:
        norm1, _, conv1 = block.in_layers
        norm2, _, _, conv2 = block.out_layers
        return _resblock.fusable(norm1, conv1, norm2, conv2) and zero.bypassable((block.in_layers, block.out_layers))

    def _layers(self, block: Any) -> _resblock.Layers:
        norm1, _, conv1 = block.in_layers
        norm2, _, dropout, conv2 = block.out_layers
        updown = getattr(block, "updown", False)

        def embed(emb: Tensor, dtype: torch.dtype) -> _resblock.Embedding:
            e = block.emb_layers(emb).to(dtype)
            if block.use_scale_shift_norm:
                return *e.chunk(2, dim=1), None
            return None, None, channel_view(e, conv1.weight.dim())

        return _resblock.Layers(
            self.name, self.zero_skip, norm1, conv1, norm2, conv2, dropout, embed, (block.emb_layers,),
            block.skip_connection, block.h_upd if updown else None, block.x_upd if updown else None,
        )  # fmt: skip
