"""Fixup's residual blocks. Source: Zhang, Dauphin & Ma 2019, hongyi-zhang/Fixup (cifar and imagenet)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import layers as _common
from .residual import residual_branch


def _scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((1,), value))


class _FixupBlock(nn.Module):
    """y = relu(shortcut(x) + scale * last_conv(body(x)) + last_bias); the last conv starts at zero.

    A downsampling shortcut sees x + bias1a; where it has fewer channels than the branch (CIFAR's pooling), the new ones
    are filled with zeros.
    """

    zero_skip = "auto"
    expansion = 1
    downsample: nn.Module | None

    def _body(self, x: Tensor, *_parameters: Tensor) -> Tensor:
        raise NotImplementedError

    def _last(self) -> tuple[nn.Module, nn.Parameter]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return fixup_block(type(self).__name__, self.zero_skip, self, self._body, *self._last(), x)


def fixup_block(
    name: str,
    policy: str,
    block: nn.Module,
    body: Callable[..., Tensor],
    conv: nn.Module,
    bias: Tensor,
    x: Tensor,
) -> Tensor:
    """relu(shortcut(x) + scale * conv(body(x)) + bias) of a block with Fixup's attributes; skipped while conv is
    zero."""
    identity = _shortcut(block, x, conv.weight.shape[0])
    scalars = [p for p in block.parameters(recurse=False) if p is not bias and p is not block.scale]
    convs = tuple(m for m in block.children() if isinstance(m, nn.Conv2d) and m is not conv)
    modules = (*convs, block.relu)
    y = residual_branch(name, policy, identity + bias, body, conv, block.scale, (x, *scalars), modules=modules)
    if y is not None:
        return F.relu(y, inplace=True)
    out = conv(body(x)) * block.scale + bias
    return F.relu(out.add_(identity), inplace=True)


def _shortcut(block: nn.Module, x: Tensor, channels: int) -> Tensor:
    if block.downsample is None:
        return x
    identity = block.downsample(x + block.bias1a)
    missing = channels - identity.shape[1]
    if missing > 0:
        identity = torch.cat((identity, torch.zeros_like(identity[:, :missing])), dim=1)
    return identity


def basic_body(block: nn.Module, x: Tensor) -> Tensor:
    return block.relu(block.conv1(x + block.bias1a) + block.bias1b) + block.bias2a


def bottleneck_body(block: nn.Module, x: Tensor) -> Tensor:
    out = block.relu(block.conv1(x + block.bias1a) + block.bias1b)
    return block.relu(block.conv2(out + block.bias2a) + block.bias2b) + block.bias3a


class FixupBasicBlock(_FixupBlock):
    """Two 3x3 convs with scalar biases in place of norms. x [N, C, H, W]."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.bias1a = _scalar(0.0)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bias1b = _scalar(0.0)
        self.relu = nn.ReLU(inplace=True)
        self.bias2a = _scalar(0.0)
        self.conv2 = _common.zero_parameters(nn.Conv2d(planes, planes, 3, padding=1, bias=False))
        self.scale = _scalar(1.0)
        self.bias2b = _scalar(0.0)
        self.downsample = downsample

    def _body(self, x: Tensor, *_parameters: Tensor) -> Tensor:
        return basic_body(self, x)

    def _last(self) -> tuple[nn.Module, nn.Parameter]:
        return self.conv2, self.bias2b


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
        self.conv3 = _common.zero_parameters(nn.Conv2d(planes, planes * self.expansion, 1, bias=False))
        self.scale = _scalar(1.0)
        self.bias3b = _scalar(0.0)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def _body(self, x: Tensor, *_parameters: Tensor) -> Tensor:
        return bottleneck_body(self, x)

    def _last(self) -> tuple[nn.Module, nn.Parameter]:
        return self.conv3, self.bias3b
