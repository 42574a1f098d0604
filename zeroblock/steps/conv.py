"""The library's convolutions and the ways around them, as planned steps (`_plan.py`): forward with residual, backward.

Every way gives the result in eager's memory format. Winograd's are in `_winograd_plans.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._layout import add_residual, as_layout, channels_last_format
from ..plan.measure import describe_images, describe_weight
from ..plan.planned import PlannedOp, reduced_allowed
from . import packed as _packed
from . import winograd as _winograd
from .packed import ONEDNN, Geometry

_copies = _packed._copies
_mkldnn_enabled = torch._C._get_mkldnn_enabled
_pointwise: Any = torch.ops.mkldnn._convolution_pointwise.default if ONEDNN else None
_pointwise_binary: Any = torch.ops.mkldnn._convolution_pointwise.binary if ONEDNN else None
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Products per result that oneDNN's channels-last float32 kernels may add up in one chain, as its others do not: longer
# chains have up to four times the error.
_CHAIN = 256
_ADD: tuple = ("add", None, None, [], None)


def unit_geometry(padding: list[int]) -> Geometry:
    """Stride 1, dilation 1, one group."""
    ones = _ONES[len(padding)]
    return ones, tuple(padding), ones, 1


_ONES = tuple((1,) * n for n in range(4))


def _conv(h: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The library's convolution; a 1-D one comes back as a view of a 2-D result, which an op may not return."""
    stride, padding, dilation, groups = geometry
    y = torch.convolution(h, weight, bias, stride, padding, dilation, False, [0] * len(padding), groups)
    return torch.ops.aten._unsafe_view(y, y.shape) if y.dim() == 3 else y


def _library(P, h, weight, bias, residual, geometry):
    return add_residual(residual, _conv(h, weight, bias, geometry))


def _output_layout(h: Tensor, weight: Tensor) -> torch.memory_format | None:
    """Eager's: channels-last where h or the weight is."""
    return channels_last_format(h) or channels_last_format(weight)


# ---- the other layout -----------------------------------------------------------------------------------------------


_LONG_CHAIN = "in float32 the library's kernel of the other layout rounds more than eager's"


def _why_not_swapped(P, h, weight, *_):
    return _why_no_other_layout(h) or (_LONG_CHAIN if _rounds_more(h, weight) else None)


def _why_no_other_layout(h: Tensor) -> str | None:
    if h.dim() not in _CHANNELS_LAST:
        return "one layout only in this number of dimensions"
    return None if h.is_contiguous() or channels_last_format(h) is not None else "h is strided"


def _rounds_more(h: Tensor, weight: Tensor) -> bool:
    """A contiguous float32 h whose results would come from a channels-last kernel, against the user's precision."""
    if h.device.type != "cpu" or h.dtype != torch.float32 or channels_last_format(h) is not None or reduced_allowed():
        return False
    return math.prod(weight.shape[1:]) > _CHAIN and channels_last_format(weight) is None


def _other(h: Tensor) -> torch.memory_format | None:
    return None if channels_last_format(h) is not None else _CHANNELS_LAST[h.dim()]


def _swapped(P, h, weight, bias, residual, geometry):
    other = _other(h)
    y = _conv(as_layout(h, other), as_layout(weight, other), bias, geometry)
    return add_residual(residual, as_layout(y, _output_layout(h, weight)))


# ---- oneDNN's own entry: residual as a post-op, packed weights ------------------------------------------------------


def _fits_post_op(h: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """A residual that oneDNN adds on the way out: of the result's dtype and, like the result, channels-last."""
    if residual is None or residual.dtype != weight.dtype or residual.dim() not in _CHANNELS_LAST:
        return False
    layout = _CHANNELS_LAST[residual.dim()]
    return _output_layout(h, weight) is not None and residual.is_contiguous(memory_format=layout)


def _why_not_post_op(P, h, weight, bias, residual, geometry):
    if not (ONEDNN and _mkldnn_enabled()) or h.device.type != "cpu":
        return "oneDNN is off or does not take this device"
    if h.dtype not in (torch.float32, torch.bfloat16) or (h.dtype is not torch.float32 and not _bf16_supported()):
        return f"oneDNN has no post-ops for {h.dtype} here"
    if channels_last_format(h) is None or not _fits_post_op(h, weight, residual):
        return "needs channels-last h and residual of the result's dtype"
    return None


def _bf16_supported() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _post_op(P, h, weight, bias, residual, geometry):
    stride, padding, dilation, groups = geometry
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its stride
    return _pointwise_binary(h, residual, weight, bias, padding, stride, dilation, groups, *_ADD)


def _why_not_packed(P, h, weight, bias, residual, geometry):
    copy = _packed._current(weight)
    if copy is None or ("onednn", geometry) not in copy.convs:
        return "the weight is not frozen, or not packed"
    if not _mkldnn_enabled():
        return "oneDNN is off"
    if _rounds_more(h, weight):
        return _LONG_CHAIN
    return "h is empty" if h.numel() == 0 else None


def _packed_weight(P, h, weight, bias, residual, geometry):
    copy = _packed.find(weight)
    packed = copy.convs["onednn", geometry]
    stride, padding, dilation, groups = geometry
    bias = None if bias is None else bias.contiguous()
    if _fits_post_op(h, weight, residual):
        return _pointwise_binary(h, residual, packed, bias, padding, stride, dilation, groups, *_ADD)
    y = _pointwise(h, packed, bias, padding, stride, dilation, groups, "none", [], "")
    return add_residual(residual, as_layout(y, _output_layout(h, weight)))


# ---- the steps ------------------------------------------------------------------------------------------------------


def _signature(P, h, weight, bias, residual, geometry):
    return (
        P, h.shape, h.stride(), h.dtype, h.is_cpu or h.device, weight.shape, weight.stride(), bias is None, geometry,
        residual is None or residual.stride(), residual is None or residual.dtype,
        len(_copies) and _packed.is_frozen(weight), _mkldnn_enabled(),
    )  # fmt: skip


def _describe(P, h, weight, bias, residual, geometry):
    parts = [f"{P.NAME}: {describe_images(h)} * {describe_weight(weight)}", f"geometry {geometry}"]
    if bias is not None:
        parts.append("bias")
    if residual is not None:
        parts.append(f"residual {describe_images(residual)}")
    if _packed.is_frozen(weight):
        parts.append("frozen")
    return ", ".join(parts)


def _work(P, h, weight, bias, residual, geometry):
    return 2 * h.numel() // max(1, h.shape[1]) * weight.numel() // math.prod(geometry[0])


def _rule(P, h, weight, bias, residual, geometry):
    """Winograd where its own rule says so. Else, frozen: packed in channels-last, and where the weight outweighs the
    activation, so that copies cost less than the reordering they save. Else the library."""
    stride, padding, dilation, groups = geometry
    if groups == 1 and max(stride) == max(dilation) == 1 and (tile := _winograd.choose(P, h, weight, padding)):
        return _winograd.plan_name(tile)
    if channels_last_format(h) is not None or weight.numel() > h.numel():
        return "packed"
    return "library"


# residual + conv(h) as (P, h, weight, bias, residual, geometry).
CONV = PlannedOp("conv", _library, signature=_signature, describe=_describe, work=_work, lead=1, rule=_rule)
CONV.add("other layout", _swapped, _why_not_swapped)
CONV.add("oneDNN residual", _post_op, _why_not_post_op)
CONV.add("packed", _packed_weight, _why_not_packed)


def conv_grads(dy, h, weight, has_bias, padding, mask):
    """(dh, dweight, dbias) of conv(h), each only where mask asks, by the library."""
    dims = weight.dim() - 2
    ones, zeros = [1] * dims, [0] * dims
    bias_sizes = [weight.shape[0]] if has_bias else None
    mask = [mask[0], mask[1], mask[2] and has_bias]
    if not any(mask):
        return None, None, None
    return torch.ops.aten.convolution_backward.default(
        dy, h, weight, bias_sizes, ones, padding, ones, False, zeros, 1, mask
    )


def _why_not_swapped_grads(P, dy, h, weight, has_bias, padding, mask):
    """In float32 dh rounds more in channels-last, dweight in the other layout."""
    worse = mask[0] if channels_last_format(h) is None else mask[1]
    if worse and h.device.type == "cpu" and h.dtype == torch.float32 and not reduced_allowed():
        return _LONG_CHAIN
    return _why_no_other_layout(h)


def _swapped_grads(P, dy, h, weight, has_bias, padding, mask):
    other, back = _other(h), _output_layout(h, weight)
    dh, dweight, dbias = conv_grads(
        as_layout(dy, other), as_layout(h, other), as_layout(weight, other), has_bias, padding, mask
    )
    return (
        None if dh is None else as_layout(dh, back),
        None if dweight is None else as_layout(dweight, back),
        dbias,
    )


def _rule_grads(P, dy, h, weight, has_bias, padding, mask):
    tile = _winograd.choose(P, h, weight, padding)
    return _winograd.plan_name(tile) if tile else "library"


# (dh, dweight, dbias) as (P, dy, h, weight, has_bias, padding, mask).
CONV_BWD = PlannedOp(
    "conv_bwd",
    lambda P, *args: conv_grads(*args),
    signature=lambda P, dy, h, weight, has_bias, padding, mask: (
        P, dy.stride(), h.shape, h.stride(), h.dtype, h.device, weight.shape, weight.stride(), has_bias, tuple(padding),
        tuple(mask), _mkldnn_enabled(),
    ),
    describe=lambda P, dy, h, weight, has_bias, padding, mask: (
        f"{P.NAME}: {describe_images(dy)}, {describe_images(h)} * {describe_weight(weight)}, padding {tuple(padding)}, "
        f"gradients {''.join('01'[bool(m)] for m in mask)}"
    ),
    work=lambda P, dy, h, weight, has_bias, padding, mask: (
        2 * dy.numel() * weight.numel() // max(1, weight.shape[0]) * (bool(mask[0]) + bool(mask[1]))
    ),
    lead=1,
    rule=_rule_grads,
)  # fmt: skip
CONV_BWD.add("other layout", _swapped_grads, _why_not_swapped_grads)
