"""The U-Net blocks of openai/improved-diffusion and openai/guided-diffusion, and of what was built on them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ...blocks import resblock
from ...blocks.decision import bypassable, op_policy
from ...blocks.layers import DROPOUTS, SILUS, Forwards, computes, fits_fused, is_group_norm
from ...blocks.residual import residual_branch
from ...reference import channel_view
from ..family import Family, lacks, register

_NOT_PLAIN = "its norms or convolutions are not the plain ones the fused ops take, or are watched by hooks"


@register
class ResBlock(Family):
    """y = skip(x_upd x) + conv2(dropout(silu(norm2(conv1(h_upd(silu(norm1 x))), emb)))), conv2 zero at the start.

    Source: openai/guided-diffusion and openai/improved-diffusion `unet.ResBlock`, CompVis/latent-diffusion and
    lllyasviel/ControlNet `openaimodel.ResBlock`, Stability-AI/generative-models `openaimodel.ResBlock`, `VideoResBlock`
    (and its time_stack), openai/consistency_models, openai/glide-text2im; converted to fp16 too.
    Use: zb.accelerate(model). The block's own use_checkpoint stays in charge.
    Inference: while conv2's weight is zero everything but skip(x_upd x) is skipped.
    Training forward: conv2 is skipped; norm, activation and dropout are recomputed for its gradient.
    Training backward: only conv2's and the shortcut's gradients are computed, the others are exact zeros.
    """

    name = "ResBlock"
    classes = ("ResBlock",)
    method = "_forward"

    def match(self, block: Any, path: str, root: nn.Module) -> str | None:
        missing = lacks(block, "in_layers.2", "out_layers.3", "skip_connection", "_forward")
        return missing or (None if self._fits(block) else _NOT_PLAIN)

    def forward(self, block: Any, x: Tensor, emb: Any) -> Tensor:
        # An embedding for each frame; more of them than frames make the result longer.
        more_frames = isinstance(emb, Tensor) and emb.dim() > 2 and emb.shape[1] not in (1, x.shape[2])
        if more_frames or not self._fits(block):
            return self.eager(block, x, emb)
        return resblock.forward(self._layers(block), x, emb)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"out_layers.3": (block.out_layers[3].weight,)}

    def example(self, block: Any) -> tuple:
        conv = block.in_layers[2]
        x = torch.randn(2, conv.in_channels, *[4] * len(conv.kernel_size))
        if not isinstance(block.emb_layers, nn.Module):
            return x, None
        frames = (4,) if getattr(block, "exchange_temb_dims", False) else ()
        last: Any = list(block.emb_layers.children())[-1]
        return x, torch.randn(2, *frames, last.in_features)

    def _fits(self, block: Any) -> bool:
        if len(block.in_layers) != 3 or len(block.out_layers) != 4:
            return False
        norm1, act1, conv1 = block.in_layers
        norm2, act2, dropout, conv2 = block.out_layers
        plain = computes(act1, SILUS) and computes(act2, SILUS) and type(dropout).forward in DROPOUTS
        return (
            plain and resblock.fusable(norm1, conv1, norm2, conv2) and bypassable((block.in_layers, block.out_layers))
        )

    def _layers(self, block: Any) -> resblock.Layers:
        norm1, _, conv1 = block.in_layers
        norm2, _, dropout, conv2 = block.out_layers
        updown = getattr(block, "updown", False)
        no_embedding = getattr(block, "skip_t_emb", False)

        def embed(emb: Tensor, dtype: torch.dtype) -> resblock.Embedding:
            if no_embedding:
                return None, None, None
            e = block.emb_layers(emb).to(dtype)
            if block.use_scale_shift_norm:
                return *e.chunk(2, dim=1), None
            if e.dim() == 2:
                return None, None, channel_view(e, conv1.weight.dim())
            e = e.reshape(*e.shape, *[1] * (conv1.weight.dim() - e.dim()))  # an embedding for each frame
            return None, None, e.transpose(1, 2) if block.exchange_temb_dims else e

        return resblock.Layers(
            self.name,
            self.zero_skip,
            norm1,
            conv1,
            norm2,
            conv2,
            dropout,
            embed,
            embedders=() if no_embedding else (block.emb_layers,),
            shortcut=block.skip_connection,
            resample_h=block.h_upd if updown else None,
            resample_x=block.x_upd if updown else None,
        )


@register
class AttentionBlock(Family):
    """y = x + proj_out(attention(qkv(norm x))), all pixels attending to each other, proj_out zero at the start.

    Source: `unet.AttentionBlock` and `openaimodel.AttentionBlock` of the repositories of ResBlock.
    Use: zb.accelerate(model). The block's own checkpointing stays in charge; attention is PyTorch's fused one.
    Inference: while proj_out's weight is zero everything is skipped.
    Training forward: proj_out is skipped; the attention runs once without a graph, for its gradient.
    Training backward: only proj_out's gradients are computed, the others are exact zeros.
    """

    name = "AttentionBlock"
    classes = ("AttentionBlock",)
    method = "_forward"

    def match(self, block: Any, path: str, root: nn.Module) -> str | None:
        missing = lacks(block, "norm", "qkv", "attention", "proj_out", "_forward")
        return missing or (None if self._fits(block) else _NOT_PLAIN)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"proj_out": (block.proj_out.weight,)}

    def example(self, block: Any) -> tuple:
        return (torch.randn(2, block.qkv.in_channels, 3, 2),)

    def forward(self, block: Any, x: Tensor) -> Tensor:
        if not self._fits(block):
            return self.eager(block, x)
        norm, qkv, proj = block.norm, block.qkv, block.proj_out
        tokens = x.reshape(*x.shape[:2], -1)

        def body(tokens: Tensor) -> Tensor:
            h = functional.group_norm_silu(tokens, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=None)
            return _attend(block, qkv(h))

        modules = (norm, qkv, block.attention)
        trusted = "" if _layout(block) else None
        answer, y = residual_branch(
            self.name, self.zero_skip, tokens, body, proj, None, (tokens,), modules=modules, trusted=trusted
        )
        if y is None:
            h, policy = body(tokens), op_policy(answer, self.zero_skip)
            y = functional.conv_residual(h, proj.weight, proj.bias, tokens, padding=0, zero_skip=policy)
        return y.reshape(x.shape)

    def _fits(self, block: Any) -> bool:
        convs = (block.qkv, block.proj_out)
        return (
            is_group_norm(block.norm)
            and computes(block.attention, _ATTENTIONS)
            and all(fits_fused(conv) and conv.kernel_size == (1,) for conv in convs)
            and bypassable((block.norm, block.qkv, block.attention, block.proj_out))
        )


# The forwards of the attentions that were proved.
_ATTENTIONS: Forwards = {}


def _layout(block: Any) -> str | None:
    """How qkv's channels are ordered: "heads first" (heads, qkv, features) or "qkv first"; None: another attention."""
    name = type(block.attention).__name__
    # improved-diffusion's QKVAttention is given one head at a time and does not know how many there are.
    if name == "QKVAttentionLegacy" or name == "QKVAttention" and not hasattr(block.attention, "n_heads"):
        return "heads first"
    return "qkv first" if name == "QKVAttention" else None


def _attend(block: Any, qkv: Tensor) -> Tensor:
    """[N, 3C, T] -> [N, C, T]"""
    layout = _layout(block)
    if layout is None:
        return block.attention(qkv)
    heads = getattr(block.attention, "n_heads", None) or block.num_heads
    shape, order = ((heads, 3), (2, 0, 1, 4, 3)) if layout == "heads first" else ((3, heads), (1, 0, 2, 4, 3))
    # Fused attention wants the features together.
    q, k, v = qkv.unflatten(1, (*shape, -1)).permute(order).contiguous().unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(qkv.shape[0], -1, qkv.shape[2])
