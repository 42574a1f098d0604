"""The gradients of the convolutions on a GPU as planned steps: by h, and by weight and bias."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..._layout import alignment
from ...plan.describe import describe_alignment
from ...plan.planned import PlannedOp
from ...steps.conv_bwd import CONV_BWD, ConvGradsCall
from .. import available
from ..base import Backend, MaybeTensor
from .gemms import OWN_GEMMS, UNMEASURED, WGRADS, OwnGemm, library_settings, own_way

_OP = "conv_residual"  # what all of these ask a backend for


class DgradCall(NamedTuple):
    """The gradient of conv(h) by h, of which the shape and layout are used; 0 where the flag is set."""

    backend: Backend
    dy: Tensor
    h: Tensor
    weight: Tensor
    flag: MaybeTensor
    padding: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.h.device

    @property
    def conv(self) -> ConvGradsCall:
        mask = (True, False, False)
        return ConvGradsCall(self.backend, self.dy, self.h, self.weight, False, self.padding, mask)

    def signature(self) -> tuple:
        aligned = alignment(self.dy, self.weight)
        return self.flag is None, self.conv.signature(), library_settings(self.h), aligned

    def describe(self) -> str:
        return f"{self.conv.describe()}, {library_settings(self.h)}{describe_alignment(self.dy, self.weight)}"

    def work(self) -> int:
        return 2 * self.dy.numel() * self.weight[0].numel()

    def own_way(self) -> str:
        _, _, h, weight, _, padding = self
        return own_way(_OP, h.numel() // h.shape[1], weight.transpose(0, 1), h, weight, None, None, padding)


def _library_dgrad(call: DgradCall) -> Tensor:
    dh, _, _ = CONV_BWD(call.conv)
    assert dh is not None
    return dh


def _own_dgrad(gemm: OwnGemm, call: DgradCall) -> Tensor:
    return gemm.backend.own_conv_dgrad(call.dy, call.weight, call.padding, call.flag, gemm.config)


def _why_not_dgrad(gemm: OwnGemm, call: DgradCall) -> str | None:
    return gemm.why_not(_OP, call.h, call.weight, None, None, call.padding)


CONV_DGRAD = PlannedOp(
    "conv_dgrad",
    _library_dgrad,
    signature=DgradCall.signature,
    describe=DgradCall.describe,
    work=DgradCall.work,
)
FLAGGED_DGRAD = PlannedOp(
    "flagged conv_dgrad",
    _library_dgrad,
    signature=DgradCall.signature,
    describe=DgradCall.describe,
    work=DgradCall.work,
    rule=DgradCall.own_way,
    unmeasured=UNMEASURED,
)


class WgradCall(NamedTuple):
    """(dweight, dbias) of conv(h), each only where mask asks."""

    backend: Backend
    dy: Tensor
    h: Tensor
    weight: Tensor
    has_bias: bool
    padding: tuple[int, ...]
    mask: tuple[bool, bool]

    @property
    def device(self) -> torch.device:
        return self.h.device

    @property
    def conv(self) -> ConvGradsCall:
        backend, dy, h, weight, has_bias, padding, mask = self
        return ConvGradsCall(backend, dy, h, weight, has_bias, padding, (False, *mask))

    def signature(self) -> tuple:
        return self.conv.signature(), library_settings(self.h), alignment(self.dy, self.h)

    def describe(self) -> str:
        how = f"bias {self.has_bias}, {library_settings(self.h)}"
        return f"{self.conv.describe()}, {how}{describe_alignment(self.dy, self.h)}"

    def work(self) -> int:
        return 2 * self.dy.numel() * self.weight[0].numel() * bool(self.mask[0])


def _library_wgrad(call: WgradCall) -> tuple[MaybeTensor, MaybeTensor]:
    _, dweight, dbias = CONV_BWD(call.conv)
    return dweight, dbias


def _triton_wgrad(config: str, call: WgradCall) -> tuple[MaybeTensor, MaybeTensor]:
    _, dy, h, weight, has_bias, padding, mask = call
    triton = available.triton()
    assert triton is not None
    dweight = triton.own_conv_wgrad(dy, h, weight, padding, config)
    return dweight, dy.sum((0, 2, 3)) if mask[1] and has_bias else None


def _why_not_wgrad(config: str, call: WgradCall) -> str | None:
    if not call.mask[0]:
        return "the weight needs no gradient"
    if call.weight.dtype == torch.float32:
        return "the kernel is for half precision"
    return OwnGemm("triton", config).why_not(_OP, call.h, call.weight, None, None, call.padding)


CONV_WGRAD = PlannedOp(
    "conv_wgrad",
    _library_wgrad,
    signature=WgradCall.signature,
    describe=WgradCall.describe,
    work=WgradCall.work,
)

for _gemm in OWN_GEMMS:
    for _dgrad in (CONV_DGRAD, FLAGGED_DGRAD):
        _dgrad.add(_gemm.name, partial(_own_dgrad, _gemm), partial(_why_not_dgrad, _gemm))
for _config in WGRADS:
    CONV_WGRAD.add(f"triton {_config}", partial(_triton_wgrad, _config), partial(_why_not_wgrad, _config))
