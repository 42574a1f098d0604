"""The residual blocks of diffusers' video autoencoders, and of the image autoencoders that were made of them
(`models/autoencoders`). Those that keep frames between calls are in `diffusers_streamed.py`."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks import video
from ...blocks.activated import Activate
from ...blocks.broadcast import same_batch
from ..family import register
from ..report import Obstacle, Reason
from . import video_layers as layers
from .video_layers import VideoResnet


@register
class HunyuanVideo15ResnetBlock(VideoResnet):
    """y = shortcut(x) + conv2(silu(rms2(conv1(silu(rms1 x))))), edges repeated in time (in front) and space

    Source: diffusers HunyuanVideo15ResnetBlock, HunyuanImageRefinerResnetBlock.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: nothing but shortcut and bias is computed.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "HunyuanVideo15ResnetBlock"
    classes: ClassVar[tuple[str, ...]] = ("HunyuanVideo15ResnetBlock", "HunyuanImageRefinerResnetBlock")

    def norm(self, block: Any, norm: Any) -> Activate | None:
        return layers.channel_rms(norm)

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        found = layers.hunyuan(conv)
        return None if found is None else (found,)

    def forward(self, block: Any, hidden_states: Tensor) -> Tensor:
        y = self.run(block, hidden_states)
        return self.eager(block, hidden_states) if y is None else y


@register
class HunyuanVideoResnetBlockCausal3D(HunyuanVideo15ResnetBlock):
    """y = shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x)))))), group norms of a clip, edges repeated

    Source: diffusers HunyuanVideoResnetBlockCausal3D.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: nothing but shortcut and bias is computed.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "HunyuanVideoResnetBlockCausal3D"
    classes = ("HunyuanVideoResnetBlockCausal3D",)

    def norm(self, block: Any, norm: Any) -> Activate | None:
        return layers.group(norm)

    def forward(self, block: Any, hidden_states: Tensor) -> Tensor:
        y = self.run(block, hidden_states.contiguous())
        return self.eager(block, hidden_states) if y is None else y


@register
class CosmosResnetBlock3d(VideoResnet):
    """y = shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x)))))), each convolution one in space, one in time

    Group norms of each frame (of one group) or of the clip. Source: diffusers CosmosResnetBlock3d.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2's part in time is zero: nothing but shortcut and bias is computed.
    Training forward while zero: that part is not executed.
    Training backward while zero: exact zeros upstream of it.
    """

    name = "CosmosResnetBlock3d"
    classes = ("CosmosResnetBlock3d",)

    def norm(self, block: Any, norm: Any) -> Activate | None:
        return layers.frame_group(norm, "norm") if norm.num_groups == 1 else layers.group_in(norm, "norm")

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        return layers.cosmos(conv)

    def forward(self, block: Any, hidden_states: Tensor) -> Tensor:
        y = self.run(block, hidden_states)
        return self.eager(block, hidden_states) if y is None else y


@register
class MiniMaxH3VideoResnetBlock3d(VideoResnet):
    """y = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1 x))))), group norms of each frame

    Its convolutions, which pad by reflection, are called as they are. Source: diffusers MiniMaxH3VideoResnetBlock3d.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: as while it is not.
    Training forward while zero: as while it is not.
    Training backward while zero: as while it is not.
    """

    name = "MiniMaxH3VideoResnetBlock3d"
    classes = ("MiniMaxH3VideoResnetBlock3d",)

    def norm(self, block: Any, norm: Any) -> Activate | None:
        return layers.frame_group(norm)

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        return (conv,)

    def forward(self, block: Any, hidden_states: Tensor) -> Tensor:
        y = self.run(block, hidden_states)
        return self.eager(block, hidden_states) if y is None else y


@register
class LTXVideoResnetBlock3d(VideoResnet):
    """y = shortcut(norm3 x) + conv2(dropout(silu(rms2(conv1(silu(rms1 x)))))), optionally rms * (1 + scale) + shift

    RMS norms over channels; the first frame repeated, or first and last. Source: diffusers LTXVideoResnetBlock3d,
    LTX2VideoResnetBlock3d; those that inject noise are left alone; convolutions that pad by reflection are called.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: nothing but shortcut and bias is computed.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "LTXVideoResnetBlock3d"
    classes = ("LTXVideoResnetBlock3d", "LTX2VideoResnetBlock3d")

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        if getattr(block, "per_channel_scale1", None) is not None:
            return Obstacle(Reason.VARIANT, "it injects noise")
        return super().match(block, path, root)

    def norm(self, block: Any, norm: Any) -> Activate | None:
        return layers.pixel_norm(norm)

    def convs(self, block: Any, conv: Any, causal: bool = True) -> tuple[Any, ...] | None:
        found = layers.ltx(conv, getattr(conv, "is_causal", causal))
        if found is None and isinstance(getattr(conv, "conv", None), nn.Conv3d) and conv.conv.padding_mode != "zeros":
            return (conv,) if hasattr(conv, "is_causal") else (functools.partial(conv, causal=causal),)
        return None if found is None else (found,)

    def example(self, block: Any, side: int) -> tuple:
        table = block.scale_shift_table
        temb = None if table is None else torch.randn(2, table.numel(), 1, 1, 1)
        return self.images(block, side), temb

    def options(self, block: Any) -> dict[str, tuple]:
        return {"causal": (True, False)}

    def forward(
        self, block: Any, inputs: Tensor, temb: Tensor | None = None, generator: Any = None, causal: bool = True
    ) -> Tensor:
        if temb is not None and block.scale_shift_table is not None:
            inputs, temb = same_batch(inputs, temb)
        halves = self.halves(block) if inputs.dim() == 5 else None
        rows = _rows(block, temb)
        if halves is None or rows is None or block.per_channel_scale1 is not None:
            return self._original(block, inputs, temb, generator, causal)
        convs = [self.convs(block, conv, causal) or () for conv in (block.conv1, block.conv2)]
        first, second = (
            half._replace(operands=operands, convs=found)
            for half, operands, found in zip(halves, (rows[:2], rows[2:]), convs, strict=True)
        )
        return video.forward(
            video.Layers(self.name, self.zero_skip, first, second, lambda x: self.shortcut(block, x)), inputs
        )

    def _original(self, block: Any, inputs: Tensor, temb: Tensor | None, generator: Any, causal: bool) -> Tensor:
        rest = {} if hasattr(block.conv1, "is_causal") else {"causal": causal}
        return self.eager(block, inputs, temb, generator, **rest)

    def shortcut(self, block: Any, x: Tensor) -> Tensor:
        if block.norm3 is not None:
            x = block.norm3(x.movedim(1, -1)).movedim(-1, 1)
        return super().shortcut(block, x)


def _rows(block: Any, temb: Tensor | None) -> tuple[Tensor, ...] | None:
    """(scale1, shift1, scale2, shift2), each [N, C]; () without a table; None for what the ops do not take."""
    table = block.scale_shift_table
    if table is None:
        return ()
    if temb is None or temb.dim() != 5 or temb.shape[2:].numel() != 1:
        return None
    shift1, scale1, shift2, scale2 = (temb.flatten(1).unflatten(1, (4, -1)) + table).unbind(1)
    return scale1, shift1, scale2, shift2


@register
class HunyuanImageResnetBlock(VideoResnet):
    """y = x + conv2(silu(norm2(conv1(silu(norm1 x))))), of images

    Source: diffusers HunyuanImageResnetBlock.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: nothing but the bias is added.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "HunyuanImageResnetBlock"
    classes = ("HunyuanImageResnetBlock",)
    dims = 2

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        if getattr(block, "conv_shortcut", None) is not None:
            return Obstacle(Reason.VARIANT, "its shortcut comes after its branch")
        return super().match(block, path, root)

    def norm(self, block: Any, norm: Any) -> Activate | None:
        return layers.group(norm)

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        found = layers.plain(conv)
        return None if found is None else (found,)

    def forward(self, block: Any, x: Tensor) -> Tensor:
        y = self.run(block, x)
        return self.eager(block, x) if y is None else y


@register
class TemporalResnetBlock(VideoResnet):
    """y = shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x)) + temb)))), convolutions along the frames

    Source: diffusers TemporalResnetBlock (Stable Video Diffusion's U-Net and autoencoder); temb is one of each frame.
    Use: zb.accelerate(model), before torch.compile.
    Inference while conv2 is zero: nothing but shortcut and bias is computed.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "TemporalResnetBlock"
    classes = ("TemporalResnetBlock",)

    def norm(self, block: Any, norm: Any) -> Activate | None:
        return layers.group(norm)

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        found = layers.plain(conv)
        return None if found is None else (found,)

    def example(self, block: Any, side: int) -> tuple:
        x, proj = self.images(block, side), block.time_emb_proj
        return x, None if proj is None else torch.randn(2, x.shape[2], proj.in_features)

    def forward(self, block: Any, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        halves, proj = self.halves(block) if input_tensor.dim() == 5 else None, block.time_emb_proj
        if halves is None or proj is not None and (temb is None or temb.dim() != 3):
            return self.eager(block, input_tensor, temb)
        first, second = halves
        if proj is not None:
            assert temb is not None
            input_tensor, temb = same_batch(input_tensor, temb)
            e, act = proj(block.nonlinearity(temb)).transpose(1, 2)[..., None, None], second.activate
            second = second._replace(activate=lambda h, e: act(h + e), operands=(e,))
        found = video.Layers(self.name, self.zero_skip, first, second, lambda x: self.shortcut(block, x))
        return video.forward(found, input_tensor)
