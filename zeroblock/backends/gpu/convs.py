"""Convolutions of the ops on a GPU as planned steps: the library's, Triton's implicit GEMM in its configurations, and
the CUDA tensor-core convolution, which applies the norm in its prologue. P is `_gpu.py`; candidates: `_gpu_gemms.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import zero
from ..._compose import conv_size
from ...plan.measure import dtype_name
from ...plan.planned import PlannedOp
from ...steps import conv as _conv
from ...steps.conv import unit_geometry
from ...steps.norm_conv import hidden
from .. import available as _backends
from .gemms import CANDIDATES, FOLDS, TRITON, WGRADS, describe_flag, judge, rule, settings, settled, verdict, why_not

CUDA: Any = _backends._load("cuda")
_OP = "conv_residual"  # what all of these ask a backend for


def _pixels(h: Tensor, weight: Tensor, padding: tuple[int, ...]) -> int:
    """Of the result."""
    N, _, *size = conv_size((h.shape[0], *h.shape[2:]), weight, padding, [1] * len(padding), [1] * len(padding))
    return N * torch.Size(size).numel()


# ---- residual + conv(h) ---------------------------------------------------------------------------------------------


def _library_conv(P, h, weight, bias, residual, padding, zero_skip):
    return _conv.CONV(P, h, weight, bias, residual, unit_geometry(padding)), verdict(None, h)


def _conv_signature(P, h, weight, bias, residual, padding, zero_skip):
    return _conv.CONV.signature(P, h, weight, bias, residual, unit_geometry(padding)), zero_skip, settings(h)


def _conv_describe(P, h, weight, bias, residual, padding, zero_skip):
    step = _conv.CONV.describe(P, h, weight, bias, residual, unit_geometry(padding))
    return f"{step}, {describe_flag(zero_skip == zero.DEVICE)}, settings {settings(h)}"


# (residual + conv(h), verdict) as (P, h, weight, bias, residual, padding, zero_skip).
CONV = PlannedOp(
    "conv_residual",
    _library_conv,
    signature=_conv_signature,
    describe=_conv_describe,
    work=lambda P, h, weight, bias, residual, padding, zero_skip: _conv.CONV.work(
        P, h, weight, bias, residual, unit_geometry(padding)
    ),
    lead=1,
    rule=lambda P, h, weight, bias, residual, padding, zero_skip: rule(
        _OP, _pixels(h, weight, padding), weight, h, weight, None, residual, padding, zero_skip == zero.DEVICE
    ),
)


def _add_conv(name: str, backend: str, options: dict[str, str]) -> None:
    def run(P, h, weight, bias, residual, padding, zero_skip):
        flag, module = judge(P, [weight], zero_skip), _backends._load(backend)
        y = module.conv(h, weight, bias, residual, padding, flag, **options)
        return y, verdict(flag, h)

    def refuses(P, h, weight, bias, residual, padding, zero_skip):
        return why_not(backend, _OP, options, h, weight, None, residual, padding)

    CONV.add(name, run, refuses)


# ---- half a ResBlock ------------------------------------------------------------------------------------------------


def _library_norm_conv(P, x, groups, nw, nb, eps, scale, shift, keep, p, weight, bias, residual, padding, zero_skip):
    h, mean, rstd = hidden(P, x, groups, nw, nb, eps, scale, shift, keep, p, weight.dtype)
    y = _conv.CONV(P, h, weight, bias, residual, unit_geometry(padding))
    return y, mean, rstd, verdict(None, x)


def _norm(groups, nw, nb, scale, shift, keep) -> tuple:
    return groups, nw is None, nb is None, scale is None, shift is None, keep is None


# (y, mean, rstd, verdict) as (P, x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p, weight,
# bias, residual, padding, zero_skip).
NORM_CONV = PlannedOp(
    "group_norm_silu_conv_residual",
    _library_norm_conv,
    signature=lambda P, x, groups, nw, nb, eps, scale, shift, keep, p, weight, *rest: (
        _norm(groups, nw, nb, scale, shift, keep), weight.dtype, _conv_signature(P, x, weight, *rest)
    ),
    describe=lambda P, x, groups, nw, nb, eps, scale, shift, keep, p, weight, *rest: (
        f"{_conv_describe(P, x, weight, *rest)}, weight {dtype_name(weight)}, {groups} groups"
        f"{', FiLM' * (scale is not None or shift is not None)}{', dropout' * (keep is not None)}"
    ),
    work=lambda P, x, *rest: CONV.work(P, x, *rest[8:]),
    lead=1,
    rule=lambda P, x, *rest: CONV.rule(P, x, *rest[8:]),
)  # fmt: skip


def _add_norm_conv(name: str, backend: str, options: dict[str, str]) -> None:
    """The norm as planned, then the own convolution: both read the flag, or their results are not used."""

    def run(P, x, groups, nw, nb, eps, scale, shift, keep, p, weight, bias, residual, padding, zero_skip):
        flag, module = judge(P, [weight], zero_skip), _backends._load(backend)
        h, mean, rstd = hidden(P, x, groups, nw, nb, eps, scale, shift, keep, p, weight.dtype, flag=flag)
        y = module.conv(h, weight, bias, residual, padding, flag, **options)
        return y, mean, rstd, verdict(flag, x)

    def refuses(P, x, groups, nw, nb, eps, scale, shift, keep, p, weight, bias, residual, padding, zero_skip):
        return why_not(backend, _OP, options, x, weight, None, residual, padding)

    NORM_CONV.add(name, run, refuses)


def _add_folded(config: str) -> None:
    """Triton's loader applies the norm."""

    def run(P, x, groups, nw, nb, eps, scale, shift, keep, p, weight, bias, residual, padding, zero_skip):
        flag = judge(P, [weight], zero_skip)
        y, mean, rstd = TRITON.folded_norm_conv(
            x, groups, nw, nb, eps, scale, shift, weight, bias, residual, padding, flag, config
        )
        return y, mean, rstd, verdict(flag, x)

    def refuses(P, x, groups, nw, nb, eps, scale, shift, keep, p, weight, bias, residual, padding, zero_skip):
        reason = why_not("triton", _OP, {"config": config}, x, weight, None, residual, padding)
        return reason or TRITON.why_not_folded(x, weight, residual, keep)

    NORM_CONV.add(f"triton folded {config}", run, refuses)


def _moments(x: Tensor, groups: int, eps: float, flag: Tensor | None) -> tuple[Tensor, Tensor]:
    """mean and rstd: one read by Triton's kernel; without it the CUDA norm, whose y is not used."""
    if _backends.why_not("triton", "group_norm_silu", x) is None:
        return TRITON.group_moments(x, groups, eps, flag)
    return CUDA.group_norm_silu(x, groups, None, None, eps, None, None, False, flag)[1:]


def _cuda_fused(P, x, groups, nw, nb, eps, scale, shift, keep, p, weight, bias, residual, padding, zero_skip):
    flag = judge(P, [weight], zero_skip)
    mean, rstd = _moments(x, groups, eps, flag)
    y, _ = CUDA.group_norm_silu_conv_residual(
        x, mean, rstd, nw, nb, scale, shift, weight, bias, residual, flag=flag
    )  # fmt: skip
    return y, mean, rstd, verdict(flag, x)


def _why_not_cuda_fused(P, x, groups, nw, nb, eps, scale, shift, keep, p, weight, bias, residual, padding, zero_skip):
    if keep is not None:
        return "dropout lies between the norm and the convolution"
    return why_not("cuda", _OP, {}, x, weight, None, residual, padding)


# ---- the convolution's gradients ------------------------------------------------------------------------------------


def _library_dgrad(P, dy, h, weight, flag, padding):
    return _conv.CONV_BWD(P, dy, h, weight, False, padding, [True, False, False])[0]


def _library_wgrad(P, dy, h, weight, has_bias, padding, mask):
    return _conv.CONV_BWD(P, dy, h, weight, has_bias, padding, [False, *mask])[1:]


def _bwd_signature(P, dy, h, weight, other, padding, mask=(True, False, False)):
    other = other is None if isinstance(other, (Tensor, type(None))) else other
    return _conv.CONV_BWD.signature(P, dy, h, weight, other, padding, mask), settings(h)


def _bwd_describe(P, dy, h, weight, other, padding, mask=(True, False, False)):
    other = ("no flag" if other is None else "flagged") if isinstance(other, (Tensor, type(None))) else f"bias {other}"
    return f"{_conv.CONV_BWD.describe(P, dy, h, weight, other, padding, mask)}, {other}, {settings(h)}"


# dh as (P, dy, h, weight, flag, padding); of h the shape and layout are used.
DGRAD = PlannedOp(
    "conv_dgrad",
    _library_dgrad,
    signature=_bwd_signature,
    describe=_bwd_describe,
    work=lambda P, dy, h, weight, *rest: 2 * dy.numel() * weight[0].numel(),
    lead=1,
    rule=lambda P, dy, h, weight, flag, padding: rule(
        _OP, h.numel() // h.shape[1], weight.transpose(0, 1), h, weight, None, None, padding, flag is not None
    ),
)
# (dweight, dbias) as (P, dy, h, weight, has_bias, padding, mask).
WGRAD = PlannedOp(
    "conv_wgrad",
    _library_wgrad,
    signature=_bwd_signature,
    describe=_bwd_describe,
    work=lambda P, dy, h, weight, has_bias, padding, mask: 2 * dy.numel() * weight[0].numel() * bool(mask[0]),
    lead=1,
)


def _add_dgrad(name: str, backend: str, options: dict[str, str]) -> None:
    def run(P, dy, h, weight, flag, padding):
        return _backends._load(backend).conv_dgrad(dy, weight, padding, settled(flag), **options)

    def refuses(P, dy, h, weight, flag, padding):
        return why_not(backend, _OP, options, h, weight, None, None, padding)

    DGRAD.add(name, run, refuses)


def _add_wgrad(config: str) -> None:
    def run(P, dy, h, weight, has_bias, padding, mask):
        return TRITON.conv_wgrad(dy, h, weight, padding, config), dy.sum((0, 2, 3)) if mask[1] and has_bias else None

    def refuses(P, dy, h, weight, has_bias, padding, mask):
        if not mask[0]:
            return "the weight needs no gradient"
        if weight.dtype == torch.float32:
            return "the kernel is for half precision"
        return why_not("triton", _OP, {"config": config}, h, weight, None, None, padding)

    WGRAD.add(f"triton {config}", run, refuses)


for _candidate in CANDIDATES:
    _add_conv(*_candidate)
    _add_norm_conv(*_candidate)
    _add_dgrad(*_candidate)
for _config in FOLDS:
    _add_folded(_config)
for _config in WGRADS:
    _add_wgrad(_config)
NORM_CONV.add("cuda fused", _cuda_fused, _why_not_cuda_fused)
