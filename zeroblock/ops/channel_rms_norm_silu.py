"""channel_rms_norm_silu: act((rms_norm(x) over the channels [* weight + bias]) * (1 + scale) + shift).

rstd, [N, *S], is all that is kept of the statistics: what each pixel was multiplied by, 1 / sqrt(mean(x^2) + eps) or
sqrt(C) / max(norm, eps); negative where eps was no less, so that backward knows the divisor for a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _checks
from .. import reference as ref
from .._layout import empty_like_dense
from ..backends.base import MaybeTensor
from ..backends.select import select
from . import shapes
from .register import Grads, Op, through

FORWARD = Op(
    "channel_rms_norm_silu(Tensor x, Tensor? weight, Tensor? bias, float eps, bool eps_inside, Tensor? scale, "
    "Tensor? shift, bool silu) -> (Tensor, Tensor)"
)
BACKWARD = Op(
    "channel_rms_norm_silu_bwd(Tensor dy, Tensor x, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    device_arg=1,
)


@FORWARD.forward
def channel_rms_norm_silu(
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    eps: float,
    eps_inside: bool,
    scale: MaybeTensor,
    shift: MaybeTensor,
    silu: bool,
    *,
    direct: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, rstd)"""
    if not direct and (route := FORWARD.route(x, weight, bias, scale, shift)):
        return route(x, weight, bias, eps, eps_inside, scale, shift, silu)
    backend = select("channel_rms_norm_silu", x)
    return backend.channel_rms_norm_silu(x, weight, bias, eps, eps_inside, scale, shift, silu)


@FORWARD.fake
def _fake(
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    eps: float,
    eps_inside: bool,
    scale: MaybeTensor,
    shift: MaybeTensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    op = "channel_rms_norm_silu"
    _checks.floating(op, 1, x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    _checks.images(op, x, 1, scale, shift, weight=weight, bias=bias)
    _checks.eps_value(op, eps)
    return empty_like_dense(x), shapes.statistics(x, x.shape[0], *x.shape[2:])


@BACKWARD.forward
def channel_rms_norm_silu_bwd(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    scale: MaybeTensor,
    shift: MaybeTensor,
    silu: bool,
    *,
    direct: bool = False,
) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    """The gradients of (x, weight, bias, scale, shift)."""
    if not direct and (route := BACKWARD.route(dy, x, rstd, weight, bias, scale, shift)):
        return route(dy, x, rstd, weight, bias, scale, shift, silu)
    backend = select("channel_rms_norm_silu_bwd", x)
    return backend.channel_rms_norm_silu_bwd(dy, x, rstd, weight, bias, scale, shift, silu)


@BACKWARD.fake
def _fake_bwd(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    scale: MaybeTensor,
    shift: MaybeTensor,
    silu: bool,
) -> tuple[Tensor, ...]:
    return empty_like_dense(x), *shapes.small_grads(weight, bias, scale, shift, like=x)


def _reference(
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    eps: float,
    eps_inside: bool,
    scale: MaybeTensor,
    shift: MaybeTensor,
    silu: bool,
) -> Tensor:
    eps_mode, activation = "inside" if eps_inside else "max", "silu" if silu else None
    return ref.channel_rms_norm_silu(
        x, weight, bias, eps=eps, eps_mode=eps_mode, scale=scale, shift=shift, activation=activation
    )


@FORWARD.backward(through(_reference))
def _backward(inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor, rstd: Tensor) -> Grads:
    x, weight, bias, _, _, scale, shift, silu = inputs
    dx, dweight, dbias, dscale, dshift = channel_rms_norm_silu_bwd(dy, x, rstd, weight, bias, scale, shift, silu)
    return dx, dweight, dbias, None, None, dscale, dshift, None
