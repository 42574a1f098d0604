"""conv_residual: residual + conv(h), stride 1; without the convolution while its weight is exactly zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .. import reference as ref
from .._padding import is_padded
from ..backends.base import Backend, ConvGrads, MaybeTensor
from ..backends.select import select
from ..steps import padded
from ..steps.conv import conv_layout, empty_conv_output, unit_geometry
from ..steps.conv_bwd import conv_grads
from ..steps.flag import ZERO_WEIGHT, flag_of, found_by_host, skipped
from . import shapes
from .register import Grads, Op, filled, through
from .residual_alone import residual_alone, weight_is_zero

FORWARD = Op(
    "conv_residual(Tensor h, Tensor weight, Tensor? bias, Tensor? residual, int[] padding, int zero_skip) "
    "-> (Tensor, Tensor)",
    residual=3,
)
BACKWARD = Op(
    "conv_residual_bwd(Tensor dy, Tensor h, Tensor weight, Tensor skipped, int zero_skip, int[] padding, "
    "bool has_bias, bool[] mask) -> (Tensor, Tensor, Tensor)",
    device_arg=1,
)


def conv_residual_alone(
    h: Tensor, weight: Tensor, bias: MaybeTensor, residual: MaybeTensor, padding: Sequence[int]
) -> Tensor:
    """The result while the weight is zero; of h the shape and layout are used."""

    def empty() -> Tensor:
        if is_padded(padding, weight):
            return padded.empty_output(h, weight, padding, weight.dtype)
        return empty_conv_output(h, weight, unit_geometry(padding), weight.dtype)

    return residual_alone(residual, bias, None, 1, weight.dtype, empty)


@FORWARD.forward
def conv_residual(
    h: Tensor,
    weight: Tensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    padding: Sequence[int],
    zero_skip: int,
    *,
    direct: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, skipped)"""
    if not direct and (route := FORWARD.route(h, weight, bias, residual)):
        return route(h, weight, bias, residual, padding, zero_skip)
    if weight_is_zero("conv_residual", zero_skip, weight):
        return conv_residual_alone(h, weight, bias, residual, padding), skipped(h, ZERO_WEIGHT)
    backend = select("conv_residual", h)
    if is_padded(padding, weight):
        return padded.conv_residual(backend, h, weight, bias, residual, padding)
    return backend.conv_residual(h, weight, bias, residual, tuple(padding), zero_skip)


@FORWARD.fake
def _fake(
    h: Tensor, weight: Tensor, bias: MaybeTensor, residual: MaybeTensor, padding: Sequence[int], zero_skip: int
) -> tuple[Tensor, Tensor]:
    op = "conv_residual"
    _checks.floating(op, 2, h=h, weight=weight, bias=bias, residual=residual)
    _checks.taken_convolution(op, h, weight, bias, residual, padding)
    _checks.same_dtype(op, h=h, weight=weight, bias=bias)
    return shapes.add(residual, shapes.conv(h, weight, bias, padding)), shapes.flag(h)


@BACKWARD.forward
def conv_residual_bwd(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    skipped: Tensor,
    zero_skip: int,
    padding: Sequence[int],
    has_bias: bool,
    mask: Sequence[bool],
    *,
    direct: bool = False,
) -> ConvGrads:
    """The gradients of (h, weight, bias), each only where mask asks."""
    if not direct and (route := BACKWARD.route(dy, h, weight, skipped)):
        return route(dy, h, weight, skipped, zero_skip, padding, has_bias, mask)
    dy = dy.to(weight.dtype)
    backend = select("conv_residual_bwd", h)
    if found_by_host(skipped, zero_skip):
        _, dweight, dbias = library_grads(backend, dy, h, weight, has_bias, padding, mask[1:])  # eager's, exactly
        dh = None
        if mask[0]:
            known = padded.layout_of if is_padded(padding, weight) else _layout_of
            dh = torch.zeros_like(h, memory_format=known(h, weight, padding) or torch.contiguous_format)
        return dh, dweight, dbias
    if is_padded(padding, weight):
        return padded.conv_grads(backend, dy, h, weight, has_bias, padding, mask)
    return backend.conv_grads(dy, h, weight, flag_of(skipped, zero_skip), has_bias, tuple(padding), mask)


def _layout_of(h: Tensor, weight: Tensor, padding: Sequence[int]) -> torch.memory_format | None:
    return conv_layout(h, weight, unit_geometry(padding))


def library_grads(
    backend: Backend,
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    has_bias: bool,
    padding: Sequence[int],
    mask: Sequence[bool],
) -> ConvGrads:
    """The gradients of (weight, bias) alone, of a branch that is skipped."""
    mask = (False, *mask)
    if is_padded(padding, weight):
        return padded.conv_grads(backend, dy, h, weight, has_bias, padding, mask)
    return conv_grads(dy, h, weight, has_bias, padding, mask)


@BACKWARD.fake
def _fake_bwd(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    skipped: Tensor,
    zero_skip: int,
    padding: Sequence[int],
    has_bias: bool,
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    return filled(shapes.conv_grads(dy.to(weight.dtype), h, weight, has_bias, padding, mask), dy)


def _reference(
    h: Tensor, weight: Tensor, bias: MaybeTensor, residual: MaybeTensor, padding: Sequence[int], zero_skip: int
) -> Tensor:
    return ref.conv_residual(h, weight, bias, None, padding=padding)


@FORWARD.backward(through(_reference))
def _backward(inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor, skipped: Tensor) -> Grads:
    h, weight, bias, _, padding, zero_skip = inputs
    grads: ConvGrads = (None, None, None)
    if any(needed[:3]):
        grads = conv_residual_bwd(dy, h, weight, skipped, zero_skip, padding, bias is not None, needed[:3])
    return *grads, None, None, None
