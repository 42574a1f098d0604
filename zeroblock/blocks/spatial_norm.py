"""SiLU of a group norm whose scale and shift are convolutions of latents stretched to its size (MoVQ's SpatialNorm):

    y = silu(group_norm(f) * conv_y(z') + conv_b(z')),   z' = z, stretched to f's size by nearest neighbours

A convolution of one tap and nearest neighbours commute: the latents are convolved as they are, with a fraction of the
products (CogVideoX's decoder: up to 256 times fewer). Where they are stretched by powers of two, what comes out is
stretched along the last dimension alone and broadcast along the others, so that a scale and a shift of f's size are
neither written nor read. Of n bytes of f 7 n pass: the norm 3, the product and the sum 2, SiLU 2; eager moves 13 n. A
kernel of the norm that takes operands of f's size would move 3 n, and 4 n more to have them written and to read them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import functional, zero
from .._autocast import is_autocast
from .._layout import as_layout, channels_last_format

Pieces = list[tuple[slice, slice]]  # of f and of z, along the first dimension of space
WHOLE: Pieces = [(slice(None), slice(None))]


def first_frame_apart(f: Tensor) -> Pieces:
    """CogVideoX's: the first of an odd number of frames has latents of its own."""
    odd = f.shape[2] > 1 and f.shape[2] % 2 == 1
    return [(slice(0, 1), slice(0, 1)), (slice(1, None), slice(1, None))] if odd else WHOLE


def stretched(z: Tensor, f: Tensor, pieces: Pieces = WHOLE) -> Tensor:
    """z in f's size, as eager has it."""
    parts = [F.interpolate(z[:, :, of_z], size=f[:, :, of_f].shape[2:]) for of_f, of_z in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def spatial_norm_silu(
    f: Tensor,
    norm: Any,
    z: Tensor,
    conv_y: Callable[[Tensor], Tensor],
    conv_b: Callable[[Tensor], Tensor],
    pieces: Pieces = WHOLE,
) -> Tensor:
    """norm: has num_groups, weight, bias and eps. conv_y, conv_b: of one tap. z: [N, Cz, *s], stretched in `pieces`."""
    f = f.float() if is_autocast(f.device) else f  # as eager's norm has it
    h = functional.group_norm_silu(f, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=None)
    y, b = conv_y(z), conv_b(z)
    dtype, last = torch.promote_types(h.dtype, y.dtype), channels_last_format(h)
    h, y, b = h.to(dtype), as_layout(y.to(dtype), last), as_layout(b.to(dtype), last)
    if torch.is_grad_enabled() or is_compiling() or zero.transforms_active():
        parts = [_modulated(h[:, :, of_f], y[:, :, of_z], b[:, :, of_z]) for of_f, of_z in pieces]
        return F.silu(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
    for of_f, of_z in pieces:  # nobody else has h
        _modulated(h[:, :, of_f], y[:, :, of_z], b[:, :, of_z], in_place=True)
    return F.silu(h, inplace=True)


def _modulated(h: Tensor, y: Tensor, b: Tensor, in_place: bool = False) -> Tensor:
    """h * y + b, y and b stretched to the size of h."""
    size, small = h.shape[2:], y.shape[2:]
    if small != size:
        broadcast = all(map(_is_power_of_2_times, size, small))
        to = (*small[:-1], size[-1]) if broadcast else size
        y, b = (t if t.shape[2:] == to else F.interpolate(t, size=to) for t in (y, b))
        for i in reversed(range(len(to) - 1 if broadcast else 0)):
            h, y, b = h.unflatten(2 + i, (small[i], -1)), y.unsqueeze(3 + i), b.unsqueeze(3 + i)
    if in_place:
        return torch.addcmul(b, h, y, out=h)
    return torch.addcmul(b, h, y).reshape(h.shape[0], h.shape[1], *size)


def _is_power_of_2_times(n: int, m: int) -> bool:
    """Whether n / m is one: its nearest neighbours are found without rounding."""
    times = n // m
    return n == m * times and times & (times - 1) == 0
