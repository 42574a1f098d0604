"""3x3 convolutions by Winograd's minimal filtering (csrc/cpu/winograd): which tile, for which calls, and its ways
among the planned convolutions.

    y = conv(act(norm(x)), weight) + bias + residual        2-D, stride 1, padding 0 or 1, groups 1, on the CPU

Tile 2, F(2x2, 3x3), saves a factor of 2.25 of the products and keeps the error budget (at most twice the library's
error plus one rounding). Tile 4, F(4x4, 3x3), saves a factor of 4; its relative error is 1e-6 to 2e-6 in the L2 norm, 2
to 11 times the library's, and 2e-6 to 7e-6 in the maximum norm, up to 26 times (python -m tests.ops.winograd_errors), a
hundredth of TF32's. So it needs permission: `precision="fast"` or torch.set_float32_matmul_precision("high"). Images
and weights of 16 bits take tile 4: computed in float32 and rounded once, they are as exact as the library's. Results do
not depend on the number of threads. A value that is not finite reaches every output of the tiles that read it, as NaN.

Nothing is remembered between calls but scratch memory, at most 48 MB for the calling thread and two panels of weights
for each worker: the weights are transformed at every call, panel by panel, unless `freeze` packed them beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .._layout import add_residual, as_layout, channels_last_format, in_layout, is_dense
from ..backends.base import Backend, ConvGrads, GroupNorm, WinogradKernels
from ..plan.mode import reduced_allowed
from . import packed
from .conv import CONV, ConvCall, conv_layout, unit_geometry
from .conv_bwd import CONV_BWD, ConvGradsCall
from .norm_conv import NORM_CONV, NORM_CONV_BWD, NormConvCall, NormConvGradsCall, normalised
from .packed import Geometry

# With fewer the transforms outweigh the products (measured: python benchmarks/run.py --group dense).
FEW_CHANNELS = 32
# Of the fixed rule: tiles of a call, and the part of them that the images fill (guess).
_FEW_TILES, _FILLED = 16, 0.7


class NormedInput(NamedTuple):
    """The norm that the convolution applies as it reads x; mean and rstd [N, G] are those of x."""

    norm: GroupNorm
    mean: Tensor
    rstd: Tensor


def is_half(t: Tensor) -> bool:
    return t.dtype is torch.bfloat16 or t.dtype is torch.float16


def tile_for() -> int:
    """The tile for the precision that the user allowed."""
    return 4 if reduced_allowed() else 2


def plan_name(tile: int) -> str:
    """What plans and frozen weights call it."""
    return f"winograd {tile}x{tile}"


def usable(backend: Backend, x: Tensor, weight: Tensor, padding: Sequence[int]) -> bool:
    """Whether `conv` and `conv_grads` can compute this convolution, by metadata alone."""
    return (
        backend.winograd is not None
        and weight.dim() == 4
        and tuple(weight.shape[2:]) == (3, 3)
        and tuple(padding) in ((0, 0), (1, 1))
        and x.dtype == weight.dtype
        and (x.dtype is torch.float32 or is_half(x))
        and x.is_cpu
        and weight.is_cpu
        and x.shape[1] == weight.shape[1]
        and is_dense(weight)
        and weight.numel() > 0
        and x.shape[0] > 0
        and min(x.shape[2:]) + 2 * padding[0] > 2
    )


def worthwhile(batch: int, in_channels: int, out_channels: int, height: int, width: int, tile: int) -> bool:
    """The fixed rule, where nothing was measured; height and width are the output's."""
    tiles = batch * -(-height // tile) * -(-width // tile)
    filled = batch * height * width / (tiles * tile * tile)
    return min(in_channels, out_channels) >= FEW_CHANNELS and tiles >= _FEW_TILES and filled > _FILLED


def choose(backend: Backend, x: Tensor, weight: Tensor, padding: Sequence[int]) -> int:
    """The tile by the fixed rule; 0 where the library's convolution is to be taken. In half precision that is always
    so: how fast processors are there differs by an order of magnitude, which only a measurement shows."""
    if x.dtype != torch.float32 or not usable(backend, x, weight, padding):
        return 0
    height, width = (n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True))
    tile = tile_for()
    return tile if worthwhile(x.shape[0], x.shape[1], weight.shape[0], height, width, tile) else 0


def _kernels(backend: Backend) -> WinogradKernels:
    kernels = backend.winograd
    assert kernels is not None
    return kernels


def pack(backend: Backend, weight: Tensor, tile: int) -> Tensor:
    """The weight transformed for `conv`: 16/9 of its memory for tile 2, 4 times for tile 4."""
    return _kernels(backend).pack(weight, tile, False)


def _affine(kernels: WinogradKernels, x: Tensor, normed: NormedInput | None) -> Tensor | None:
    if normed is None:
        return None
    norm, mean, rstd = normed
    last = channels_last_format(x) is not None
    return kernels.affine(x, mean, rstd, norm.weight, norm.bias, norm.scale, norm.shift, norm.num_groups, last)


# ---- residual + conv(h) ---------------------------------------------------------------------------------------------


def conv(tile: int, call: ConvCall, normed: NormedInput | None = None, prepared: Tensor | None = None) -> Tensor:
    """residual + conv(h), h normalised and activated first where a norm is given. A fresh tensor.

    `prepared` is pack(backend, weight, tile) of this very weight; by default what `freeze` has kept, if anything.
    """
    backend, h, weight, bias, residual, geometry = call
    if prepared is None and packed.copies:
        copy = packed.find(weight)
        prepared = None if copy is None else copy.convs.get((plan_name(tile), geometry))
    kernels, layout, padding = _kernels(backend), conv_layout(h, weight, geometry), geometry.padding
    h, last = as_layout(h, layout), layout is not None
    size = (h.shape[0], weight.shape[0], *(n + 2 * p - 2 for n, p in zip(h.shape[2:], padding, strict=True)))
    fused = (
        residual is not None
        and residual.dtype == h.dtype
        and residual.shape == size
        and residual.is_contiguous(memory_format=layout or torch.contiguous_format)
    )
    added = as_layout(residual, layout) if fused and residual is not None else None
    y = kernels.conv(h, _affine(kernels, h, normed), weight, prepared, bias, added, padding[0], tile, False, last)
    if added is None:
        return add_residual(residual, y)
    return in_layout(y, None) if y.is_contiguous() and last else y  # a sum whose size is that of both formats


def plain_padding(geometry: Geometry) -> tuple[int, ...] | None:
    """The padding of a convolution that is plain otherwise, else None."""
    return geometry.padding if geometry == unit_geometry(geometry.padding) else None


def _why_not(tile: int, backend: Backend, h: Tensor, weight: Tensor, padding: tuple[int, ...] | None) -> str | None:
    if padding is None or not usable(backend, h, weight, padding):
        return "3x3 convolutions of stride 1 on the CPU only"
    return "half precision takes tile 4" if tile == 2 and is_half(h) else None


def _reduced(tile: int, h: Tensor) -> bool:
    return tile == 4 and h.dtype is torch.float32


def _why_not_conv(tile: int, call: ConvCall) -> str | None:
    return _why_not(tile, call.backend, call.h, call.weight, plain_padding(call.geometry))


def _reduced_conv(tile: int, call: ConvCall) -> bool:
    return _reduced(tile, call.h)


def _rule_conv(tile: int, call: ConvCall) -> bool:
    padding = plain_padding(call.geometry)
    return padding is not None and choose(call.backend, call.h, call.weight, padding) == tile


# ---- residual + conv(norm(x)) ---------------------------------------------------------------------------------------


def _norm_conv(tile: int, call: NormConvCall) -> tuple[Tensor, Tensor, Tensor]:
    backend, x, norm = call.backend, call.x, call.norm
    if norm.keep is not None:  # a dropout mask comes between norm and convolution
        h, mean, rstd = normalised(backend, x, norm, call.weight.dtype)
        return conv(tile, call.conv._replace(h=h)), mean, rstd
    layout = channels_last_format(x)
    statistics = _kernels(backend).statistics
    mean, rstd = statistics(as_layout(x, layout), norm.num_groups, norm.eps, layout is not None)
    return conv(tile, call.conv, NormedInput(norm, mean, rstd)), mean, rstd


def _why_not_norm_conv(tile: int, call: NormConvCall) -> str | None:
    return _why_not_conv(tile, call.conv)


def _reduced_norm_conv(tile: int, call: NormConvCall) -> bool:
    return _reduced(tile, call.x)


def _rule_norm_conv(tile: int, call: NormConvCall) -> bool:
    return _rule_conv(tile, call.conv)


# ---- their gradients ------------------------------------------------------------------------------------------------


def conv_grads(tile: int, call: ConvGradsCall, normed: NormedInput | None = None) -> ConvGrads:
    """(dh, dweight, dbias) of conv(h), each only where mask asks; h normalised first where a norm is given; dweight
    laid out as weight."""
    backend, dy, h, weight, has_bias, padding, mask = call
    kernels, layout = _kernels(backend), conv_layout(h, weight, unit_geometry(padding))
    dy, last = as_layout(dy, layout), layout is not None
    dh = dweight = None
    if mask[0]:
        dh = kernels.conv(dy, None, weight, None, None, None, 2 - padding[0], tile, True, last)
    if mask[1]:
        h = as_layout(h, layout)
        dweight = kernels.weight_grad(dy, h, _affine(kernels, h, normed), weight, padding[0], tile, last)
    return dh, dweight, dy.sum((0, 2, 3)) if mask[2] and has_bias else None


def _why_not_grads(tile: int, call: ConvGradsCall) -> str | None:
    return _why_not(tile, call.backend, call.h, call.weight, call.padding)


def _reduced_grads(tile: int, call: ConvGradsCall) -> bool:
    return _reduced(tile, call.h)


def _rule_grads(tile: int, call: ConvGradsCall) -> bool:
    return choose(call.backend, call.h, call.weight, call.padding) == tile


def _norm_conv_grads(tile: int, call: NormConvGradsCall) -> ConvGrads:
    if call.norm.keep is None:
        return conv_grads(tile, call.conv, NormedInput(call.norm, call.mean, call.rstd))
    h = call.x
    if call.mask[1]:
        h, _, _ = normalised(call.backend, call.x, call.norm, call.weight.dtype)
    return conv_grads(tile, call.conv._replace(h=h))


def _why_not_norm_grads(tile: int, call: NormConvGradsCall) -> str | None:
    return _why_not_grads(tile, call.conv)


def _reduced_norm_grads(tile: int, call: NormConvGradsCall) -> bool:
    return _reduced(tile, call.x)


def _rule_norm_grads(tile: int, call: NormConvGradsCall) -> bool:
    return _rule_grads(tile, call.conv)


# ---- frozen weights -------------------------------------------------------------------------------------------------


def _prepare(tile: int, backend: Backend, weight: Tensor, geometry: Geometry) -> Tensor | None:
    """For weights that some image would give to Winograd, tile 4 only with the user's permission. Not in half
    precision, of which a copy would take eight times the memory."""
    if weight.dim() != 4 or weight.dtype != torch.float32 or (tile == 4 and not reduced_allowed()):
        return None
    image, padding = weight.new_empty(1, weight.shape[1], 4, 4), plain_padding(geometry)
    if min(weight.shape[:2]) < FEW_CHANNELS or padding is None or not usable(backend, image, weight, padding):
        return None
    return pack(backend, weight.detach(), tile)


for tile in (2, 4):
    name = plan_name(tile)
    CONV.add(
        name,
        partial(conv, tile),
        partial(_why_not_conv, tile),
        reduced=partial(_reduced_conv, tile),
        rule=partial(_rule_conv, tile),
    )
    NORM_CONV.add(
        name,
        partial(_norm_conv, tile),
        partial(_why_not_norm_conv, tile),
        reduced=partial(_reduced_norm_conv, tile),
        rule=partial(_rule_norm_conv, tile),
    )
    CONV_BWD.add(
        name,
        partial(conv_grads, tile),
        partial(_why_not_grads, tile),
        reduced=partial(_reduced_grads, tile),
        rule=partial(_rule_grads, tile),
    )
    NORM_CONV_BWD.add(
        name,
        partial(_norm_conv_grads, tile),
        partial(_why_not_norm_grads, tile),
        reduced=partial(_reduced_norm_grads, tile),
        rule=partial(_rule_norm_grads, tile),
    )
    packed.CONV_PACKERS[name] = partial(_prepare, tile)
