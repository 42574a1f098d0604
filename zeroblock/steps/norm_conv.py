"""Half a ResBlock, residual + conv(dropout(silu(group_norm x))), as planned steps (`_plan.py`): forward and backward.

The library's way puts the norm's kernel in front of a convolution that plans for itself (`_conv.py`).
"""

from __future__ import annotations

from ..plan.planned import PlannedOp
from ..reference import dropout_keep
from .conv import CONV, CONV_BWD


def hidden(P, x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p, dtype, **flag):
    """(dropout(silu(norm x)) in `dtype`, mean, rstd); flag: what stops the kernel, on the device"""
    h, mean, rstd = P.group_norm_silu(x, num_groups, norm_weight, norm_bias, eps, scale, shift, True, **flag)
    return dropout_keep(h.to(dtype), keep, dropout_p), mean, rstd


def _norm_then_conv(P, x, num_groups, nw, nb, eps, scale, shift, keep, p, weight, bias, residual, geometry):
    h, mean, rstd = hidden(P, x, num_groups, nw, nb, eps, scale, shift, keep, p, weight.dtype)
    return CONV(P, h, weight, bias, residual, geometry), mean, rstd


def _norm(x, num_groups, nw, nb, scale, shift, keep, weight) -> tuple:
    return num_groups, x.dtype, weight.dtype, nw is None, nb is None, scale is None, shift is None, keep is None


def _description(conv: str, num_groups, scale, shift, keep) -> str:
    extra = ", FiLM" * (scale is not None or shift is not None) + ", dropout" * (keep is not None)
    return f"{conv}, {num_groups} groups{extra}"


def _signature(P, x, num_groups, nw, nb, eps, scale, shift, keep, p, weight, bias, residual, geometry):
    norm = _norm(x, num_groups, nw, nb, scale, shift, keep, weight)
    return norm, CONV.signature(P, x, weight, bias, residual, geometry)


def _describe(P, x, num_groups, nw, nb, eps, scale, shift, keep, p, weight, bias, residual, geometry):
    return _description(CONV.describe(P, x, weight, bias, residual, geometry), num_groups, scale, shift, keep)


# (y, mean, rstd) as (P, x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p, weight, bias,
# residual, geometry). The rule is that of the convolution.
NORM_CONV = PlannedOp(
    "norm_conv",
    _norm_then_conv,
    signature=_signature,
    describe=_describe,
    work=lambda P, x, *rest: CONV.work(P, x, *rest[8:]),
    lead=1,
    rule=lambda P, x, *rest: CONV.rule(P, x, *rest[8:]),
)


def _recomputed_then_conv_grads(
    P, dy, x, mean, rstd, num_groups, nw, nb, eps, scale, shift, keep, p, weight, has_bias, padding, mask
):
    h, _, _ = hidden(P, x, num_groups, nw, nb, eps, scale, shift, keep, p, weight.dtype)
    return CONV_BWD(P, dy, h, weight, has_bias, padding, mask)


def _bwd_signature(
    P, dy, x, mean, rstd, num_groups, nw, nb, eps, scale, shift, keep, p, weight, has_bias, padding, mask
):
    norm = _norm(x, num_groups, nw, nb, scale, shift, keep, weight)
    return norm, CONV_BWD.signature(P, dy, x, weight, has_bias, padding, mask)


def _bwd_describe(
    P, dy, x, mean, rstd, num_groups, nw, nb, eps, scale, shift, keep, p, weight, has_bias, padding, mask
):
    return _description(CONV_BWD.describe(P, dy, x, weight, has_bias, padding, mask), num_groups, scale, shift, keep)


# (dh, dweight, dbias), h = dropout(silu(norm x)), as (P, dy, x, mean, rstd, num_groups, norm_weight, norm_bias, eps,
# scale, shift, keep, dropout_p, weight, has_bias, padding, mask).
NORM_CONV_BWD = PlannedOp(
    "norm_conv_bwd",
    _recomputed_then_conv_grads,
    signature=_bwd_signature,
    describe=_bwd_describe,
    work=lambda P, dy, x, *rest: CONV_BWD.work(P, dy, x, *rest[-4:]),
    lead=1,
    rule=lambda P, dy, x, *rest: CONV_BWD.rule(P, dy, x, *rest[-4:]),
)
