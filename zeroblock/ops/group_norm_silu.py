"""group_norm_silu: act(group_norm(x) * (1 + scale) + shift); per_frame: statistics of each frame of [N, C, T, H, W]."""

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
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift, "
    "bool silu, bool per_frame=False) -> (Tensor, Tensor, Tensor)"
)
BACKWARD = Op(
    "group_norm_silu_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, int num_groups, bool silu, bool per_frame=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    per_frame: bool = False,
    *,
    direct: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd), the statistics [N, G] or, per frame, [N * T, G]"""
    if not direct and (route := FORWARD.route(x, weight, bias, scale, shift)):
        return route(x, num_groups, weight, bias, eps, scale, shift, silu, per_frame)
    backend = select("group_norm_silu", x)
    run = backend.group_norm_silu_frames if per_frame else backend.group_norm_silu
    return run(x, num_groups, weight, bias, eps, scale, shift, silu)


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
    per_frame: bool = False,
) -> tuple[Tensor, ...]:
    op = "group_norm_silu"
    _checks.floating(op, 1, x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    _checks.images(op, x, num_groups, scale, shift, weight=weight, bias=bias)
    _checks.eps_value(op, eps)
    N = x.shape[0] * x.shape[2] if per_frame else x.shape[0]
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
    per_frame: bool = False,
    *,
    direct: bool = False,
) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    """The gradients of (x, weight, bias, scale, shift)."""
    if not direct and (route := BACKWARD.route(dy, x, mean, rstd, weight, bias, scale, shift)):
        return route(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, per_frame)
    backend = select("group_norm_silu_bwd", x)
    run = backend.group_norm_silu_frames_bwd if per_frame else backend.group_norm_silu_bwd
    return run(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu)


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
    per_frame: bool = False,
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
    per_frame: bool = False,
) -> Tensor:
    activation = "silu" if silu else None
    return ref.group_norm_silu(
        x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation, per_frame=per_frame
    )


@FORWARD.backward(through(_reference))
def _backward(inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor, mean: Tensor, rstd: Tensor) -> Grads:
    x, num_groups, weight, bias, _, scale, shift, silu, per_frame = inputs
    dx, dweight, dbias, dscale, dshift = group_norm_silu_bwd(
        dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, per_frame
    )
    return dx, None, dweight, dbias, None, dscale, dshift, None, None
