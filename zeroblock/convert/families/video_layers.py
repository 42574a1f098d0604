"""What the residual blocks of video autoencoders are made of, read off their modules: norms with SiLU, and convolutions
that pad by themselves. A module whose forward is not known is None here (`on_trial`: not known yet)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ...blocks import video
from ...blocks.activated import Activate, Conv
from ...blocks.broadcast import same_batch
from ...blocks.decision import bypassable
from ...blocks.layers import DROPOUTS, SILUS, Forwards, computes, fits_fused, is_group_norm, is_unit_conv
from ...blocks.spatial_norm import spatial_norm_silu
from ..family import Family, lacks
from ..report import Obstacle, Reason

NOT_PLAIN = Obstacle(Reason.LAYERS, "its norms, convolutions or dropout are not those that zeroblock's ops compute")
_FIRST_FRAME = ("replicate", "zeros", "zeros")
_MODES = {"replicate": "replicate", "constant": "zeros", "zeros": "zeros"}

# Which forwards are known; filled by proofs.
_CHANNEL_RMS: Forwards = {}
_PIXEL_NORMS: Forwards = {}
_FRAME_NORMS: Forwards = {}
_SPATIAL_NORMS: Forwards = {}
_WAN: Forwards = {}
_HUNYUAN: Forwards = {}
_COGVIDEOX: Forwards = {}
_SAFE: Forwards = {}
_EASYANIMATE: Forwards = {}
_LTX: Forwards = {}
_LTX_AUDIO: Forwards = {}
_COSMOS: Forwards = {}
_COSMOS_PAIRS: Forwards = {}


# ---- norms ----------------------------------------------------------------------------------------------------------


def channel_rms(norm: Any) -> Activate | None:
    """Wan's: F.normalize over channels, times sqrt(C) gamma."""
    gamma = norm._parameters.get("gamma")
    if not computes(norm, _CHANNEL_RMS) or gamma is None or not getattr(norm, "channel_first", True):
        return None
    return video.channel_rms(norm) if norm.scale == gamma.shape[0] ** 0.5 else None


def is_pixel_norm(norm: Any) -> bool:
    return computes(norm, _PIXEL_NORMS)


def pixel_norm(norm: Any) -> Activate | None:
    """LTX's: x / sqrt(mean(x^2) + eps) over channels, with a weight [C] or none."""
    weight = norm._parameters.get("weight")
    if not is_pixel_norm(norm) or norm._parameters.get("bias") is not None:
        return None

    def activate(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return functional.channel_rms_norm_silu(x, weight, eps=norm.eps, eps_mode="inside", scale=scale, shift=shift)

    return activate


def group(norm: Any, per_frame: bool = False) -> Activate | None:
    if not is_group_norm(norm):
        return None
    return video.FrameGroup(norm) if per_frame else video.group(norm)


def frame_group(norm: Any, inner: str | None = None) -> Activate | None:
    """A group norm of each frame: a subclass of nn.GroupNorm, or a module that holds one under the name `inner`."""
    held = norm if inner is None else getattr(norm, inner)
    plain = isinstance(held, nn.GroupNorm) and held._parameters.get("weight") is not None
    known = computes(norm, _FRAME_NORMS) and (inner is None or is_group_norm(held))
    return video.FrameGroup(held) if plain and known else None


def group_in(norm: Any, inner: str) -> Activate | None:
    """A group norm of the clip, in a module that calls it."""
    return group(getattr(norm, inner)) if computes(norm, _FRAME_NORMS) else None


def is_spatial_norm(norm: Any) -> bool:
    """MoVQ's norm, whose scale and shift are convolutions of stretched latents (`blocks.spatial_norm`)."""
    if not hasattr(norm, "conv_y") or getattr(norm, "add_conv", False):
        return False
    convs = [getattr(conv, "conv", conv) for conv in (norm.conv_y, norm.conv_b)]
    one_tap = all(is_unit_conv(conv) and {*conv.kernel_size} == {1} and not any(conv.padding) for conv in convs)
    return one_tap and is_group_norm(norm.norm_layer) and computes(norm, _SPATIAL_NORMS)


def spatial(norm: Any) -> Activate:
    """silu of a norm of images that takes latents."""
    if not is_spatial_norm(norm):
        return lambda x, zq: F.silu(norm(x, zq))
    return lambda x, zq: spatial_norm_silu(x, norm.norm_layer, zq, norm.conv_y, norm.conv_b)


def conditioned(
    halves: tuple[video.Half, video.Half], x: Tensor, zq: Tensor
) -> tuple[Tensor, tuple[video.Half, video.Half]]:
    """x and the halves of a block of images with latents for their norms."""
    x, zq = same_batch(x, zq)
    return x, (halves[0]._replace(operands=(zq,)), halves[1]._replace(operands=(zq,)))


# ---- convolutions ---------------------------------------------------------------------------------------------------


def plain(conv: Any) -> Conv | None:
    """nn.ConvNd's own padding."""
    if isinstance(getattr(conv, "padding", ""), str) or getattr(conv, "padding_mode", None) not in _MODES:
        return None
    replicated = conv.padding_mode == "replicate" and type(conv).forward in _PLAIN and is_unit_conv(conv)
    return Conv(conv, conv.padding, conv.padding_mode) if replicated or fits_fused(conv) else None


_PLAIN: Forwards = dict.fromkeys(m.forward for m in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _sides(widths: Any) -> tuple[tuple[int, int], ...]:
    """As F.pad is told them: the last dimension first."""
    return tuple((widths[i], widths[i + 1]) for i in range(len(widths) - 2, -1, -2))


def wan(conv: Any) -> Conv | None:
    if not (computes(conv, _WAN) and is_unit_conv(conv)):
        return None
    return Conv(conv, _sides(conv._padding))


def hunyuan(conv: Any) -> Conv | None:
    inner, mode = conv.conv, _MODES.get(conv.pad_mode)
    if mode is None or not (computes(conv, _HUNYUAN) and fits_fused(inner) and not any(inner.padding)):
        return None
    return Conv(inner, _sides(conv.time_causal_padding), mode)


def cogvideox(conv: Any) -> Conv | None:
    """Also Mochi's. "replicate" repeats all edges, anything else the first frame."""
    inner = conv.conv
    if not (computes(conv, _COGVIDEOX) and computes(inner, _SAFE) and is_unit_conv(inner)):
        return None
    space = "replicate" if conv.pad_mode == "replicate" else "zeros"
    sides = (conv.time_pad, 0), (conv.height_pad,) * 2, (conv.width_pad,) * 2
    return Conv(inner, sides, ("replicate", space, space))


def ltx(conv: Any, causal: bool) -> Conv | None:
    inner = conv.conv
    if not (computes(conv, _LTX) and fits_fused(inner)):
        return None
    reach = conv.kernel_size[0] - 1
    time = (reach, 0) if causal else (reach // 2, reach // 2)
    return Conv(inner, (time, *inner.padding[1:]), _FIRST_FRAME)


def ltx_audio(conv: Any) -> Conv | None:
    inner = conv.conv
    plain = computes(conv, _LTX_AUDIO) and fits_fused(inner) and not any(inner.padding)
    return Conv(inner, _sides(conv.padding)) if plain else None


def easyanimate(conv: Any) -> Conv | None:
    """The first frame repeated; the frames it keeps are the caller's."""
    plain = is_unit_conv(conv) and conv.padding_mode == "zeros" and conv.t_stride == 1
    if not (plain and computes(conv, _EASYANIMATE)):
        return None
    return Conv(conv, ((conv.temporal_padding, 0), *conv.padding[1:]), _FIRST_FRAME)


def cosmos(pair: Any) -> tuple[Conv, ...] | None:
    """A convolution in space and one in time."""
    convs = pair.conv_s, pair.conv_t
    if not computes(pair, _COSMOS_PAIRS) or not all(computes(c, _COSMOS) and is_unit_conv(c) for c in convs):
        return None
    if any(c.pad_mode != "constant" for c in convs):
        return None
    return tuple(Conv(c, ((c.temporal_pad, 0), *_sides(c.spatial_pad)), _FIRST_FRAME) for c in convs)


# ---- the family of a block that holds them --------------------------------------------------------------------------


class Members(NamedTuple):
    norms: tuple[Any, Any]
    convs: tuple[Any, Any]
    silus: tuple[Any, ...]  # the modules that are called for it
    dropout: Any


class VideoResnet(Family):
    """What the families share: `halves` says what a block is made of now."""

    parts: ClassVar[tuple[str, ...]] = ("norm1", "conv1", "norm2", "conv2")
    dims: ClassVar[int] = 3
    tail: ClassVar[str] = "conv2"  # what a report calls the branch

    def norm(self, block: Any, norm: Any) -> Activate | None:
        raise NotImplementedError

    def convs(self, block: Any, conv: Any) -> tuple[Any, ...] | None:
        raise NotImplementedError

    def halves(self, block: Any) -> tuple[video.Half, video.Half] | None:
        """None where the block's layers are not (any more) what the family computes."""
        norms, convs, silus, dropout = self.members(block)
        fits = all(computes(m, SILUS) for m in silus) and (dropout is None or type(dropout).forward in DROPOUTS)
        if not fits or not bypassable((*norms, *convs, *silus, dropout)):
            return None
        acts, found = [self.norm(block, n) for n in norms], [self.convs(block, c) for c in convs]
        if acts[0] is None or acts[1] is None or found[0] is None or found[1] is None:
            return None
        return (
            video.Half(acts[0], (norms[0],), found[0]),
            video.Half(acts[1], (norms[1],), found[1], dropout=dropout),
        )

    def members(self, block: Any) -> Members:
        silu, dropout = getattr(block, "nonlinearity", None), getattr(block, "dropout", None)
        silus = () if silu is None else (silu,)
        return Members((block.norm1, block.norm2), (block.conv1, block.conv2), silus, dropout)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, *self.parts) or (None if self.halves(block) else NOT_PLAIN)

    def _layer(self, conv: Any) -> Any:
        """The layer that holds the weight of a block's convolution."""
        conv = getattr(conv, "conv_t", conv)
        return conv if isinstance(conv, (nn.Conv2d, nn.Conv3d)) else getattr(conv, "conv", conv)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        layer = self._layer(self.members(block).convs[1])
        return {self.tail: (layer.weight.detach(),) if is_unit_conv(layer) else (torch.empty(1, device="meta"),)}

    def images(self, block: Any, side: int) -> Tensor:
        """An example of x: two clips of four frames, or images."""
        first = self.members(block).convs[0]
        first = getattr(first, "conv_s", first)
        return torch.randn(2, self._layer(first).in_channels, *(4, 2 * side, 2)[-self.dims :])

    def example(self, block: Any, side: int) -> tuple:
        return (self.images(block, side),)

    def run(self, block: Any, x: Tensor) -> Tensor | None:
        """y, None where the original is to be called."""
        halves = self.halves(block) if x.dim() == self.dims + 2 else None
        if halves is None:
            return None
        return video.forward(video.Layers(self.name, self.zero_skip, *halves, lambda x: self.shortcut(block, x)), x)

    def shortcut(self, block: Any, x: Tensor) -> Tensor:
        layer = getattr(block, "conv_shortcut", None)
        return x if layer is None else layer(x)
