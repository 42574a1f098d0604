"""Residual blocks of diffusers' autoencoders of images, of clips of one frame and of spectrograms that are made of the
parts of those of video."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ...blocks import video
from ...blocks.activated import Activate, Conv, activated_conv
from ...blocks.decision import bypassable
from ...blocks.layers import SILUS, computes
from ..family import Family, lacks, register
from ..report import Obstacle, Reason
from . import video_layers as layers
from .diffusers_streamed import WanResidualBlock
from .video_layers import Members, VideoResnet


@register
class QwenImage21ResidualBlock(WanResidualBlock):
    """y = shortcut(x) + conv2(dropout(silu(rms2(conv1(silu(rms1 x)))))), of a clip of one frame

    Its convolutions, of images, are called as they are. Source: diffusers QwenImage21ResidualBlock.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: as while it is not.
    Training forward while zero: as while it is not.
    Training backward while zero: as while it is not.
    """

    name = "QwenImage21ResidualBlock"
    classes = ("QwenImage21ResidualBlock",)

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        return (conv,)

    def images(self, block: Any, side: int) -> Tensor:
        return super().images(block, side)[:, :, :1]

    def options(self, block: Any) -> dict[str, tuple]:
        return {"feat_cache": ([None, None],)}


@register
class LTX2AudioResnetBlock(VideoResnet):
    """y = shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x)))))), causal in one dimension of a spectrogram

    RMS norms over channels, or group norms. Source: diffusers LTX2AudioResnetBlock.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: nothing but shortcut and bias is computed.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "LTX2AudioResnetBlock"
    classes = ("LTX2AudioResnetBlock",)
    parts = (*VideoResnet.parts, "non_linearity")
    dims = 2

    def members(self, block: Any) -> Members:
        return super().members(block)._replace(silus=(block.non_linearity,))

    def norm(self, block: Any, norm: Any) -> Activate | None:
        if isinstance(norm, nn.GroupNorm):
            return layers.group(norm)
        return layers.pixel_norm(norm) if norm.dim == 1 else None

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        found = layers.plain(conv) if isinstance(conv, nn.Conv2d) else layers.ltx_audio(conv)
        return None if found is None else (found,)

    def forward(self, block: Any, x: Tensor, temb: Tensor | None = None) -> Tensor:
        y = None if temb is not None else self.run(block, x)
        return self.eager(block, x, temb) if y is None else y

    def shortcut(self, block: Any, x: Tensor) -> Tensor:
        if block.in_channels == block.out_channels:
            return x
        return block.conv_shortcut(x) if block.use_conv_shortcut else block.nin_shortcut(x)


@register
class KVAEResnetBlock2D(VideoResnet):
    """y = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1 x))))), of images, edges repeated

    Group norms, or norms conditioned on latents (zq). Source: diffusers KVAEResnetBlock2D.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: nothing but shortcut and bias is computed.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "KVAEResnetBlock2D"
    classes = ("KVAEResnetBlock2D",)
    dims = 2

    def norm(self, block: Any, norm: Any) -> Activate | None:
        if isinstance(norm, nn.GroupNorm):
            return layers.group(norm)
        return layers.spatial(norm)

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        found = layers.plain(conv)
        return None if found is None else (found,)

    def example(self, block: Any, side: int) -> tuple:
        x = self.images(block, side)
        norm = block.norm1
        zq = None if isinstance(norm, nn.GroupNorm) else torch.randn(2, norm.conv_y.in_channels, side, 1)
        return x, None, zq

    def forward(self, block: Any, x: Tensor, temb: Tensor | None, zq: Tensor | None = None) -> Tensor:
        halves = self.halves(block) if x.dim() == 4 and temb is None else None
        if halves is None or (zq is None) != isinstance(block.norm1, nn.GroupNorm):
            return self.eager(block, x, temb, zq)
        if zq is not None:
            x, halves = layers.conditioned(halves, x, zq)
        return video.forward(video.Layers(self.name, self.zero_skip, *halves, lambda x: self.shortcut(block, x)), x)

    def shortcut(self, block: Any, x: Tensor) -> Tensor:
        if block.in_channels == block.out_channels:
            return x
        return block.conv_shortcut(x) if block.use_conv_shortcut else block.nin_shortcut(x)


@register
class DCResBlock(Family):
    """y = x + rms(conv2(silu(conv1 x))) * weight + bias, the RMS norm over channels, of images

    Source: diffusers `ResBlock` of AutoencoderDC (SANA), with rms_norm and silu.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while the norm's weight is zero: as while it is not.
    Training forward while zero: as while it is not.
    Training backward while zero: as while it is not.
    """

    name = "DCResBlock"
    classes = ("ResBlock",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, "conv1", "conv2", "norm", "nonlinearity", "norm_type")
        if missing is None and block.norm_type != "rms_norm":
            return Obstacle(Reason.VARIANT, "its norm is none over channels")
        return missing or (None if self._convs(block) else layers.NOT_PLAIN)

    def _convs(self, block: Any) -> tuple[Conv, Conv] | None:
        known = computes(block.nonlinearity, SILUS) and layers.is_pixel_norm(block.norm)
        if not known or not bypassable((block.conv1, block.nonlinearity, block.conv2, block.norm)):
            return None
        first, second = layers.plain(block.conv1), layers.plain(block.conv2)
        return None if first is None or second is None else (first, second)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"norm": (block.norm.weight.detach(),)}

    def example(self, block: Any, side: int) -> tuple:
        return (torch.randn(2, block.conv1.in_channels, 2 * side, 2),)

    def forward(self, block: Any, hidden_states: Tensor) -> Tensor:
        convs = self._convs(block) if hidden_states.dim() == 4 else None
        if convs is None:
            return self.eager(block, hidden_states)
        norm, (first, second) = block.norm, convs
        h = activated_conv(F.silu, (first(hidden_states),), (), second)
        h = functional.channel_rms_norm_silu(
            h, norm.weight, norm.bias, eps=norm.eps, eps_mode="inside", activation=None
        )
        return h + hidden_states


@register
class AutoencoderTinyBlock(Family):
    """y = act(skip(x) + conv3(act(conv2(act(conv1 x))))), without norms, of images

    Its convolutions are zeroblock's, the last one with the sum; activations are called as they are. Source: diffusers
    AutoencoderTinyBlock (TAESD).
    Use: zb.accelerate(vae), before torch.compile.
    Inference while the last convolution is zero: nothing but skip, bias and activation is computed.
    Training forward while zero: the last convolution is not executed.
    Training backward while zero: exact zeros upstream of it.
    """

    name = "AutoencoderTinyBlock"
    classes = ("AutoencoderTinyBlock",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, "conv.4", "skip", "fuse")
        return missing or (None if self._halves(block) else layers.NOT_PLAIN)

    def _halves(self, block: Any) -> tuple[video.Half, video.Half] | None:
        if not isinstance(block.conv, nn.Sequential) or len(block.conv) != 5 or not bypassable((block.conv,)):
            return None
        first, act, second, last_act, third = block.conv
        convs = layers.plain(first), layers.plain(second), layers.plain(third)
        if any(conv is None for conv in convs):
            return None
        return (
            video.Half(video.as_it_is, (), (convs[0], act, convs[1])),
            video.Half(last_act, (last_act,), (convs[2],)),
        )

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"conv.4": (block.conv[4].weight.detach(),)}

    def example(self, block: Any, side: int) -> tuple:
        return (torch.randn(2, block.conv[0].in_channels, 2 * side, 2),)

    def forward(self, block: Any, x: Tensor) -> Tensor:
        halves = self._halves(block) if x.dim() == 4 else None
        if halves is None:
            return self.eager(block, x)
        return block.fuse(video.forward(video.Layers(self.name, self.zero_skip, *halves, block.skip), x))
