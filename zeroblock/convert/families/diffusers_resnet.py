"""diffusers' U-Net and VAE residual blocks: ResnetBlock2D, ResnetBlockCondNorm2D (`models/resnet.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...blocks import resblock, video
from ...blocks.activated import Activate
from ...blocks.decision import allowed, bypassable
from ...blocks.layers import DROPOUTS, SILUS
from ...blocks.residual import residual_branch
from ..family import Family, lacks, register
from ..report import Obstacle, Reason
from . import video_layers as layers
from .adaln import zeroing_tensors


class _Resnet(Family):
    """What both blocks share; they differ in how temb enters."""

    parts = ("norm1", "conv1", "norm2", "dropout", "conv2", "nonlinearity")

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, *self.parts, "output_scale_factor")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"conv2": zeroing_tensors(block.conv2, block.conv2.weight)}

    def forward(self, block: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        parts = _parts(block)
        plain = input_tensor.dim() == 4 and type(parts[3]).forward in DROPOUTS
        if args or kwargs or not plain or not bypassable(parts):
            return self.eager(block, input_tensor, temb, *args, **kwargs)
        y = self._fused(block, input_tensor, temb)
        if y is None:
            y = self._by_parts(block, input_tensor, temb)
        if y is None:
            return self.eager(block, input_tensor, temb)
        return y if block.output_scale_factor == 1.0 else y / block.output_scale_factor

    def _fused(self, block: Any, x: Tensor, temb: Tensor | None) -> Tensor | None:
        return None

    def _embedders(self, block: Any) -> tuple[nn.Module, ...]:
        """The modules beside `parts` that only the branch calls."""
        return ()

    def _before_conv2(self, block: Any, x: Tensor, temb: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _by_parts(self, block: Any, x: Tensor, temb: Tensor | None) -> Tensor | None:
        """Norms and activations that the fused ops do not know: by its modules, when the branch is zero."""
        modules = [getattr(block, name) for name in self.parts if name != "conv2"] + [*self._embedders(block)]
        modules += [m for m in (block.upsample, block.downsample) if isinstance(m, nn.Module)]
        if not bypassable(modules) or not allowed(self.name, self.zero_skip, block.conv2.weight):
            return None
        residual = _shortcut(block, _resampled(block, x))
        activations = (x,) if temb is None else (x, temb)

        def body(x: Tensor, temb: Tensor | None = None) -> Tensor:
            return self._before_conv2(block, x, temb)

        _, y = residual_branch(
            self.name, self.zero_skip, residual, body, block.conv2, None, activations, modules=tuple(modules)
        )
        return residual + block.conv2(body(*activations)) if y is None else y


def _parts(block: Any) -> tuple[Any, ...]:
    """`_Resnet.parts`: as an attribute of the block each costs five times as much."""
    m = block._modules
    return m["norm1"], m["conv1"], m["norm2"], m["dropout"], m["conv2"], m["nonlinearity"]


def _resampled(block: Any, t: Tensor) -> Tensor:
    resample = block.upsample or block.downsample
    return t if resample is None else resample(t)


def _shortcut(block: Any, x: Tensor) -> Tensor:
    if block.conv_shortcut is None:
        return x
    return block.conv_shortcut(x.contiguous() if block.training else x)


@register
class ResnetBlock2D(_Resnet):
    """y = (shortcut(x) + conv2(dropout(act(norm2(conv1(act(norm1 x)), temb))))) / output_scale_factor

    The U-Net and VAE block of diffusers; temb is added to conv1's output ("default") or modulates norm2
    ("scale_shift"). Fused where act is SiLU. Source: diffusers models/resnet.py.
    Use: zb.accelerate(unet) or zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: nothing but shortcut and bias is computed.
    Training forward while zero: everything but conv2, without a graph.
    Training backward while zero: conv2's and the shortcut's gradients; the rest are zeros.
    """

    name = "ResnetBlock2D"
    classes = ("ResnetBlock2D",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        norms = isinstance(block.norm1, nn.GroupNorm) and isinstance(block.norm2, nn.GroupNorm)
        return super().match(block, path, root) or (
            None if norms else Obstacle(Reason.LAYERS, "its norms are not nn.GroupNorm")
        )

    def example(self, block: Any, side: int) -> tuple:
        proj = block.time_emb_proj
        temb = None if proj is None else torch.randn(2, proj.in_features)
        return torch.randn(2, block.norm1.num_channels, 2 * side, 2), temb

    def _embedders(self, block: Any) -> tuple[nn.Module, ...]:
        return () if block.time_emb_proj is None else (block.time_emb_proj,)

    def _embedding(self, block: Any, temb: Tensor | None) -> resblock.Embedding:
        if temb is None:
            return None, None, None
        e = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
        if block.time_embedding_norm == "scale_shift":
            return *e.chunk(2, dim=1), None
        return None, None, e[:, :, None, None]

    def _takes(self, block: Any, temb: Tensor | None) -> bool:
        if temb is None:
            return block.time_emb_proj is None and block.time_embedding_norm != "scale_shift"
        known = block.time_embedding_norm in ("default", "scale_shift")
        return known and block.time_emb_proj is not None and temb.dim() == 2

    def _fused(self, block: Any, x: Tensor, temb: Tensor | None) -> Tensor | None:
        norm1, conv1, norm2, dropout, conv2, nonlinearity = _parts(block)
        fits = type(nonlinearity).forward in SILUS and resblock.fusable(norm1, conv1, norm2, conv2)
        resample = block.upsample or block.downsample
        if not fits or not self._takes(block, temb) or not isinstance(resample, (nn.Module, type(None))):
            return None  # FIR filters are functions
        found = resblock.Layers(
            self.name,
            self.zero_skip,
            norm1,
            conv1,
            norm2,
            conv2,
            dropout,
            embed=lambda temb, dtype: self._embedding(block, temb),
            embedders=self._embedders(block),
            shortcut=resblock.same if block.conv_shortcut is None else lambda x: _shortcut(block, x),
            resample_h=resample,
            resample_x=resample,
        )
        return resblock.forward(found, x, temb)

    def _by_parts(self, block: Any, x: Tensor, temb: Tensor | None) -> Tensor | None:
        return super()._by_parts(block, x, temb) if self._takes(block, temb) else None

    def _before_conv2(self, block: Any, x: Tensor, temb: Tensor | None) -> Tensor:
        h = block.conv1(_resampled(block, block.nonlinearity(block.norm1(x))))
        scale, shift, e = self._embedding(block, temb)
        h = block.norm2(h if e is None else h + e)
        if scale is not None and shift is not None:
            h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return block.dropout(block.nonlinearity(h))


@register
class SpatialNormResnetBlock2D(layers.VideoResnet):
    """y = (shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x, zq))), zq))))) / output_scale_factor, of images

    ResnetBlockCondNorm2D with SpatialNorm, of MoVQ's decoder (Kandinsky 2); before the family that only skips such
    blocks. Source: diffusers models/resnet.py.
    Use: zb.accelerate(vae), before torch.compile.
    Inference while conv2 is zero: nothing but shortcut and bias is computed.
    Training forward while zero: conv2 is not executed.
    Training backward while zero: exact zeros upstream of conv2.
    """

    name = "SpatialNormResnetBlock2D"
    classes = ("ResnetBlockCondNorm2D",)
    parts = (*layers.VideoResnet.parts, "output_scale_factor")
    dims = 2

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        if block.upsample is not None or block.downsample is not None:
            return Obstacle(Reason.VARIANT, "it changes the size of images")
        return super().match(block, path, root)

    def norm(self, block: Any, norm: Any) -> Activate | None:
        return layers.spatial(norm) if layers.is_spatial_norm(norm) else None

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        found = layers.plain(conv)
        return None if found is None else (found,)

    def example(self, block: Any, side: int) -> tuple:
        return self.images(block, side), torch.randn(2, block.norm1.conv_y.in_channels, side, 1)

    def forward(self, block: Any, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        halves = self.halves(block) if input_tensor.dim() == temb.dim() == 4 and not (args or kwargs) else None
        if halves is None:
            return self.eager(block, input_tensor, temb, *args, **kwargs)
        x, halves = layers.conditioned(halves, input_tensor, temb)
        y = video.forward(video.Layers(self.name, self.zero_skip, *halves, lambda x: self.shortcut(block, x)), x)
        return y if block.output_scale_factor == 1.0 else y / block.output_scale_factor


@register
class ResnetBlockCondNorm2D(_Resnet):
    """y = (shortcut(x) + conv2(dropout(act(norm2(conv1(act(norm1(x, temb))), temb))))) / output_scale_factor

    ResnetBlock2D with norms that take temb: AdaGroupNorm, SpatialNorm. Source: diffusers models/resnet.py. Its dense
    forward is left as it is.
    Use: zb.accelerate(model), before torch.compile.
    Inference while conv2 is zero: nothing but shortcut and bias is computed.
    Training forward while zero: everything but conv2, without a graph.
    Training backward while zero: conv2's and the shortcut's gradients; the rest are zeros.
    """

    name = "ResnetBlockCondNorm2D"
    classes = ("ResnetBlockCondNorm2D",)
    only_skips = True

    def example(self, block: Any, side: int) -> tuple:
        channels, norm = block.in_channels, block.norm1
        spatial = hasattr(norm, "conv_y")
        temb = torch.randn(2, norm.conv_y.in_channels, 3, 2) if spatial else torch.randn(2, norm.linear.in_features)
        return torch.randn(2, channels, 2 * side, 2), temb

    def _before_conv2(self, block: Any, x: Tensor, temb: Tensor | None) -> Tensor:
        h = block.conv1(_resampled(block, block.nonlinearity(block.norm1(x, temb))))
        return block.dropout(block.nonlinearity(block.norm2(h, temb)))
