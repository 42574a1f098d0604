"""The attention of CompVis' autoencoders and U-Nets over all pixels, and its copies: sgm, Flux, VAR, LlamaGen, ports of
DDPM."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ...blocks.decision import bypassable, op_policy
from ...blocks.layers import fits_fused, is_group_norm
from ...blocks.residual import residual_branch
from ..family import Family, lacks, register
from ..report import Obstacle, Reason
from .adaln import zeroing_tensors

_NOT_PLAIN = Obstacle(Reason.LAYERS, "its norm or convolutions are not the plain ones the fused ops take")


@register
class AttnBlock(Family):
    """y = x + proj_out(attention(q h, k h, v h)), h = norm(x), one head, all pixels attending to each other

    Source: `AttnBlock` of CompVis/latent-diffusion, Stability-AI/generative-models, black-forest-labs/flux and their
    copies. Attention is PyTorch's fused one.
    Use: zb.accelerate(model), before torch.compile.
    Inference: while proj_out's weight is zero everything is skipped.
    Training forward: proj_out is skipped; the attention runs once without a graph, for its gradient.
    Training backward: only proj_out's gradients are computed, the others are exact zeros.
    """

    name = "AttnBlock"
    classes = ("AttnBlock",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, "norm", "proj_out", *(("qkv",) if hasattr(block, "qkv") else ("q", "k", "v")))
        return missing or (None if self._fits(block) else _NOT_PLAIN)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"proj_out": zeroing_tensors(block.proj_out, block.proj_out.weight)}

    def example(self, block: Any, side: int) -> tuple:
        return (torch.randn(2, block.proj_out.in_channels, side + 1, side),)

    def forward(self, block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or x.dim() != 4 or not self._fits(block):
            return self.eager(block, x, *args, **kwargs)
        norm, proj = block.norm, block.proj_out

        def body(x: Tensor) -> Tensor:
            h = functional.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=None)
            # Fused attention wants the features together.
            heads = [t for conv in _projections(block) for t in conv(h).split(x.shape[1], dim=1)]
            q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for t in heads)
            return F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)

        modules = (norm, *_projections(block))
        answer, y = residual_branch(self.name, self.zero_skip, x, body, proj, None, (x,), modules=modules, trusted="")
        if y is not None:
            return y
        policy = op_policy(answer, self.zero_skip)
        return functional.conv_residual(body(x), proj.weight, proj.bias, x, padding=0, zero_skip=policy)

    def _fits(self, block: Any) -> bool:
        convs = (*_projections(block), block.proj_out)
        plain = is_group_norm(block.norm) and all(fits_fused(conv) and conv.kernel_size == (1, 1) for conv in convs)
        return plain and bypassable((block.norm, *convs))


def _projections(block: Any) -> tuple[Any, ...]:
    """One of each, or (VAR) all in one."""
    parts = block._modules
    return (parts["qkv"],) if "qkv" in parts else (parts["q"], parts["k"], parts["v"])
