"""group_norm_silu: act(group_norm(x) * (1 + scale) + shift)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference as ref
from .._layout import empty_like_dense
from ..backends.base import MaybeTensor
from ..backends.select import select
from . import shapes
from .register import Grads, Op, through

FORWARD = Op(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift, "
    "bool silu) -> (Tensor, Tensor, Tensor)"
)
BACKWARD = Op(
    "group_norm_silu_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, int num_groups, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    device_arg=1,
)


@FORWARD.forward
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: MaybeTensor,
    bias: MaybeTensor,
    eps: float,
    scale: MaybeTensor,
    shift: MaybeTensor,
    silu: bool,
    *,
    direct: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)"""
    if not direct and (route := FORWARD.route(x, weight, bias, scale, shift)):
        return route(x, num_groups, weight, bias, eps, scale, shift, silu)
    return select("group_norm_silu", x).group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu)


@FORWARD.fake
def _fake(
    x: Tensor,
    num_groups: int,
    weight: MaybeTensor,
    bias: MaybeTensor,
    eps: float,
    scale: MaybeTensor,
    shift: MaybeTensor,
    silu: bool,
) -> tuple[Tensor, ...]:
    N = x.shape[0]
    return empty_like_dense(x), shapes.statistics(x, N, num_groups), shapes.statistics(x, N, num_groups)


@BACKWARD.forward
def group_norm_silu_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    scale: MaybeTensor,
    shift: MaybeTensor,
    num_groups: int,
    silu: bool,
    *,
    direct: bool = False,
) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    """The gradients of (x, weight, bias, scale, shift)."""
    if not direct and (route := BACKWARD.route(dy, x, mean, rstd, weight, bias, scale, shift)):
        return route(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu)
    backend = select("group_norm_silu_bwd", x)
    return backend.group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu)


@BACKWARD.fake
def _fake_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    scale: MaybeTensor,
    shift: MaybeTensor,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, ...]:
    return empty_like_dense(x), *shapes.small_grads(weight, bias, scale, shift, like=x)


def _reference(
    x: Tensor,
    num_groups: int,
    weight: MaybeTensor,
    bias: MaybeTensor,
    eps: float,
    scale: MaybeTensor,
    shift: MaybeTensor,
    silu: bool,
) -> Tensor:
    activation = "silu" if silu else None
    return ref.group_norm_silu(x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation)


@FORWARD.backward(through(_reference))
def _backward(inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor, mean: Tensor, rstd: Tensor) -> Grads:
    x, num_groups, weight, bias, _, scale, shift, silu = inputs
    dx, dweight, dbias, dscale, dshift = group_norm_silu_bwd(
        dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu
    )
    return dx, None, dweight, dbias, None, dscale, dshift, None
