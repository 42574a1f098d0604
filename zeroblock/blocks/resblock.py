"""The U-Net residual block, whoever owns its layers: zeroblock.nn.ResBlock and the blocks that accelerate() converts.

    y = shortcut(resample x) + conv2(dropout(silu(norm2(conv1(resample(silu(norm1 x))), emb))))

The embedding enters as norm2(h) * (1 + scale) + shift, or as norm2(h + e), or not at all. While conv2's weight is
exactly zero, y = shortcut + bias: conv1 runs once for conv2's gradient, or not at all (contract: zero.py).

Training keeps x, conv1's result and both norms' statistics for backward, where eager keeps x and six more activations.
Without conv1's result a seventh convolution would join the six of a step; checkpointing the block is that trade.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import functional
from .._autocast import autocast_dtype
from ..reference import draw_keep, dropout_keep
from ..steps.conv import empty_conv_output, unit_geometry
from .broadcast import same_batch
from .decision import NOT_ALLOWED, SKIPS, UNTESTED, Answer, bypassable, decide, op_policy
from .layers import fits_fused, is_group_norm, is_plain_conv, parameters_of
from .one_pass import residual_if_zero
from .skip import Branch, Tail, skipped_branch, skipped_value

# (scale, shift, None) for FiLM, (None, None, e) to be added to conv1's output, e broadcast to it; or nothing at all.
Embedding = tuple[Tensor | None, Tensor | None, Tensor | None]


class Layers(NamedTuple):
    """The parts of one block."""

    name: str  # of its counter
    zero_skip: str
    norm1: Any  # has num_groups, weight, bias and eps, as norm2
    conv1: Any
    norm2: Any
    conv2: Any
    dropout: Any  # has p and training; None: absent
    embed: Callable[[Any, torch.dtype], Embedding]  # embed(emb, dtype) for a conv1 that computes in dtype
    embedders: tuple[nn.Module, ...]  # the modules that embed calls
    shortcut: Callable[[Tensor], Tensor]  # shortcut(resampled x) is the residual
    resample_h: Callable[[Tensor], Tensor] | None = None  # between silu and conv1
    resample_x: Callable[[Tensor], Tensor] | None = None


def same(x: Tensor) -> Tensor:
    """The shortcut of a block that has none of its own."""
    return x


def fusable(norm1: Any, conv1: Any, norm2: Any, conv2: Any, swish: tuple[float, float] = (0.0, 0.0)) -> bool:
    """Whether the fused ops take these layers as they are now: same-size convolutions, plain parameters. swish: what
    each norm has to compute itself (`is_group_norm`)."""
    return _same_size(conv1) and _same_size(conv2) and is_group_norm(norm1, swish[0]) and is_group_norm(norm2, swish[1])


# A look into a table takes a third of the time of comparing size by size, which showed in small blocks. Only usual
# kernels are in it: a compiler reads the whole of it.
_SAME_PADDING = {(k,) * dims: (k // 2,) * dims for dims in (1, 2, 3) for k in (1, 3, 5)}


def _same_size(conv: Any) -> bool:
    if not fits_fused(conv):
        return False
    size, padding = conv.kernel_size, conv.padding
    if size == (3, 3):
        return padding == (1, 1)
    usual = _SAME_PADDING.get(size)
    return padding == usual if usual is not None else all(k == 2 * p + 1 for k, p in zip(size, padding, strict=True))


def forward(layers: Layers, x: Tensor, emb: Any) -> Tensor:
    """y of a block whose layers are `fusable`, with no hooks that watch them."""
    if emb is not None:
        x, emb = same_batch(x, emb)
    answer, y = (NOT_ALLOWED, None) if is_compiling() else _decide(layers, x)
    if y is not None:
        return y
    _, policy, _, conv1, norm2, conv2, dropout, _, _, shortcut, _, resample_x = layers
    resampled = x if resample_x is None else resample_x(x)
    size = (x.shape[0], conv1.out_channels, *resampled.shape[2:])
    if answer in SKIPS:
        return _skipped(layers, x, emb, resampled, size)
    keep = None if dropout is None or not dropout.training else _draw_keep(layers, x, size)
    h, *film = _body(layers, size, x, emb)
    scale, shift = film or (None, None)
    return functional.group_norm_silu_conv_residual(
        h,
        norm2.num_groups,
        norm2.weight,
        norm2.bias,
        conv2.weight,
        conv2.bias,
        shortcut(resampled),
        eps=norm2.eps,
        scale=scale,
        shift=shift,
        padding=conv2.padding,
        dropout_p=0.0 if dropout is None else dropout.p,
        keep=keep,
        zero_skip=op_policy(answer, policy),
    )


def _decide(layers: Layers, x: Tensor) -> tuple[Answer, Tensor | None]:
    """Whether the block is skipped, and y where nothing but x and conv2's bias is left of it."""
    name, policy, _, _, _, conv2, dropout, _, embedders, shortcut, resample_h, resample_x = layers
    if (
        resample_x is None
        and not torch.is_grad_enabled()
        and (shortcut is same or _is_identity(shortcut))
        and (dropout is None or not dropout.training or dropout.p == 0.0)
    ):
        return residual_if_zero(name, policy, conv2, x, embedders)
    bypassed = (*embedders, resample_h) if isinstance(resample_h, nn.Module) else embedders
    return decide(name, policy, (conv2.weight,), bypassed=bypassed), None


def _is_identity(shortcut: Any) -> bool:
    """The module that does nothing, and that nobody watches."""
    return type(shortcut) is nn.Identity and not (
        shortcut._forward_hooks or shortcut._forward_pre_hooks or "forward" in shortcut.__dict__
    )


def _hidden_dtype(layers: Layers) -> torch.dtype:
    """The dtype of conv1's output."""
    return autocast_dtype(layers.conv1.weight) or layers.conv1.weight.dtype


def _body(layers: Layers, size: tuple[int, ...], x: Tensor, emb: Any) -> tuple[Tensor, ...]:
    """What norm2 sees: (h,), or (h, scale, shift). An embedding that is added enters as conv1's residual."""
    norm, conv = layers.norm1, layers.conv1
    scale, shift, e = layers.embed(emb, _hidden_dtype(layers))
    e = None if e is None else e.expand(size)
    if layers.resample_h is not None:
        h = layers.resample_h(functional.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
        h = functional.conv_residual(h, conv.weight, conv.bias, e, padding=conv.padding, zero_skip=UNTESTED)
    else:
        h = functional.group_norm_silu_conv_residual(
            x,
            norm.num_groups,
            norm.weight,
            norm.bias,
            conv.weight,
            conv.bias,
            e,
            eps=norm.eps,
            padding=conv.padding,
            zero_skip=UNTESTED,
        )
    return (h,) if scale is None or shift is None else (h, scale, shift)


def _draw_keep(layers: Layers, x: Tensor, size: tuple[int, ...]) -> Tensor | None:
    """Dropout's mask, drawn for a tensor of the shape, dtype and memory format of conv1's output."""
    dropout = layers.dropout
    if dropout is None or not dropout.training or dropout.p == 0.0:
        return None
    conv = layers.conv1
    h = empty_conv_output(x, conv.weight, unit_geometry(conv.padding), _hidden_dtype(layers), size)
    return draw_keep(h, dropout.p, True)


def _skipped(layers: Layers, x: Tensor, emb: Any, resampled: Tensor, size: tuple[int, ...]) -> Tensor:
    norm, tail, shortcut = layers.norm2, Tail(layers.conv2), layers.shortcut
    keep = _draw_keep(layers, x, size)
    residual = shortcut(resampled)
    if not torch.is_grad_enabled():
        # The only reference to what a plain convolution returned is this one.
        owned = isinstance(shortcut, nn.Module) and is_plain_conv(shortcut) and bypassable((shortcut,))
        return skipped_value(tail, residual, residual, owned=owned)

    def hidden(h: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        a = functional.group_norm_silu(h, norm.num_groups, norm.weight, norm.bias, norm.eps, scale=scale, shift=shift)
        return a if keep is None else dropout_keep(a, keep, layers.dropout.p)

    def body(x: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
        return _body(layers, size, x, emb)

    activations = (x,) if emb is None else (x, emb)
    parameters = parameters_of(layers.norm1, layers.conv1, *layers.embedders, norm)
    recomputed = (norm.weight, norm.bias)
    branch = Branch(tail, activations, parameters, body, hidden, residual, carried=True, recomputed=recomputed)
    return skipped_branch(branch, residual)
