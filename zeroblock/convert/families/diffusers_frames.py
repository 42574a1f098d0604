"""Residual blocks of diffusers' autoencoders of one frame, and of spectrograms, that were made of those of video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...blocks.activated import Activate
from ..family import register
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
        if isinstance(norm, torch.nn.GroupNorm):
            return layers.group(norm)
        return layers.pixel_norm(norm) if norm.dim == 1 else None

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        found = layers.plain(conv) if isinstance(conv, torch.nn.Conv2d) else layers.ltx_audio(conv)
        return None if found is None else (found,)

    def forward(self, block: Any, x: Tensor, temb: Tensor | None = None) -> Tensor:
        y = None if temb is not None else self.run(block, x)
        return self.eager(block, x, temb) if y is None else y

    def shortcut(self, block: Any, x: Tensor) -> Tensor:
        if block.in_channels == block.out_channels:
            return x
        return block.conv_shortcut(x) if block.use_conv_shortcut else block.nin_shortcut(x)
