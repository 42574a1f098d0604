"""The residual blocks of diffusers' video autoencoders that keep frames between calls, so that a video can be encoded
and decoded in pieces: Wan's in a list, CogVideoX's and Mochi's in dictionaries, EasyAnimate's in the convolutions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks import spatial_norm, video
from ...blocks.activated import Activate
from ...blocks.broadcast import same_batch
from ..family import register
from . import video_layers as layers
from .video_layers import VideoResnet

# From so many elements on CogVideoX's convolutions run in pieces.
_LARGE = 1 << 30
_KEPT = 2  # frames


@register
class WanResidualBlock(VideoResnet):
    """y = shortcut(x) + conv2(dropout(silu(rms2(conv1(silu(rms1 x)))))), zeros in front in time, or feat_cache's frames

    Source: diffusers WanResidualBlock, QwenImageResidualBlock.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: nothing but shortcut and bias is computed; with a feat_cache conv2 is not executed.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "WanResidualBlock"
    classes: ClassVar[tuple[str, ...]] = ("WanResidualBlock", "QwenImageResidualBlock")

    def norm(self, block: Any, norm: Any) -> Activate | None:
        return layers.channel_rms(norm)

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        found = layers.wan(conv)
        return None if found is None else (found,)

    def example(self, block: Any, side: int) -> tuple:
        return self.images(block, side), None, [0]

    def options(self, block: Any) -> dict[str, tuple]:
        x = self.images(block, 2)
        widths = [conv.in_channels for conv in self.members(block).convs]
        kept = [[torch.randn(2, c, frames, *x.shape[3:]) for c in widths] for frames in (1, _KEPT)]
        return {"feat_cache": ([None, None], *kept)}

    def forward(self, block: Any, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
        if feat_cache is None:
            y = self.run(block, x)
        else:
            y = self._streamed(block, x, feat_cache, feat_idx)
        if y is not None:
            return y
        return self.eager(block, x, feat_cache) if feat_idx is None else self.eager(block, x, feat_cache, feat_idx)

    def _streamed(self, block: Any, x: Tensor, cache: Any, index: Any) -> Tensor | None:
        halves = self.halves(block) if x.dim() == 5 and index is not None else None
        if halves is None or not all(t is None or isinstance(t, Tensor) for t in cache[index[0] : index[0] + 2]):
            return None
        h, residual = x, None
        for half in halves:
            before = cache[index[0]]
            before = None if before is None else before.to(x.device)
            if half is halves[1]:
                residual = self.shortcut(block, x)
            h = video.activated(half, h)
            kept = h[:, :, -_KEPT:].clone()
            if kept.shape[2] < _KEPT and before is not None:
                kept = torch.cat([before[:, :, -1:], kept], dim=2)
            h = video.streamed(half, h, before, residual, self.zero_skip)
            cache[index[0]] = kept
            index[0] += 1
        return h


@register
class CogVideoXResnetBlock3D(VideoResnet):
    """y = shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x)) + temb))))

    Group norms, or norms conditioned on latents (zq); the first frame repeated in front, or conv_cache's frames.
    Source: diffusers CogVideoXResnetBlock3D.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: conv2 is not executed.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "CogVideoXResnetBlock3D"
    classes = ("CogVideoXResnetBlock3D",)

    def norm(self, block: Any, norm: Any) -> Activate | None:
        if isinstance(norm, nn.GroupNorm):
            return layers.group(norm)
        return video.as_it_is if layers.is_spatial_norm(norm) else F.silu  # after `_conditioned`

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        found = layers.cogvideox(conv)
        return None if found is None else (found,)

    def example(self, block: Any, side: int) -> tuple:
        width = block.spatial_norm_dim
        return self.images(block, side), None, None if width is None else torch.randn(2, width, 2, side, 1)

    def options(self, block: Any) -> dict[str, tuple]:
        x = self.images(block, 2)
        widths = {"conv1": block.conv1.conv.in_channels, "conv2": block.conv2.conv.in_channels}
        kept = {name: torch.randn(2, c, _KEPT, *x.shape[3:]) for name, c in widths.items()}
        temb = getattr(block, "temb_proj", None)
        found: dict[str, tuple] = {"conv_cache": ({}, kept)}
        return found if temb is None else found | {"temb": (torch.randn(2, temb.in_features),)}

    def forward(
        self,
        block: Any,
        inputs: Tensor,
        temb: Tensor | None = None,
        zq: Tensor | None = None,
        conv_cache: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        halves = self.halves(block) if inputs.dim() == 5 and inputs.numel() < _LARGE else None
        spatial = not isinstance(block.norm1, nn.GroupNorm)
        if halves is None or spatial != (zq is not None) or temb is not None and not hasattr(block, "temb_proj"):
            return self.eager(block, inputs, temb, zq, conv_cache)
        inputs = inputs if temb is None else same_batch(inputs, temb)[0]
        inputs = inputs if zq is None else same_batch(inputs, zq)[0]
        cache, h, residual = conv_cache or {}, inputs, None
        kept: dict[str, Any] = {}
        for i, half in enumerate(halves, 1):
            norm, conv = f"norm{i}", f"conv{i}"
            if zq is not None:
                h, kept[norm] = _conditioned(getattr(block, norm), half, h, zq, cache.get(norm))
            if half is halves[1]:
                residual = self._shortcut(block, inputs, cache, kept)
            h = video.activated(half, h)
            h, kept[conv] = self._streamed(half, h, cache.get(conv), residual)
            if i == 1 and temb is not None:
                h = h + block.temb_proj(block.nonlinearity(temb))[:, :, None, None, None]
        if "conv_shortcut" in kept:
            kept["conv_shortcut"] = kept.pop("conv_shortcut")  # the last
        return h, kept

    def _streamed(
        self, half: video.Half, h: Tensor, before: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        conv = half.convs[0]
        if conv.padding_mode[1] == "replicate":  # which keeps nothing
            return video.streamed(half, h, None, residual, self.zero_skip), None
        y = video.streamed(half, h, before, residual, self.zero_skip)
        return y, _last_frames(h, before, conv.padding[0][0])

    def _shortcut(self, block: Any, x: Tensor, cache: dict[str, Any], kept: dict[str, Any]) -> Tensor:
        layer = getattr(block, "conv_shortcut", None)
        if layer is None or not block.use_conv_shortcut:
            return x if layer is None else layer(x)
        y, kept["conv_shortcut"] = layer(x, conv_cache=cache.get("conv_shortcut"))
        return y


def _conditioned(norm: Any, half: video.Half, f: Tensor, zq: Tensor, cache: Any) -> tuple[Tensor, dict[str, Any]]:
    """What `half` activates, and the latents that the convolutions of one tap keep, which nobody reads."""
    if half.activate is not video.as_it_is:
        return norm(f, zq, conv_cache=cache)
    pieces = spatial_norm.first_frame_apart(f)
    h = spatial_norm.spatial_norm_silu(f, norm.norm_layer, zq, norm.conv_y.conv, norm.conv_b.conv, pieces)
    kept = spatial_norm.stretched(zq, f, pieces)
    return h, {"conv_y": kept, "conv_b": kept}


def _last_frames(read: Tensor, before: Tensor | None, count: int) -> Tensor:
    """Of what a convolution read with the frames before it, or its own first repeated."""
    if read.shape[2] < count:
        front = read[:, :, :1].expand(-1, -1, count, -1, -1) if before is None else before
        read = torch.cat([front.to(read), read], 2)
    return read[:, :, -count:].clone()


@register
class MochiResnetBlock3D(VideoResnet):
    """y = x + conv2(silu(norm2(conv1(silu(norm1 x))))), group norms of each frame, edges repeated

    Source: diffusers MochiResnetBlock3D.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: nothing but the bias is added.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "MochiResnetBlock3D"
    classes = ("MochiResnetBlock3D",)

    def norm(self, block: Any, norm: Any) -> Activate | None:
        return layers.frame_group(norm, "norm_layer")

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        found = layers.cogvideox(conv)
        return None if found is None or found.padding_mode[1] != "replicate" else (found,)

    def options(self, block: Any) -> dict[str, tuple]:
        return {"conv_cache": ({}, {"conv1": None, "conv2": None})}

    def forward(
        self, block: Any, inputs: Tensor, conv_cache: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, None]]:
        y = None if inputs.numel() >= _LARGE else self.run(block, inputs)
        return self.eager(block, inputs, conv_cache) if y is None else (y, {"conv1": None, "conv2": None})


@register
class EasyAnimateResidualBlock3D(VideoResnet):
    """y = (shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x))))))) / output_scale_factor

    Group norms of each frame or of the clip; the first frame repeated in front, or the frames that a convolution has
    kept. Source: diffusers EasyAnimateResidualBlock3D.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: conv2 is not executed.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "EasyAnimateResidualBlock3D"
    classes = ("EasyAnimateResidualBlock3D",)
    parts = (*VideoResnet.parts, "shortcut", "output_scale_factor")

    def norm(self, block: Any, norm: Any) -> Activate | None:
        return layers.group(norm, block.spatial_group_norm)

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        found = layers.easyanimate(conv)
        return None if found is None else (found,)

    def forget(self, block: Any) -> None:
        for conv in (block.conv1, block.conv2):
            conv.prev_features = None

    def forward(self, block: Any, hidden_states: Tensor) -> Tensor:
        halves = self.halves(block) if hidden_states.dim() == 5 else None
        if halves is None:
            return self.eager(block, hidden_states)
        h, residual = hidden_states, None
        for half, conv in zip(halves, (block.conv1, block.conv2), strict=True):
            if half is halves[1]:
                residual = block.shortcut(hidden_states)
            before = conv.prev_features
            h = video.activated(half, h)
            kept = _last_frames(h, before, conv.temporal_padding)
            h = video.streamed(half, h, before, residual, self.zero_skip)
            conv.prev_features = kept
        return h if block.output_scale_factor == 1.0 else h / block.output_scale_factor
