"""The layers of video autoencoders. Sources: Wan 2.1 `vae.py`, and the autoencoders of HunyuanVideo, CogVideoX, Mochi
and LTX as diffusers has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks, functional
from .._padding import padded
from ..blocks import video
from ..blocks.activated import Conv
from ..blocks.decision import bypassable

_NORMS = ("channel_rms", "group", "frame_group")


class CausalConv3d(nn.Conv3d):
    """A convolution of video [N, C, T, H, W] that sees no later frame: all padding in time is in front.

    forward(x, cache=None): the frames that came before x, where a video comes in pieces, take the place of padding.
    Parameter names, initialisation and state_dict are nn.Conv3d's. With stride 1 and dilation 1 nothing is padded in
    time (`zeroblock.conv_residual`); else the padded input is a copy.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, bias: as of nn.Conv3d.
        padding: None keeps the size (for stride 1); else, as in Wan, p: 2 p frames in front, p pixels on all sides.
        padding_mode: "zeros" (Wan), "replicate" (HunyuanVideo, Mochi), or one for each dimension: ("replicate",
            "zeros", "zeros") repeats the first frame (CogVideoX, LTX, Cosmos).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] | None = None,
        dilation: int | tuple[int, int, int] = 1,
        bias: bool = True,
        padding_mode: str | Sequence[str] = "zeros",
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, 0, dilation, bias=bias)
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if padding is None:
            front, height, width = reach[0], reach[1] // 2, reach[2] // 2
        else:
            time, height, width = (padding,) * 3 if isinstance(padding, int) else padding
            front = 2 * time
        self.sides = ((front, 0), (height, height), (width, width))
        self.modes = (padding_mode,) * 3 if isinstance(padding_mode, str) else tuple(padding_mode)
        if len(self.modes) != 3:
            raise _checks.fail("CausalConv3d", "padding_mode", "be one string or three", repr(padding_mode))
        for mode in self.modes:
            _checks.choice("CausalConv3d", "padding_mode", mode, ("zeros", "replicate"))

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:  # type: ignore[override]
        front = self.sides[0][0]
        if cache is not None:
            cache = cache[:, :, max(0, cache.shape[2] - front) :] if front else None
        if self.stride == self.dilation == (1, 1, 1):
            return self.as_conv()(x, None, cache, zero_skip="never")
        if cache is not None:
            x, front = torch.cat([cache.to(x), x], 2), front - cache.shape[2]
        sides = ((front, 0), *self.sides[1:])
        numbers = [n for side, mode in zip(sides, self.modes, strict=True) for n in (*side, mode == "replicate")]
        return super().forward(padded(x, numbers))

    def as_conv(self) -> Conv:
        return Conv(self, self.sides, self.modes)


class ChannelRMSNorm(nn.Module):
    """F.normalize(x, dim=1) * sqrt(C) * gamma + bias, in float32; gamma [C, 1, 1, 1], without a bias by default. Wan's
    `WanRMS_norm(images=False)`."""

    def __init__(self, dim: int, bias: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(dim, 1, 1, 1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, self.gamma.dtype))  # as eager's product with gamma has it
        return functional.channel_rms_norm_silu(x, self.gamma, self.bias, activation=None)


class VideoResBlock(nn.Module):
    """y = shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x)))))), causal in time; x [N, C, T, H, W].

    Training keeps x, conv1's result and the norms' statistics. While conv2's weight is exactly zero it is not executed;
    in inference nothing but the shortcut is (zeroblock/zero.py). With norm="channel_rms" and zeros its state_dict is
    that of diffusers' WanResidualBlock.

    Args:
        in_channels: of x.
        out_channels: of y (None: the same); where they differ the shortcut is a 1x1x1 convolution.
        norm: "channel_rms", "group" (statistics of a clip) or "frame_group" (of each frame).
        num_groups, eps: of the group norms.
        dropout: its probability.
        padding_mode: of the convolutions, as of CausalConv3d.
    """

    zero_skip = "auto"

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        norm: str = "channel_rms",
        num_groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
        padding_mode: str | Sequence[str] = "zeros",
    ):
        super().__init__()
        _checks.choice("VideoResBlock", "norm", norm, _NORMS)
        out_channels = out_channels or in_channels

        def make(channels: int) -> nn.Module:
            return ChannelRMSNorm(channels) if norm == "channel_rms" else nn.GroupNorm(num_groups, channels, eps)

        self.per_frame = norm == "frame_group"
        self.norm1 = make(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, padding_mode=padding_mode)
        self.norm2 = make(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, padding_mode=padding_mode)
        self.conv_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self._halves()
        if not bypassable((self.norm1, self.conv1, self.norm2, self.dropout, self.conv2)):  # their hooks run
            h = self.conv1(F.silu(self._normed(self.norm1, x)))
            h = self.conv2(self.dropout(F.silu(self._normed(self.norm2, h))))
            return self.conv_shortcut(x) + h
        return video.forward(video.Layers("VideoResBlock", self.zero_skip, first, second, self.conv_shortcut), x)

    def stream(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(y, cache) of the next piece of a video, `cache` as the piece before returned it (None: the first). Pieces in
        a row give what the whole would, but for "group", whose statistics are those of a piece."""
        first, second = self._halves()
        before = cache or (None, None)
        h = video.activated(first, x)
        kept = _last_frames(before[0], h)
        h = video.activated(second, video.streamed(first, h, before[0]))
        y = video.streamed(second, h, before[1], self.conv_shortcut(x), self.zero_skip)
        return y, (kept, _last_frames(before[1], h))

    def _halves(self) -> tuple[video.Half, video.Half]:
        norm1, norm2, conv1, conv2 = self.norm1, self.norm2, self.conv1, self.conv2
        return (
            video.Half(self._activate(norm1), (norm1,), (conv1.as_conv(),)),
            video.Half(self._activate(norm2), (norm2,), (conv2.as_conv(),), dropout=self.dropout),
        )

    def _activate(self, norm: Any) -> Any:
        if not isinstance(norm, nn.GroupNorm):
            return video.channel_rms(norm)
        return video.FrameGroup(norm) if self.per_frame else video.group(norm)

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        if not self.per_frame:
            return norm(x)
        frames = x.transpose(1, 2)
        return norm(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


def _last_frames(before: Tensor | None, read: Tensor, count: int = 2) -> Tensor:
    """The last frames that a convolution has read, of this piece and the one before."""
    if read.shape[2] < count and before is not None:
        read = torch.cat([before, read], 2)
    return read[:, :, -count:].clone()
