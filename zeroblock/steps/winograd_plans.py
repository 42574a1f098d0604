"""Winograd's ways (`_winograd.py`) as candidates of the planned convolutions, and its packed weights for `freeze`.

Tile 2 competes in float32, tile 4 in half precision and, where the user allowed reduced precision, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import available as _backends
from ..plan.planned import reduced_allowed
from . import packed as _packed
from . import winograd as _winograd
from .conv import CONV, CONV_BWD, unit_geometry
from .norm_conv import NORM_CONV, NORM_CONV_BWD, hidden
from .packed import Geometry


def _padding(geometry: Geometry) -> tuple[int, ...] | None:
    """The padding of a convolution that is plain otherwise, else None."""
    padding = geometry[1]
    return padding if geometry == unit_geometry(list(padding)) else None


def _why_not(P, h: Tensor, weight: Tensor, padding: tuple[int, ...] | None, tile: int) -> str | None:
    if padding is None or not _winograd.usable(P, h, weight, padding):
        return "3x3 convolutions of stride 1 on the CPU only"
    return "half precision takes tile 4" if tile == 2 and _winograd.is_half(h) else None


def _frozen(P, weight: Tensor, geometry: Geometry, tile: int) -> Tensor | None:
    copy = _packed.find(weight)
    return None if copy is None else copy.convs.get((_winograd.plan_name(tile), geometry))


def _packer(tile: int):
    def pack(weight: Tensor, geometry: Geometry) -> Tensor | None:
        """For weights that some map would give to Winograd, tile 4 only with the user's permission. Not in half
        precision, of which a copy would take eight times the memory."""
        if weight.dim() != 4 or weight.dtype != torch.float32 or (tile == 4 and not reduced_allowed()):
            return None
        if min(weight.shape[:2]) < _winograd.FEW_CHANNELS:
            return None
        P, map_ = _backends.select("conv_residual", weight), weight.new_empty(1, weight.shape[1], 4, 4)
        padding = _padding(geometry)
        if padding is None or not _winograd.usable(P, map_, weight, padding):
            return None
        return _winograd.pack(P, weight.detach(), tile)

    return pack


def _register(tile: int) -> None:
    name = _winograd.plan_name(tile)

    def reduced(P, h: Tensor, *args) -> bool:
        return tile == 4 and h.dtype is torch.float32

    def conv(P, h, weight, bias, residual, geometry):
        packed = _frozen(P, weight, geometry, tile)
        return _winograd.conv(P, h, weight, bias, residual, geometry[1], tile=tile, packed=packed)

    def conv_bwd(P, dy, h, weight, has_bias, padding, mask):
        return _winograd.conv_grads(P, dy, h, weight, has_bias, padding, mask, tile=tile)

    def norm_conv(P, x, num_groups, nw, nb, eps, scale, shift, keep, p, weight, bias, residual, geometry):
        if keep is not None:  # a dropout mask comes between norm and convolution
            h, mean, rstd = hidden(P, x, num_groups, nw, nb, eps, scale, shift, keep, p, weight.dtype)
            return conv(P, h, weight, bias, residual, geometry), mean, rstd
        mean, rstd = _winograd.statistics(P, x, num_groups, eps)
        norm = _winograd.Norm(num_groups, mean, rstd, nw, nb, scale, shift)
        packed = _frozen(P, weight, geometry, tile)
        y = _winograd.conv(P, x, weight, bias, residual, geometry[1], tile=tile, norm=norm, packed=packed)
        return y, mean, rstd

    def norm_conv_bwd(
        P, dy, x, mean, rstd, num_groups, nw, nb, eps, scale, shift, keep, p, weight, has_bias, padding, mask
    ):
        norm, h = None, x
        if keep is None:
            norm = _winograd.Norm(num_groups, mean, rstd, nw, nb, scale, shift)
        elif mask[1]:
            h, _, _ = hidden(P, x, num_groups, nw, nb, eps, scale, shift, keep, p, weight.dtype)
        return _winograd.conv_grads(P, dy, h, weight, has_bias, padding, mask, tile=tile, norm=norm)

    CONV.add(name, conv, lambda P, h, w, b, r, g: _why_not(P, h, w, _padding(g), tile), reduced)
    NORM_CONV.add(name, norm_conv, lambda P, x, *a: _why_not(P, x, a[8], _padding(a[11]), tile), reduced)
    CONV_BWD.add(name, conv_bwd, lambda P, dy, h, w, *a: _why_not(P, h, w, tuple(a[1]), tile), reduced)
    NORM_CONV_BWD.add(name, norm_conv_bwd, lambda P, dy, x, *a: _why_not(P, x, a[-4], tuple(a[-2]), tile), reduced)
    _packed.CONV_PACKERS[name] = _packer(tile)


for tile in (2, 4):
    _register(tile)
