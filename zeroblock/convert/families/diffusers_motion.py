"""diffusers' blocks that are added to a trained image model: TemporalConvLayer (`models/resnet.py`),
AnimateDiffTransformer3D (`models/unets/unet_motion_model.py`), GLIGEN's GatedSelfAttentionDense
(`models/attention.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.decision import allowed, bypassable
from ...blocks.residual import residual_branch
from ..family import Family, lacks, register
from ..report import Obstacle, Reason
from .adaln import DIFFUSERS, gated_branch, is_plain, is_plain_linear, zeroing_tensors


@register
class TemporalConvLayer(Family):
    """y = x + conv4(conv3(conv2(conv1 x))), each of them GroupNorm, SiLU, dropout and a (3, 1, 1) convolution

    The temporal layer of diffusers' video U-Nets, zero at the start. Source: diffusers models/resnet.py.
    Use: zb.accelerate(unet) after the temporal layers are added; frozen image layers need nothing.
    Inference while the last convolution is zero: nothing but its bias is added.
    Training forward while zero: everything but the last convolution, without a graph.
    Training backward while zero: the last convolution's gradients; the rest are zeros.
    """

    name = "TemporalConvLayer"
    classes = ("TemporalConvLayer",)
    only_skips = True

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, "conv1.2", "conv2.3", "conv3.3", "conv4.3")
        if missing is None and len(block.conv4) != 4:
            return Obstacle(Reason.LAYERS, "its conv4 is not norm, activation, dropout and convolution")
        return missing

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"conv4": zeroing_tensors(block.conv4[3], block.conv4[3].weight)}

    def example(self, block: Any, side: int) -> tuple:
        return torch.randn(2 * side, block.in_dim, 3, side), side

    def forward(self, block: Any, hidden_states: Tensor, num_frames: int = 1) -> Tensor:
        frames, *image = hidden_states.shape
        *inner, tail = block.conv4
        front = [block.conv1, block.conv2, block.conv3, *inner]
        fits = hidden_states.dim() == 4 and is_plain(hidden_states, tail.weight, tail.bias)
        if not fits or frames % num_frames or not bypassable((block.conv4,)):
            return self.eager(block, hidden_states, num_frames)
        x = hidden_states.reshape(frames // num_frames, num_frames, *image).permute(0, 2, 1, 3, 4)

        def body(x: Tensor) -> Tensor:
            for layer in front:
                x = layer(x)
            return x

        _, y = residual_branch(self.name, self.zero_skip, x, body, tail, None, (x,), modules=tuple(front))
        if y is None:
            y = x + tail(body(x))
        return y.permute(0, 2, 1, 3, 4).reshape(frames, *image)


@register
class AnimateDiffTransformer3D(Family):
    """y = x + proj_out(blocks(proj_in(norm x))), attention along the frames

    AnimateDiff's motion module. Source: diffusers models/unets/unet_motion_model.py (guoyww/AnimateDiff starts proj_out
    at zero, diffusers does not).
    Use: zb.accelerate(unet) after the motion adapter is loaded.
    Inference while proj_out is zero: nothing but its bias is added.
    Training forward while zero: everything but proj_out, without a graph.
    Training backward while zero: proj_out's gradients; the rest are zeros.
    """

    name = "AnimateDiffTransformer3D"
    classes = ("AnimateDiffTransformer3D",)
    only_skips = True

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, "norm", "proj_in", "transformer_blocks", "proj_out")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"proj_out": zeroing_tensors(block.proj_out, block.proj_out.weight)}

    def example(self, block: Any, side: int) -> tuple:
        # Their positions are numbered as far as an adapter was made for.
        positions = (m.pe.shape[1] for m in block.transformer_blocks.modules() if "pe" in m._buffers)
        frames = min([side, *positions])
        return torch.randn(2 * frames, block.proj_in.in_features, 3, 2), None, None, None, frames

    def forward(
        self,
        block: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        frames, channels, height, width = hidden_states.shape
        tail = block.proj_out
        given = (encoder_hidden_states, timestep, class_labels, cross_attention_kwargs)
        if frames % num_frames or not is_plain_linear(tail) or any(v is not None for v in given):
            return self.eager(
                block, hidden_states, encoder_hidden_states, timestep, class_labels, num_frames, cross_attention_kwargs
            )
        inner = (frames // num_frames, height, width, num_frames)

        def tokens(x: Tensor) -> Tensor:
            """[B * F, C, H, W] -> [B * H * W, F, C]"""
            x = x.reshape(inner[0], num_frames, channels, height, width)
            return x.permute(0, 3, 4, 1, 2).reshape(-1, num_frames, channels)

        def body(x: Tensor) -> Tensor:
            video = x.reshape(inner[0], num_frames, channels, height, width).permute(0, 2, 1, 3, 4)
            h = block.proj_in(block.norm(video).permute(0, 3, 4, 2, 1).reshape(-1, num_frames, channels))
            for layer in block.transformer_blocks:
                h = layer(hidden_states=h)
            return h

        modules = (block.norm, block.proj_in, block.transformer_blocks)
        y = None
        if bypassable(modules) and allowed(self.name, self.zero_skip, tail.weight):  # else spare the reordering
            _, y = residual_branch(
                self.name,
                self.zero_skip,
                tokens(hidden_states),
                body,
                tail,
                None,
                (hidden_states,),
                modules=modules,
                trusted=DIFFUSERS,
            )
        if y is None:
            return self.eager(block, hidden_states, num_frames=num_frames)
        return y.reshape(*inner, channels).permute(0, 3, 4, 1, 2).reshape(hidden_states.shape)


@register
class GatedSelfAttentionDense(Family):
    """x + tanh(alpha_attn) * attn(norm1 [x, linear(objs)]), then x + tanh(alpha_dense) * ff(norm2 x)

    GLIGEN's grounding layer; both scalars are zero at the start. Source: diffusers models/attention.py.
    Use: zb.accelerate(unet) of a GLIGEN model; unet.enable_fuser works as before.
    Inference while a scalar is zero: its half is not run.
    Training forward while zero: it runs once, without a graph.
    Training backward while zero: the scalar's gradient alone; the rest are zeros.
    """

    name = "GatedSelfAttentionDense"
    eager_rounding = True
    classes = ("GatedSelfAttentionDense",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, "linear", "norm1", "attn", "norm2", "ff", "alpha_attn", "alpha_dense")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"attn": (block.alpha_attn,), "ff": (block.alpha_dense,)}

    def example(self, block: Any, side: int) -> tuple:
        return torch.randn(2, side**2, block.linear.out_features), torch.randn(2, 3, block.linear.in_features)

    def forward(self, block: Any, x: Tensor, objs: Tensor) -> Tensor:
        if not block.enabled or x.dim() != 3 or block.alpha_attn.dtype != x.dtype:
            return self.eager(block, x, objs)
        norm1, attn, norm2, ff = block.norm1, block.attn, block.norm2, block.ff

        def attended(x: Tensor, objs: Tensor) -> Tensor:
            return attn(norm1(torch.cat([x, block.linear(objs)], dim=1)))[:, : x.shape[1]]

        gates = (block.alpha_attn.tanh().view(1), block.alpha_dense.tanh().view(1))
        x = gated_branch(self, x, gates[0], attended, (x, objs), block.linear, norm1, attn)
        return gated_branch(self, x, gates[1], lambda x: ff(norm2(x)), (x,), norm2, ff)
