"""The gradients of a stride-1 convolution as a planned step. Winograd's ways are in `winograd.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._layout import as_layout, channels_last_format, in_layout
from ..backends.base import Backend, ConvGrads
from ..plan.describe import describe_images, describe_weight
from ..plan.mode import reduced_allowed
from ..plan.planned import PlannedOp
from .conv import LONG_CHAIN, conv_layout, few_products, other_layout, unit_geometry, why_no_other_layout


class ConvGradsCall(NamedTuple):
    """(dh, dweight, dbias) of conv(h), stride 1, each only where mask asks."""

    backend: Backend
    dy: Tensor
    h: Tensor
    weight: Tensor
    has_bias: bool
    padding: tuple[int, ...]
    mask: Sequence[bool]

    @property
    def device(self) -> torch.device:
        return self.h.device

    def signature(self) -> tuple:
        backend, dy, h, weight, has_bias, padding, mask = self
        return (
            backend,
            dy.stride(),
            h.shape,
            h.stride(),
            h.dtype,
            h.device,
            weight.shape,
            weight.stride(),
            has_bias,
            padding,
            tuple(mask),
            torch._C._get_mkldnn_enabled(),
        )

    def describe(self) -> str:
        backend, dy, h, weight, _, padding, mask = self
        wanted = "".join("01"[bool(m)] for m in mask)
        images = f"{describe_images(dy)}, {describe_images(h)} * {describe_weight(weight)}"
        return f"{backend.name}: {images}, padding {padding}, gradients {wanted}"

    def is_tiny(self) -> bool:
        return few_products(self.h, self.weight)

    def work(self) -> int:
        dy, weight, mask = self.dy, self.weight, self.mask
        return 2 * dy.numel() * weight.numel() // max(1, weight.shape[0]) * (bool(mask[0]) + bool(mask[1]))


def conv_grads(
    dy: Tensor, h: Tensor, weight: Tensor, has_bias: bool, padding: Sequence[int], mask: Sequence[bool]
) -> ConvGrads:
    """(dh, dweight, dbias) of conv(h), stride 1, each only where mask asks, by the library."""
    dims = weight.dim() - 2
    ones, zeros = [1] * dims, [0] * dims
    bias_sizes = [weight.shape[0]] if has_bias else None
    mask = [mask[0], mask[1], mask[2] and has_bias]
    if not any(mask):
        return None, None, None
    return torch.ops.aten.convolution_backward.default(
        dy, h, weight, bias_sizes, ones, padding, ones, False, zeros, 1, mask
    )


def _library_grads(call: ConvGradsCall) -> ConvGrads:
    return conv_grads(*call[1:])


def _why_not_swapped_grads(call: ConvGradsCall) -> str | None:
    """In float32 dh rounds more in channels-last, dweight in the other layout."""
    h, mask = call.h, call.mask
    worse = mask[0] if channels_last_format(h) is None else mask[1]
    if worse and h.is_cpu and h.dtype == torch.float32 and not reduced_allowed():
        return LONG_CHAIN
    return why_no_other_layout(h)


def _swapped_grads(call: ConvGradsCall) -> ConvGrads:
    _, dy, h, weight, has_bias, padding, mask = call
    other, back = other_layout(h), conv_layout(h, weight, unit_geometry(padding))
    dh, dweight, dbias = conv_grads(
        as_layout(dy, other), as_layout(h, other), as_layout(weight, other), has_bias, padding, mask
    )
    dh = None if dh is None else in_layout(dh, back)
    return dh, None if dweight is None else in_layout(dweight, back), dbias


CONV_BWD = PlannedOp(
    "conv_bwd",
    _library_grads,
    signature=ConvGradsCall.signature,
    describe=ConvGradsCall.describe,
    work=ConvGradsCall.work,
    tiny=ConvGradsCall.is_tiny,
)
CONV_BWD.add("other layout", _swapped_grads, _why_not_swapped_grads)
