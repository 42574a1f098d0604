"""Convolutions of the ops on a GPU as planned steps: the library's, Triton's implicit GEMM in its configurations, and
the CUDA tensor-core convolution, which applies the norm in its prologue. Gradients: `conv_grads.py`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..._layout import alignment, as_layout, channels_last_format, is_settled
from ...plan.describe import describe_alignment, dtype_name
from ...plan.planned import PlannedOp
from ...steps.conv import CONV, ConvCall, conv_layout, unit_conv_size, unit_geometry
from ...steps.flag import DEVICE, NEVER, executed
from ...steps.norm_conv import describe_norm, normalised
from .. import available
from ..base import Backend, GroupNorm, MaybeTensor
from .gemms import FOLDS, OWN_GEMMS, UNMEASURED, OwnGemm, library_settings, own_way
from .hinted import HintedStep

_OP = "conv_residual"  # what all of these ask a backend for
ONE_PASS = "library in one pass"


class FlaggedConvCall(NamedTuple):
    """(residual + conv(h), skipped), stride 1."""

    backend: Backend
    h: Tensor
    weight: Tensor
    bias: MaybeTensor
    residual: MaybeTensor
    padding: tuple[int, ...]
    zero_skip: int

    @property
    def device(self) -> torch.device:
        return self.h.device

    @property
    def conv(self) -> ConvCall:
        backend, h, weight, bias, residual, padding, _ = self
        return ConvCall(backend, h, weight, bias, residual, unit_geometry(padding))

    def signature(self) -> tuple:
        aligned = alignment(self.h, self.weight, self.bias, self.residual)
        return self.conv.signature(), self.zero_skip, library_settings(self.h), aligned

    def describe(self) -> str:
        settings = f"settings {library_settings(self.h)}"
        aligned = describe_alignment(self.h, self.weight, self.bias, self.residual)
        return f"{self.conv.describe()}, {settings}{aligned}"

    def work(self) -> int:
        return self.conv.work()

    def own_way(self) -> str:
        _, h, weight, _, residual, padding, _ = self
        pixels = torch.Size(unit_conv_size(h, weight, padding)).numel() // weight.shape[0]
        return own_way(_OP, pixels, weight, h, weight, None, residual, padding)

    def library_way(self) -> str:
        return ONE_PASS if self.why_not_one_pass() is None else "library"

    def why_not_one_pass(self) -> str | None:
        _, h, weight, bias, residual, padding, _ = self
        if bias is None or residual is None:
            return "a bias or a residual alone takes one pass as it is"
        reason = available.why_not("triton", "add_bias", h)
        if reason is not None:
            return reason
        size = unit_conv_size(h, weight, padding)
        layout = conv_layout(h, weight, unit_geometry(padding)) or torch.contiguous_format
        fits = residual.dtype == weight.dtype and residual.shape == size and h.dim() > 3
        fits = fits and is_settled(residual) and residual.is_contiguous(memory_format=layout)
        return None if fits else "the residual is not in the dtype and layout of the result"

    def tested(self) -> list[Tensor]:
        return [self.weight]

    def unflagged(self) -> FlaggedConvCall:
        return FlaggedConvCall(*self[:-1], NEVER)

    def flag(self) -> MaybeTensor:
        """Of the weight, where the call asks for one."""
        return self.backend.zero_flag([self.weight]) if self.zero_skip == DEVICE else None

    def why_not(self, gemm: OwnGemm) -> str | None:
        return gemm.why_not(_OP, self.h, self.weight, None, self.residual, self.padding)


def _library_conv(call: FlaggedConvCall) -> tuple[Tensor, Tensor]:
    return CONV(call.conv), executed(call.h)


def _one_pass(call: FlaggedConvCall) -> tuple[Tensor, Tensor]:
    """The library's convolution, then bias and residual in one pass, where torch takes two."""
    _, h, weight, bias, residual, padding, _ = call
    y, triton = CONV(call.conv._replace(bias=None, residual=None)), available.triton()
    assert triton is not None and residual is not None
    if y.stride() != residual.stride():  # the library has chosen another layout than was foreseen
        y = as_layout(y, channels_last_format(residual))
    return triton.add_bias(y, bias, 1, residual), executed(h)


def _own_conv(gemm: OwnGemm, call: FlaggedConvCall) -> tuple[Tensor, Tensor]:
    _, h, weight, bias, residual, padding, _ = call
    flag = call.flag()
    y = gemm.backend.own_conv(h, weight, bias, residual, padding, flag, gemm.config)
    return y, executed(h) if flag is None else flag


def _why_not_conv(gemm: OwnGemm, call: FlaggedConvCall) -> str | None:
    return call.why_not(gemm)


CONV_RESIDUAL = PlannedOp(
    "conv_residual",
    _library_conv,
    signature=FlaggedConvCall.signature,
    describe=FlaggedConvCall.describe,
    work=FlaggedConvCall.work,
    rule=FlaggedConvCall.library_way,
)
CONV_RESIDUAL.add(ONE_PASS, _one_pass, FlaggedConvCall.why_not_one_pass)
FLAGGED_CONV = PlannedOp(
    "flagged conv_residual",
    _library_conv,
    signature=FlaggedConvCall.signature,
    describe=FlaggedConvCall.describe,
    work=FlaggedConvCall.work,
    rule=FlaggedConvCall.own_way,
    unmeasured=UNMEASURED,
)
HINTED_CONV = HintedStep(CONV_RESIDUAL, FLAGGED_CONV)


# ---- half a ResBlock ------------------------------------------------------------------------------------------------


class FlaggedNormConvCall(NamedTuple):
    """(residual + conv(normalised x), mean, rstd, skipped)."""

    backend: Backend
    x: Tensor
    norm: GroupNorm
    weight: Tensor
    bias: MaybeTensor
    residual: MaybeTensor
    padding: tuple[int, ...]
    zero_skip: int

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def conv(self) -> FlaggedConvCall:
        """Its convolution, x standing for what the norm gives."""
        backend, x, _, weight, bias, residual, padding, zero_skip = self
        return FlaggedConvCall(backend, x, weight, bias, residual, padding, zero_skip)

    def signature(self) -> tuple:
        groups, weight, bias, _, scale, shift, keep, _ = self.norm
        operands = (weight, bias, scale, shift, keep)
        forms = tuple([t if t is None else (t.stride(), t.dtype) for t in operands])
        aligned = alignment(*operands)
        return groups, forms, self.weight.dtype, self.conv.signature(), aligned

    def describe(self) -> str:
        return f"{self.conv.describe()}, weight {dtype_name(self.weight)}, {describe_norm(self.norm)}"

    def work(self) -> int:
        return self.conv.work()

    def library_way(self) -> str:
        return self.conv.library_way()

    def why_not_one_pass(self) -> str | None:
        return self.conv.why_not_one_pass()

    def own_way(self) -> str:
        return self.conv.own_way()

    def tested(self) -> list[Tensor]:
        return [self.weight]

    def unflagged(self) -> FlaggedNormConvCall:
        return FlaggedNormConvCall(*self[:-1], NEVER)

    def flag(self) -> MaybeTensor:
        return self.conv.flag()

    def result(self, y: Tensor, mean: Tensor, rstd: Tensor, flag: MaybeTensor) -> NormConvResult:
        return y, mean, rstd, executed(self.x) if flag is None else flag


NormConvResult = tuple[Tensor, Tensor, Tensor, Tensor]


def _library_norm_conv(call: FlaggedNormConvCall) -> NormConvResult:
    h, mean, rstd = normalised(call.backend, call.x, call.norm, call.weight.dtype)
    return CONV(call.conv.conv._replace(h=h)), mean, rstd, executed(call.x)


def _norm_one_pass(call: FlaggedNormConvCall) -> NormConvResult:
    h, mean, rstd = normalised(call.backend, call.x, call.norm, call.weight.dtype)
    y, reported = _one_pass(call.conv._replace(h=h))
    return y, mean, rstd, reported


def _own_norm_conv(gemm: OwnGemm, call: FlaggedNormConvCall) -> NormConvResult:
    """The norm as planned, then the own convolution: both read the flag, or their results are not used."""
    backend, x, norm, weight, bias, residual, padding, _ = call
    flag = call.flag()
    h, mean, rstd = normalised(backend, x, norm, weight.dtype, flag)
    y = gemm.backend.own_conv(h, weight, bias, residual, padding, flag, gemm.config)
    return call.result(y, mean, rstd, flag)


def _why_not_norm_conv(gemm: OwnGemm, call: FlaggedNormConvCall) -> str | None:
    return call.conv.why_not(gemm)


def _folded(config: str, call: FlaggedNormConvCall) -> NormConvResult:
    """Triton's loader applies the norm."""
    _, x, norm, weight, bias, residual, padding, _ = call
    flag, triton = call.flag(), available.triton()
    assert triton is not None
    y, mean, rstd = triton.folded_norm_conv(x, norm, weight, bias, residual, padding, flag, config)
    return call.result(y, mean, rstd, flag)


def _why_not_folded(config: str, call: FlaggedNormConvCall) -> str | None:
    reason, triton = call.conv.why_not(OwnGemm("triton", config)), available.triton()
    if reason is not None or triton is None:
        return reason
    return triton.why_not_folded(call.x, call.weight, call.residual, call.norm.keep)


def _moments(x: Tensor, norm: GroupNorm, flag: MaybeTensor) -> tuple[Tensor, Tensor]:
    """mean and rstd: one read by Triton's kernel; without it the CUDA norm, whose y is not used."""
    triton = available.triton()
    if triton is not None and available.why_not("triton", "group_norm_silu", x) is None:
        return triton.group_moments(x, norm.num_groups, norm.eps, flag)
    _, mean, rstd = available.cuda().group_norm_silu(x, norm.num_groups, None, None, norm.eps, None, None, False, flag)
    return mean, rstd


def _cuda_fused(call: FlaggedNormConvCall) -> NormConvResult:
    _, x, norm, weight, bias, residual, _, _ = call
    flag = call.flag()
    mean, rstd = _moments(x, norm, flag)
    y = available.cuda().norm_conv(x, mean, rstd, norm, weight, bias, residual, flag)
    return call.result(y, mean, rstd, flag)


def _why_not_cuda_fused(call: FlaggedNormConvCall) -> str | None:
    if call.norm.keep is not None:
        return "dropout lies between the norm and the convolution"
    return call.conv.why_not(OwnGemm("cuda", None)) or available.cuda().why_not_norm_conv(call.x)


NORM_CONV_RESIDUAL = PlannedOp(
    "group_norm_silu_conv_residual",
    _library_norm_conv,
    signature=FlaggedNormConvCall.signature,
    describe=FlaggedNormConvCall.describe,
    work=FlaggedNormConvCall.work,
    rule=FlaggedNormConvCall.library_way,
)
NORM_CONV_RESIDUAL.add(ONE_PASS, _norm_one_pass, FlaggedNormConvCall.why_not_one_pass)
FLAGGED_NORM_CONV = PlannedOp(
    "flagged group_norm_silu_conv_residual",
    _library_norm_conv,
    signature=FlaggedNormConvCall.signature,
    describe=FlaggedNormConvCall.describe,
    work=FlaggedNormConvCall.work,
    rule=FlaggedNormConvCall.own_way,
    unmeasured=UNMEASURED,
)
HINTED_NORM_CONV = HintedStep(NORM_CONV_RESIDUAL, FLAGGED_NORM_CONV)

for _gemm in OWN_GEMMS:
    for _conv in (CONV_RESIDUAL, FLAGGED_CONV):
        _conv.add(_gemm.name, partial(_own_conv, _gemm), partial(_why_not_conv, _gemm))
    for _norm_conv in (NORM_CONV_RESIDUAL, FLAGGED_NORM_CONV):
        _norm_conv.add(_gemm.name, partial(_own_norm_conv, _gemm), partial(_why_not_norm_conv, _gemm))
for _norm_conv in (NORM_CONV_RESIDUAL, FLAGGED_NORM_CONV):
    for _config in FOLDS:
        _norm_conv.add(f"triton folded {_config}", partial(_folded, _config), partial(_why_not_folded, _config))
    _norm_conv.add("cuda fused", _cuda_fused, _why_not_cuda_fused)
