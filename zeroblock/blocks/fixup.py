"""Fixup's residual block, whoever owns its layers: y = relu(shortcut(x) + scale * last_conv(body(x)) + last_bias).

Source: hongyi-zhang/Fixup, cifar and imagenet. The blocks have these attributes: conv1, conv2 (and conv3 in a
bottleneck), the scalars bias1a, bias1b, bias2a, ..., scale, relu, and downsample, a module or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._layout import in_layout, layout_after
from .residual import residual_branch


def forward(name: str, policy: str, block: Any, x: Tensor) -> Tensor:
    """y of a basic block or, where it has a conv3, of a bottleneck; skipped while the last convolution is zero."""
    before_last: Callable[[Any, Tensor], Tensor]
    if "conv3" in block._modules:
        before_last, conv, bias = bottleneck_body, block.conv3, block.bias3b
    else:
        before_last, conv, bias = basic_body, block.conv2, block.bias2b

    def body(x: Tensor, *_scalars: Tensor) -> Tensor:
        return before_last(block, x)

    identity = shortcut(block, x, conv.weight.shape[0])
    scale = block.scale
    scalars = [p for p in block._parameters.values() if p is not None and p is not bias and p is not scale]
    convs = tuple(m for m in block._modules.values() if isinstance(m, nn.Conv2d) and m is not conv)
    modules = (*convs, block.relu)
    residual = identity + bias
    _, y = residual_branch(name, policy, residual, body, conv, scale, (x, *scalars), modules=modules)
    if y is not None:  # eager adds into what the convolution returned
        return F.relu(in_layout(y, layout_after(residual, *(m.weight for m in convs), conv.weight)), inplace=True)
    out = conv(body(x)) * scale + bias
    return F.relu(out.add_(identity), inplace=True)


def shortcut(block: Any, x: Tensor, channels: int) -> Tensor:
    """x, or downsample(x + bias1a) with channels of zeros appended where it has fewer than the branch (CIFAR)."""
    if block.downsample is None:
        return x
    identity = block.downsample(x + block.bias1a)
    missing = channels - identity.shape[1]
    if missing > 0:
        identity = torch.cat((identity, torch.zeros_like(identity[:, :missing])), dim=1)
    return identity


def basic_body(block: Any, x: Tensor) -> Tensor:
    return block.relu(block.conv1(x + block.bias1a) + block.bias1b) + block.bias2a


def bottleneck_body(block: Any, x: Tensor) -> Tensor:
    out = block.relu(block.conv1(x + block.bias1a) + block.bias1b)
    return block.relu(block.conv2(out + block.bias2a) + block.bias2b) + block.bias3a
