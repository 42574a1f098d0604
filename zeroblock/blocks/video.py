"""The residual block of video autoencoders, whoever owns its layers: zeroblock.nn.VideoResBlock and the blocks that
accelerate() converts.

    y = shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1 x))))))

The norms are any function (`Half.activate`), the convolutions padded on one side in time. Training keeps x and what
conv1 gives, with what the norms keep of it; inference nothing. While conv2's weight is exactly zero, inference is
shortcut + bias, and training runs all but conv2 (contract: zero.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from .._autocast import autocast_dtype
from ..ops.residual_alone import residual_alone
from .activated import Activate, Conv, activated_conv, dropped
from .decision import ALREADY_JUDGED, RUN, SKIPS, UNTESTED, decide
from .layers import parameters_of


class Half(NamedTuple):
    """act(norm x), dropout, and one or more convolutions one after the other: `Conv`, or modules that are called."""

    activate: Activate
    modules: tuple[nn.Module, ...]  # what activate calls or reads the parameters of
    convs: tuple[Any, ...]
    operands: tuple[Tensor, ...] = ()  # what activate takes beside x
    dropout: Any = None


class Layers(NamedTuple):
    name: str  # of its counter
    zero_skip: str
    first: Half
    second: Half
    shortcut: Callable[[Tensor], Tensor]


def run_half(half: Half, x: Tensor, residual: Tensor | None = None, zero_skip: str = UNTESTED) -> Tensor:
    """residual + convs(dropout(activate(x)))"""
    first, *rest = half.convs
    if not (isinstance(first, Conv) and torch.is_grad_enabled()):
        convs, h = _ready(half, activated(half, x))
        return _convolved(convs, h, residual, zero_skip)
    h = activated_conv(
        half.activate,
        (x, *half.operands),
        parameters_of(*half.modules),
        first,
        None if rest else residual,
        dropout=half.dropout,
        framewise=isinstance(half.activate, FrameGroup),
        zero_skip=UNTESTED if rest else zero_skip,
    )
    return _convolved(rest, h, residual, zero_skip) if rest else h


def _convolved(convs: Sequence[Any], h: Tensor, residual: Tensor | None, zero_skip: str) -> Tensor:
    *front, last = convs
    for conv in front:
        h = conv(h)
    if isinstance(last, Conv):
        return last(h, residual, zero_skip=zero_skip)
    h = last(h)
    return h if residual is None else h + residual


def activated(half: Half, x: Tensor) -> Tensor:
    """dropout(activate(x))"""
    return dropped(half.activate(x, *half.operands), half.dropout, isinstance(half.activate, FrameGroup))


def _ready(half: Half, h: Tensor) -> tuple[Sequence[Any], Tensor]:
    """The convolutions and what the first of them reads of h; where padding copies it, the copy."""
    first, *rest = half.convs
    if isinstance(first, Conv):
        first, h = first.ahead(h)
    return (first, *rest), h


def streamed(
    half: Half, h: Tensor, cache: Tensor | None, residual: Tensor | None = None, zero_skip: str = UNTESTED
) -> Tensor:
    """residual + conv(h) of a piece of a video, h as `activated` gives it; `cache`: what the convolution read before,
    or None. For one convolution: a `Conv`, or a module that takes the cache."""
    conv = half.convs[0]
    if isinstance(conv, Conv):
        return conv(h, residual, cache, zero_skip=zero_skip)
    y = conv(h, cache)
    return y if residual is None else y + residual


def forward(layers: Layers, x: Tensor) -> Tensor:
    _, policy, first, second, shortcut = layers
    skipped, policy = _skipped(layers, x)
    if skipped is not None:
        return skipped
    h = run_half(first, x)
    if torch.is_grad_enabled():
        return run_half(second, h, shortcut(x), policy)
    h = activated(second, h)  # what conv1 gave is not held while conv2 runs
    convs, h = _ready(second, h)
    return _convolved(convs, h, shortcut(x), policy)


def _skipped(layers: Layers, x: Tensor) -> tuple[Tensor | None, str]:
    """Without gradients, y of a branch that is zero; and the policy for its last convolution."""
    name, policy, first, second, shortcut = layers
    tail, dropout = second.convs[-1], second.dropout
    draws = dropout is not None and dropout.training and dropout.p > 0.0
    if torch.is_grad_enabled() or draws or not isinstance(tail, Conv):
        return None, policy
    weight, bias = tail.layer.weight, tail.layer.bias
    bypassed = [*first.modules, *_layers(first.convs), *second.modules, *_layers(second.convs), dropout]
    answer = decide(name, policy, (weight,), bypassed=bypassed)
    if answer not in SKIPS:
        return None, ALREADY_JUDGED if answer is RUN else policy
    dtype = autocast_dtype(weight) or weight.dtype
    return residual_alone(shortcut(x), None if bias is None else bias.to(dtype), None, 1, dtype, None), policy


def _layers(convs: Sequence[Any]) -> list[Any]:
    return [conv.layer if isinstance(conv, Conv) else conv for conv in convs]


def as_it_is(x: Tensor) -> Tensor:
    """What a half without a norm activates."""
    return x


# ---- norms ----------------------------------------------------------------------------------------------------------


def channel_rms(norm: Any, eps: float = 1e-12, eps_mode: str = "max") -> Activate:
    """silu of the RMS norm over channels; `norm` has gamma [C, 1, 1, 1], and bias of that shape or a number, 0."""

    def activate(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        gamma, bias = getattr(norm, "gamma", None), getattr(norm, "bias", None)
        bias = bias if isinstance(bias, Tensor) else None
        return functional.channel_rms_norm_silu(x, gamma, bias, eps=eps, eps_mode=eps_mode, scale=scale, shift=shift)

    return activate


def group(norm: nn.GroupNorm) -> Activate:
    """silu of a group norm over the clip."""

    def activate(x: Tensor) -> Tensor:
        return functional.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)

    return activate


class FrameGroup:
    """silu of a group norm over each frame. Eager's result lies frame by frame in memory: that is the order in which it
    draws a dropout mask."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        return functional.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, per_frame=True)
