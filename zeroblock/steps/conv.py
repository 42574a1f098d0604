"""residual + conv(h) as a planned step: the library's convolution and the ways around it.

Every way gives the result in eager's memory format. Gradients: `conv_bwd.py`; Winograd's ways: `winograd.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._layout import CHANNELS_LAST, add_residual, as_layout, channels_last_format, in_layout, is_settled
from ..backends.base import Backend
from ..plan.describe import describe_images, describe_weight
from ..plan.mode import reduced_allowed
from ..plan.planned import PlannedOp
from . import packed
from .packed import ONEDNN, Geometry

_copies = packed.copies
_mkldnn_enabled = torch._C._get_mkldnn_enabled
_pointwise: Any = torch.ops.mkldnn._convolution_pointwise.default if ONEDNN else None
_pointwise_binary: Any = torch.ops.mkldnn._convolution_pointwise.binary if ONEDNN else None
# Products per result that oneDNN's channels-last float32 kernels may add up in one chain, as its others do not: longer
# chains have up to four times the error (tests/plan/test_ways.py).
_CHAIN = 256
# Products below which no rule takes another way than the library's, frozen weights aside.
FEW_PRODUCTS = 1 << 18
_ADD: tuple = ("add", None, None, [], None)
_ONES = tuple((1,) * n for n in range(4))


def unit_geometry(padding: Sequence[int]) -> Geometry:
    """Stride 1, dilation 1, one group."""
    ones = _ONES[len(padding)]
    return Geometry(ones, tuple(padding), ones, 1)


class ConvCall(NamedTuple):
    """residual + conv(h): h [N, Cin, *S], weight [Cout, Cin / groups, *K], residual [N, Cout, *S']."""

    backend: Backend
    h: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    geometry: Geometry

    @property
    def device(self) -> torch.device:
        return self.h.device

    def signature(self) -> tuple:
        backend, h, weight, bias, residual, geometry = self
        return (
            backend,
            h.shape,
            h.stride(),
            h.dtype,
            h.is_cpu or h.device,
            weight.shape,
            weight.stride(),
            bias is None,
            geometry,
            residual is None or residual.stride(),
            residual is None or residual.dtype,
            len(_copies) and packed.is_frozen(weight),
            _mkldnn_enabled(),
        )

    def describe(self) -> str:
        backend, h, weight, bias, residual, geometry = self
        parts = [f"{backend.name}: {describe_images(h)} * {describe_weight(weight)}", f"geometry {tuple(geometry)}"]
        if bias is not None:
            parts.append("bias")
        if residual is not None:
            parts.append(f"residual {describe_images(residual)}")
        if packed.is_frozen(weight):
            parts.append("frozen")
        return ", ".join(parts)

    def is_tiny(self) -> bool:
        return few_products(self.h, self.weight)

    def work(self) -> int:
        strides = math.prod(self.geometry.stride)
        return 2 * self.h.numel() // max(1, self.h.shape[1]) * self.weight.numel() // strides


def few_products(h: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of h is so small that the library's way is taken by every rule."""
    return h.numel() * weight.numel() <= FEW_PRODUCTS * h.size(1) and not (_copies and packed.is_frozen(weight))


def conv_size(
    batch_and_spatial: Sequence[int],
    weight: Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """The shape of a convolution's output; the input's channels do not matter."""
    batch, *inner = batch_and_spatial
    spatial = zip(inner, weight.shape[2:], padding, stride, dilation, strict=True)
    return batch, weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in spatial)


def unit_conv_size(h: Tensor, weight: Tensor, padding: Sequence[int]) -> tuple[int, ...]:
    """`conv_size` for stride 1 and dilation 1."""
    ones = _ONES[len(padding)]
    return conv_size((h.shape[0], *h.shape[2:]), weight, padding, ones, ones)


def conv_layout(h: Tensor, weight: Tensor, geometry: Geometry) -> torch.memory_format | None:
    """That of conv(h), as eager chooses it: channels-last where h or the weight is. In three dimensions only oneDNN's
    and cuDNN's kernels are, and torch is asked whose this call gets."""
    layout = channels_last_format(h) or channels_last_format(weight)
    if layout is not torch.channels_last_3d or torch.compiler.is_compiling():
        return layout
    if h.dtype != weight.dtype:  # h stands for something in the weight's
        h = torch.empty_strided(h.shape, h.stride(), dtype=weight.dtype, device=h.device)
    stride, padding, dilation, groups = geometry
    arguments = None, stride, padding, dilation, False, (0,) * len(padding), groups, None
    chosen = torch._C._select_conv_backend(h, weight, *arguments)
    found = torch._C._conv_determine_backend_memory_format(h, weight, chosen)
    return layout if found is layout else None


def empty_conv_output(
    h: Tensor, weight: Tensor, geometry: Geometry, dtype: torch.dtype, size: tuple[int, ...] | None = None
) -> Tensor:
    """An uninitialised tensor like conv(h), of another size where one is given."""
    if size is None:
        stride, padding, dilation, _ = geometry
        size = conv_size((h.shape[0], *h.shape[2:]), weight, padding, stride, dilation)
    layout = conv_layout(h, weight, geometry) or torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=h.device, memory_format=layout)


# ---- the library's way ----------------------------------------------------------------------------------------------


def _conv(h: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The library's convolution; a 1-D one comes back as a view of a 2-D result, which an op may not return."""
    stride, padding, dilation, groups = geometry
    y = torch.convolution(h, weight, bias, stride, padding, dilation, False, [0] * len(padding), groups)
    return torch.ops.aten._unsafe_view(y, y.shape) if y.dim() == 3 else y


def library_conv(call: ConvCall) -> Tensor:
    return add_residual(call.residual, _conv(call.h, call.weight, call.bias, call.geometry))


# ---- the other layout -----------------------------------------------------------------------------------------------


LONG_CHAIN = "in float32 the library's kernel of the other layout rounds more than eager's"


def _why_not_swapped(call: ConvCall) -> str | None:
    return why_no_other_layout(call.h) or (LONG_CHAIN if _rounds_more(call.h, call.weight) else None)


def why_no_other_layout(h: Tensor) -> str | None:
    if h.dim() not in CHANNELS_LAST:
        return "one layout only in this number of dimensions"
    return None if h.is_contiguous() or channels_last_format(h) is not None else "h is strided"


def _rounds_more(h: Tensor, weight: Tensor) -> bool:
    """A contiguous float32 h whose results would come from a channels-last kernel, against the user's precision."""
    if not h.is_cpu or h.dtype != torch.float32 or channels_last_format(h) is not None or reduced_allowed():
        return False
    return math.prod(weight.shape[1:]) > _CHAIN and channels_last_format(weight) is None


def other_layout(h: Tensor) -> torch.memory_format | None:
    return None if channels_last_format(h) is not None else CHANNELS_LAST[h.dim()]


def _swapped(call: ConvCall) -> Tensor:
    _, h, weight, bias, residual, geometry = call
    other = other_layout(h)
    y = _conv(as_layout(h, other), as_layout(weight, other), bias, geometry)
    return add_residual(residual, in_layout(y, conv_layout(h, weight, geometry)))


# ---- oneDNN's own entry: residual as a post-op, packed weights ------------------------------------------------------


def _fits_post_op(h: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """A residual that oneDNN adds on the way out: of the result's dtype and, like the result, channels-last."""
    if residual is None or residual.dtype != weight.dtype or residual.dim() not in CHANNELS_LAST:
        return False
    channels_last = (channels_last_format(h) or channels_last_format(weight)) is not None
    return channels_last and not residual.is_contiguous() and is_settled(residual)


def _why_not_post_op(call: ConvCall) -> str | None:
    h = call.h
    if not (ONEDNN and _mkldnn_enabled()) or not h.is_cpu:
        return "oneDNN is off or does not take this device"
    if h.dtype not in (torch.float32, torch.bfloat16) or (h.dtype is not torch.float32 and not _bf16_supported()):
        return f"oneDNN has no post-ops for {h.dtype} here"
    if channels_last_format(h) is None or not _fits_post_op(h, call.weight, call.residual):
        return "needs channels-last h and residual of the result's dtype"
    return None


def _bf16_supported() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _post_op(call: ConvCall) -> Tensor:
    stride, padding, dilation, groups = call.geometry
    bias = None if call.bias is None else call.bias.contiguous()  # oneDNN ignores its stride
    return _pointwise_binary(call.h, call.residual, call.weight, bias, padding, stride, dilation, groups, *_ADD)


def _why_not_packed(call: ConvCall) -> str | None:
    copy = packed.current(call.weight)
    if copy is None or ("onednn", call.geometry) not in copy.convs:
        return "the weight is not frozen, or not packed"
    if not _mkldnn_enabled():
        return "oneDNN is off"
    if _rounds_more(call.h, call.weight):
        return LONG_CHAIN
    return "h is empty" if call.h.numel() == 0 else None


def _with_packed_weight(call: ConvCall) -> Tensor:
    _, h, weight, bias, residual, geometry = call
    copy = packed.find(weight)
    prepared = None if copy is None else copy.convs.get(("onednn", geometry))
    if prepared is None:  # another thread has unfrozen the weight
        return library_conv(call)
    stride, padding, dilation, groups = geometry
    bias = None if bias is None else bias.contiguous()
    if _fits_post_op(h, weight, residual):
        return _pointwise_binary(h, residual, prepared, bias, padding, stride, dilation, groups, *_ADD)
    y = _pointwise(h, prepared, bias, padding, stride, dilation, groups, "none", [], "")
    return add_residual(residual, in_layout(y, conv_layout(h, weight, geometry)))


def _rule(call: ConvCall) -> str:
    """Frozen weights: packed in channels-last, and where the weight outweighs the activation, so that copies cost less
    than the reordering they save. Else the library."""
    if channels_last_format(call.h) is not None or call.weight.numel() > call.h.numel():
        return "packed"
    return "library"


CONV = PlannedOp(
    "conv",
    library_conv,
    signature=ConvCall.signature,
    describe=ConvCall.describe,
    work=ConvCall.work,
    rule=_rule,
    tiny=ConvCall.is_tiny,
)
CONV.add("other layout", _swapped, _why_not_swapped)
CONV.add("oneDNN residual", _post_op, _why_not_post_op)
CONV.add("packed", _with_packed_weight, _why_not_packed)
