"""Fixup's residual blocks. Source: Zhang, Dauphin & Ma 2019, hongyi-zhang/Fixup (cifar and imagenet)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..blocks import fixup
from .init import zero_parameters


def _scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((1,), value))


class _FixupBlock(nn.Module):
    """y = relu(shortcut(x) + scale * last_conv(body(x)) + last_bias); the last conv starts at zero.

    A downsampling shortcut sees x + bias1a; where it has fewer channels than the branch (CIFAR's pooling), the new ones
    are filled with zeros.
    """

    zero_skip = "auto"
    expansion = 1

    def forward(self, x: Tensor) -> Tensor:
        return fixup.forward(type(self).__name__, self.zero_skip, self, x)


class FixupBasicBlock(_FixupBlock):
    """Two 3x3 convs with scalar biases in place of norms. x [N, C, H, W]."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.bias1a = _scalar(0.0)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bias1b = _scalar(0.0)
        self.relu = nn.ReLU(inplace=True)
        self.bias2a = _scalar(0.0)
        self.conv2 = zero_parameters(nn.Conv2d(planes, planes, 3, padding=1, bias=False))
        self.scale = _scalar(1.0)
        self.bias2b = _scalar(0.0)
        self.downsample = downsample


class FixupBottleneck(_FixupBlock):
    """1x1, 3x3 (strided) and 1x1 convs, four times as wide at the end. x [N, C, H, W]."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.bias1a = _scalar(0.0)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bias1b = _scalar(0.0)
        self.bias2a = _scalar(0.0)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bias2b = _scalar(0.0)
        self.bias3a = _scalar(0.0)
        self.conv3 = zero_parameters(nn.Conv2d(planes, planes * self.expansion, 1, bias=False))
        self.scale = _scalar(1.0)
        self.bias3b = _scalar(0.0)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
