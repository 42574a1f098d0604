"""Half a ResBlock, residual + conv(dropout(silu(group_norm x))), as planned steps: forward and backward.

The library's way puts the norm's kernel in front of a convolution that plans for itself (`conv.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import Backend, ConvGrads, GroupNorm, MaybeTensor
from ..plan.planned import PlannedOp
from ..reference import dropout_keep
from .conv import CONV, ConvCall, few_products
from .conv_bwd import CONV_BWD, ConvGradsCall
from .packed import Geometry


def normalised(
    backend: Backend, x: Tensor, norm: GroupNorm, dtype: torch.dtype, flag: MaybeTensor = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dropout(silu(norm x)) in `dtype`, mean, rstd); a flag that is set stops the kernel."""
    groups, weight, bias, eps, scale, shift, keep, p = norm
    h, mean, rstd = backend.group_norm_silu(x, groups, weight, bias, eps, scale, shift, True, flag)
    return dropout_keep(h.to(dtype), keep, p), mean, rstd


def norm_grads(
    backend: Backend, dh: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: GroupNorm, flag: MaybeTensor = None
) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    """The gradients of (x, norm weight, norm bias, scale, shift), dh that of `normalised`."""
    dz = dropout_keep(dh, norm.keep, norm.dropout_p).to(x.dtype)
    return backend.group_norm_silu_bwd(
        dz, x, mean, rstd, norm.weight, norm.bias, norm.scale, norm.shift, norm.num_groups, True, flag
    )


def _norm_signature(x: Tensor, norm: GroupNorm, weight: Tensor) -> tuple:
    groups, norm_weight, bias, _, scale, shift, keep, _ = norm
    absent = (norm_weight is None, bias is None, scale is None, shift is None, keep is None)
    return groups, x.dtype, weight.dtype, absent


def describe_norm(norm: GroupNorm) -> str:
    film = ", FiLM" if norm.scale is not None or norm.shift is not None else ""
    dropout = ", dropout" if norm.keep is not None else ""
    return f"{norm.num_groups} groups{film}{dropout}"


class NormConvCall(NamedTuple):
    """residual + conv(normalised x)"""

    backend: Backend
    x: Tensor
    norm: GroupNorm
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    geometry: Geometry

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def conv(self) -> ConvCall:
        """Its convolution, x standing for what the norm gives."""
        backend, x, _, weight, bias, residual, geometry = self
        return ConvCall(backend, x, weight, bias, residual, geometry)

    def signature(self) -> tuple:
        return _norm_signature(self.x, self.norm, self.weight), self.conv.signature()

    def describe(self) -> str:
        return f"{self.conv.describe()}, {describe_norm(self.norm)}"

    def is_tiny(self) -> bool:
        return few_products(self.x, self.weight)

    def work(self) -> int:
        return self.conv.work()


def norm_then_conv(call: NormConvCall) -> tuple[Tensor, Tensor, Tensor]:
    backend, x, norm, weight, bias, residual, geometry = call
    h, mean, rstd = normalised(backend, x, norm, weight.dtype)
    return CONV(ConvCall(backend, h, weight, bias, residual, geometry)), mean, rstd


# (y, mean, rstd)
NORM_CONV = PlannedOp(
    "norm_conv",
    norm_then_conv,
    signature=NormConvCall.signature,
    describe=NormConvCall.describe,
    work=NormConvCall.work,
    tiny=NormConvCall.is_tiny,
)


class NormConvGradsCall(NamedTuple):
    """(dh, dweight, dbias) of conv(h), h = normalised x, each only where mask asks."""

    backend: Backend
    dy: Tensor
    x: Tensor
    mean: Tensor
    rstd: Tensor
    norm: GroupNorm
    weight: Tensor
    has_bias: bool
    padding: tuple[int, ...]
    mask: Sequence[bool]

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def conv(self) -> ConvGradsCall:
        """Its convolution, x standing for h."""
        return ConvGradsCall(self.backend, self.dy, self.x, self.weight, self.has_bias, self.padding, self.mask)

    def signature(self) -> tuple:
        return _norm_signature(self.x, self.norm, self.weight), self.conv.signature()

    def describe(self) -> str:
        return f"{self.conv.describe()}, {describe_norm(self.norm)}"

    def is_tiny(self) -> bool:
        return few_products(self.x, self.weight)

    def work(self) -> int:
        return self.conv.work()


def _recomputed_then_conv_grads(call: NormConvGradsCall) -> ConvGrads:
    h, _, _ = normalised(call.backend, call.x, call.norm, call.weight.dtype)
    return CONV_BWD(ConvGradsCall(call.backend, call.dy, h, call.weight, call.has_bias, call.padding, call.mask))


NORM_CONV_BWD = PlannedOp(
    "norm_conv_bwd",
    _recomputed_then_conv_grads,
    signature=NormConvGradsCall.signature,
    describe=NormConvGradsCall.describe,
    work=NormConvGradsCall.work,
    tiny=NormConvGradsCall.is_tiny,
)
