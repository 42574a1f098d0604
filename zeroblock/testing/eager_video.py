"""The residual block of video autoencoders in plain PyTorch, as Wan, HunyuanVideo and Mochi have it: the twins of
zeroblock.nn's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv3d(nn.Conv3d):
    """Pads a copy of x, and convolves that; frames `cache` stand before it."""

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
        sides = (reach[0], reach[1] // 2, reach[2] // 2)
        if padding is not None:
            time, *space = (padding,) * 3 if isinstance(padding, int) else padding
            sides = (2 * time, *space)  # type: ignore[assignment]
        self.sides = sides
        self.modes = (padding_mode,) * 3 if isinstance(padding_mode, str) else tuple(padding_mode)

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:  # type: ignore[override]
        time, height, width = self.sides
        if cache is not None:
            x, time = torch.cat([cache, x], dim=2), time - cache.shape[2]
        for mode, widths in zip(
            self.modes, ((0, 0, 0, 0, time, 0), (0, 0, height, height, 0, 0), (width, width, 0, 0, 0, 0)), strict=True
        ):
            x = F.pad(x, widths, mode={"zeros": "constant"}.get(mode, mode))
        return super().forward(x)


class ChannelRMSNorm(nn.Module):
    def __init__(self, dim: int, bias: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(dim, 1, 1, 1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = F.normalize(wide, dim=1).to(x.dtype) * x.shape[1] ** 0.5 * self.gamma
        return y if self.bias is None else y + self.bias


class FrameGroupNorm(nn.GroupNorm):
    """A group norm of each frame."""

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2)
        return super().forward(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


class VideoResBlock(nn.Module):
    """Constructor, attributes and state_dict of zeroblock.nn's."""

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
        out_channels = out_channels or in_channels

        def make(channels: int) -> nn.Module:
            if norm == "channel_rms":
                return ChannelRMSNorm(channels)
            return (nn.GroupNorm if norm == "group" else FrameGroupNorm)(num_groups, channels, eps)

        self.norm1 = make(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, padding_mode=padding_mode)
        self.norm2 = make(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, padding_mode=padding_mode)
        self.conv_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.conv_shortcut(x) + h
