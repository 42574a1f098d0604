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

from .. import functional, zero
from .._autocast import autocast_dtype
from .._layout import channels_last_format
from ..reference import draw_keep, dropout_keep
from . import layers as _common
from .one_pass import residual_if_zero
from .skip import Branch, Tail, bare_branch, skipped_branch

# (scale, shift, None) for FiLM, (None, None, e) to be added to conv1's output, e broadcast to it; or nothing at all.
Embedding = tuple[Tensor | None, Tensor | None, Tensor | None]


class Layers(NamedTuple):
    """The parts of one block. `name` is that of its counter; norm1 and norm2 hold num_groups, weight, bias and eps.

    embed(emb, dtype) gives the embedding for a conv1 that computes in dtype, by the modules `others`, which a skip
    leaves uncalled. resample_h and resample_x (None: absent) act between silu and conv1, and on x; shortcut(resampled
    x) is the residual.
    """

    name: str
    zero_skip: str
    norm1: Any
    conv1: Any
    norm2: Any
    conv2: Any
    dropout: Any  # has p and training; None: absent
    embed: Callable[[Tensor, torch.dtype], Embedding]
    others: tuple[nn.Module, ...]
    shortcut: Callable[[Tensor], Tensor]
    resample_h: Callable[[Tensor], Tensor] | None = None
    resample_x: Callable[[Tensor], Tensor] | None = None


def fusable(norm1: Any, conv1: Any, norm2: Any, conv2: Any) -> bool:
    """Whether the fused ops take these layers as they are now: same-size convolutions, plain parameters."""
    return _same_size(conv1) and _same_size(conv2) and is_norm(norm1) and is_norm(norm2)


def is_norm(norm: Any) -> bool:
    """A GroupNorm with parameters of its own (parametrized ones live elsewhere)."""
    return isinstance(norm, nn.GroupNorm) and norm._parameters.get("weight") is not None


def _same_size(conv: Any) -> bool:
    if not _common.fits_fused(conv):
        return False
    for k, p in zip(conv.kernel_size, conv.padding, strict=True):
        if k != 2 * p + 1:
            return False
    return True


def bare(
    name: str, policy: str, conv2: Any, dropout: Any, shortcut: Any, bypassed: tuple[nn.Module, ...], x: Tensor
) -> Any:
    """The inference of a block whose shortcut is the identity, when nothing else has to be computed: y where conv2's
    weight is exactly zero, None where it is not, NotImplemented where `forward` has to find out. Test and copy are one
    pass over memory. For layers that are `fusable`; `bypassed`: what a skip leaves uncalled and nobody has looked at
    yet, which None tells is `zero.bypassable`."""
    if (
        torch.is_grad_enabled()
        or type(shortcut) is not nn.Identity
        or (dropout is not None and dropout.training and dropout.p != 0.0)
        or not zero.may_skip_branch(name, policy, conv2._parameters["weight"])
        or not zero.bypassable((*bypassed, shortcut))
    ):
        return NotImplemented
    y = residual_if_zero(conv2, x)
    if y is not NotImplemented:
        zero.count(name, y is not None)
    return y


def forward(layers: Layers, x: Tensor, emb: Any) -> Tensor:
    """y of a block whose layers are `fusable` and `zero.bypassable`."""
    conv2 = layers.conv2
    if layers.resample_x is None and not torch.is_grad_enabled():
        y = bare(layers.name, layers.zero_skip, conv2, layers.dropout, layers.shortcut, layers.others, x)
        if y is None:
            layers = layers._replace(zero_skip="never")  # judged already
        elif y is not NotImplemented:
            return y
    resampled = x if layers.resample_x is None else layers.resample_x(x)
    size = (x.shape[0], layers.conv1.out_channels, *resampled.shape[2:])
    tail_skip = layers.zero_skip
    bypassed = (*layers.others, *(m for m in (layers.resample_h,) if isinstance(m, nn.Module)))
    if zero.may_skip_branch(layers.name, layers.zero_skip, conv2.weight) and zero.bypassable(bypassed):
        tail = Tail(conv2)
        if _common.decide(layers.name, tail):
            return _skipped(layers, x, emb, resampled, size, tail)
        tail_skip = "never"  # judged already
    keep = _draw_keep(layers, x, size)
    h, *film = _body(layers, size, x, emb)
    scale, shift = film or (None, None)
    return functional.group_norm_silu_conv_residual(
        h,
        layers.norm2.num_groups,
        layers.norm2.weight,
        layers.norm2.bias,
        conv2.weight,
        conv2.bias,
        layers.shortcut(resampled),
        eps=layers.norm2.eps,
        scale=scale,
        shift=shift,
        padding=conv2.padding,
        dropout_p=0.0 if layers.dropout is None else layers.dropout.p,
        keep=keep,
        zero_skip=tail_skip,
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
        h = functional.conv_residual(h, conv.weight, conv.bias, e, padding=conv.padding, zero_skip="never")
    else:
        h = functional.group_norm_silu_conv_residual(
            x, norm.num_groups, norm.weight, norm.bias, conv.weight, conv.bias, e, eps=norm.eps,
            padding=conv.padding, zero_skip="never",
        )  # fmt: skip
    return (h,) if scale is None else (h, scale, shift)


def _draw_keep(layers: Layers, x: Tensor, size: tuple[int, ...]) -> Tensor | None:
    """Dropout's mask, drawn for a tensor of the shape, dtype and memory format of conv1's output."""
    dropout = layers.dropout
    if dropout is None or not dropout.training or dropout.p == 0.0:
        return None
    layout = channels_last_format(x) or channels_last_format(layers.conv1.weight) or torch.contiguous_format
    h = torch.empty(size, dtype=_hidden_dtype(layers), device=x.device, memory_format=layout)
    return draw_keep(h, dropout.p, True)


def _skipped(layers: Layers, x: Tensor, emb: Any, resampled: Tensor, size: tuple[int, ...], tail: Tail) -> Tensor:
    norm = layers.norm2
    keep = _draw_keep(layers, x, size)
    shortcut = layers.shortcut
    residual = shortcut(resampled)
    if not torch.is_grad_enabled():
        # A plain convolution's result is nobody else's.
        owned = isinstance(shortcut, nn.Module) and _common.is_plain_conv(shortcut) and zero.bypassable((shortcut,))
        return bare_branch(tail, residual, residual, owned=owned)

    def hidden(h: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        a = functional.group_norm_silu(h, norm.num_groups, norm.weight, norm.bias, norm.eps, scale=scale, shift=shift)
        return a if keep is None else dropout_keep(a, keep, layers.dropout.p)

    def body(x: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
        return _body(layers, size, x, emb)

    activations = (x,) if emb is None else (x, emb)
    parameters = _common.parameters_of(layers.norm1, layers.conv1, *layers.others, norm)
    recomputed = (norm.weight, norm.bias)
    branch = Branch(tail, activations, parameters, body, hidden, residual, carried=True, recomputed=recomputed)
    return skipped_branch(branch, residual)
