"""group_norm_silu_conv_residual, half a ResBlock:
residual + conv(dropout(silu(group_norm(x) * (1 + scale) + shift)))."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .. import reference as ref
from .._layout import as_norm_input, empty_like_dense
from .._padding import is_padded
from ..backends.base import GroupNorm, MaybeTensor
from ..backends.select import select
from ..steps import padded
from ..steps.flag import ZERO_WEIGHT, flag_of, found_by_host
from ..steps.flag import skipped as report
from ..steps.norm_conv import normalised
from . import shapes
from .conv_residual import conv_residual_alone, library_grads
from .register import Grads, Op, filled, through
from .residual_alone import weight_is_zero, zero_grad

_NORM_AND_WEIGHT = (
    "int num_groups, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? scale, Tensor? shift, "
    "Tensor? keep, float dropout_p, Tensor weight"
)
FORWARD = Op(
    f"group_norm_silu_conv_residual(Tensor x, {_NORM_AND_WEIGHT}, Tensor? bias, Tensor? residual, int[] padding, "
    "int zero_skip) -> (Tensor, Tensor, Tensor, Tensor)",
    residual=11,
)
BACKWARD = Op(
    f"group_norm_silu_conv_residual_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, {_NORM_AND_WEIGHT}, "
    "Tensor skipped, int zero_skip, int[] padding, bool has_bias, bool[] mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    device_arg=1,
)


@FORWARD.forward
def group_norm_silu_conv_residual(
    x: Tensor,
    num_groups: int,
    norm_weight: MaybeTensor,
    norm_bias: MaybeTensor,
    eps: float,
    scale: MaybeTensor,
    shift: MaybeTensor,
    keep: MaybeTensor,
    dropout_p: float,
    weight: Tensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    padding: Sequence[int],
    zero_skip: int,
    *,
    direct: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, skipped)"""
    if not direct and (route := FORWARD.route(x, norm_weight, norm_bias, scale, shift, keep, weight, bias, residual)):
        norm_arguments = num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p
        return route(x, *norm_arguments, weight, bias, residual, padding, zero_skip)
    if weight_is_zero("group_norm_silu_conv_residual", zero_skip, weight):
        both = x.is_contiguous() or x.shape[1] == 1  # the norm's result is contiguous where it is both
        y = conv_residual_alone(as_norm_input(x)[0] if both else x, weight, bias, residual, padding)
        moments = x.new_zeros(2, x.shape[0], num_groups, dtype=torch.promote_types(x.dtype, torch.float32))
        return y, moments[0].clone(), moments[1].clone(), report(x, ZERO_WEIGHT)
    norm = GroupNorm(num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p)
    backend = select("group_norm_silu_conv_residual", x)
    if is_padded(padding, weight):
        return padded.norm_conv_residual(backend, x, norm, weight, bias, residual, padding)
    return backend.norm_conv_residual(x, norm, weight, bias, residual, tuple(padding), zero_skip)


@FORWARD.fake
def _fake(
    x: Tensor,
    num_groups: int,
    norm_weight: MaybeTensor,
    norm_bias: MaybeTensor,
    eps: float,
    scale: MaybeTensor,
    shift: MaybeTensor,
    keep: MaybeTensor,
    dropout_p: float,
    weight: Tensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    padding: Sequence[int],
    zero_skip: int,
) -> tuple[Tensor, ...]:
    op, affine = "group_norm_silu_conv_residual", {"norm_weight": norm_weight, "norm_bias": norm_bias}
    others = {"bias": bias, "residual": residual, "scale": scale, "shift": shift}
    _checks.floating(op, 2, x=x, weight=weight, **affine, **others)
    _checks.images(op, x, num_groups, scale, shift, **affine)
    _checks.eps_value(op, eps)
    _checks.probability(op, dropout_p)
    _checks.taken_convolution(op, x, weight, bias, residual, padding)
    _checks.same_dtype(op, weight=weight, bias=bias)
    y = shapes.add(residual, shapes.conv(empty_like_dense(x).to(weight.dtype), weight, bias, padding))
    mean, rstd = (shapes.statistics(x, x.shape[0], num_groups) for _ in range(2))
    return y, mean, rstd, shapes.flag(x)


@BACKWARD.forward
def group_norm_silu_conv_residual_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    norm_weight: MaybeTensor,
    norm_bias: MaybeTensor,
    eps: float,
    scale: MaybeTensor,
    shift: MaybeTensor,
    keep: MaybeTensor,
    dropout_p: float,
    weight: Tensor,
    skipped: Tensor,
    zero_skip: int,
    padding: Sequence[int],
    has_bias: bool,
    mask: Sequence[bool],
    *,
    direct: bool = False,
) -> tuple[MaybeTensor, ...]:
    """The gradients of (x, norm_weight, norm_bias, scale, shift, weight, bias). mask: whether those of the norm (the
    first five), of the weight and of the bias are wanted."""
    norm = GroupNorm(num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p)
    if not direct and (
        route := BACKWARD.route(dy, x, mean, rstd, norm_weight, norm_bias, scale, shift, keep, weight, skipped)
    ):
        return route(dy, x, mean, rstd, *norm, weight, skipped, zero_skip, padding, has_bias, mask)
    dy, backend = dy.to(weight.dtype), select("group_norm_silu_conv_residual_bwd", x)
    if found_by_host(skipped, zero_skip):
        h = normalised(backend, x, norm, weight.dtype)[0] if mask[1] else x
        _, dweight, dbias = library_grads(backend, dy, h, weight, has_bias, padding, mask[1:])
        upstream = (x, norm_weight, norm_bias, scale, shift) if mask[0] else (None,) * 5
        return *(None if t is None else zero_grad(t) for t in upstream), dweight, dbias
    if is_padded(padding, weight):
        return padded.norm_conv_grads(backend, dy, x, mean, rstd, norm, weight, has_bias, padding, mask)
    flag = flag_of(skipped, zero_skip)
    return backend.norm_conv_grads(dy, x, mean, rstd, norm, weight, flag, has_bias, tuple(padding), mask)


@BACKWARD.fake
def _fake_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    norm_weight: MaybeTensor,
    norm_bias: MaybeTensor,
    eps: float,
    scale: MaybeTensor,
    shift: MaybeTensor,
    keep: MaybeTensor,
    dropout_p: float,
    weight: Tensor,
    skipped: Tensor,
    zero_skip: int,
    padding: Sequence[int],
    has_bias: bool,
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    h = empty_like_dense(x).to(weight.dtype)
    tail = shapes.conv_grads(dy.to(weight.dtype), h, weight, has_bias, padding, (False, mask[1], mask[2]))[1:]
    norm: Sequence[MaybeTensor] = (None,) * 5
    if mask[0]:
        norm = empty_like_dense(x), *shapes.small_grads(norm_weight, norm_bias, scale, shift, like=x)
    return *filled(norm, x), *filled(tail, dy)


def _reference(
    x: Tensor,
    num_groups: int,
    norm_weight: MaybeTensor,
    norm_bias: MaybeTensor,
    eps: float,
    scale: MaybeTensor,
    shift: MaybeTensor,
    keep: MaybeTensor,
    dropout_p: float,
    weight: Tensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    padding: Sequence[int],
    zero_skip: int,
) -> Tensor:
    return ref.group_norm_silu_conv_residual(
        x,
        num_groups,
        norm_weight,
        norm_bias,
        weight,
        bias,
        eps=eps,
        scale=scale,
        shift=shift,
        keep=keep,
        dropout_p=dropout_p,
        padding=padding,
    )


@FORWARD.backward(through(_reference))
def _backward(
    inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor, mean: Tensor, rstd: Tensor, skipped: Tensor
) -> Grads:
    x, weight, bias, padding, zero_skip = inputs[0], *inputs[9:11], *inputs[12:]
    norm = GroupNorm(*inputs[1:9])
    grads: tuple[MaybeTensor, ...] = (None,) * 7
    upstream = any(needed[i] for i in (0, 2, 3, 5, 6))
    if upstream or needed[9] or needed[10]:
        mask = [upstream, needed[9], needed[10]]
        grads = group_norm_silu_conv_residual_bwd(
            dy, x, mean, rstd, *norm, weight, skipped, zero_skip, padding, bias is not None, mask
        )
    dx, dnorm_weight, dnorm_bias, dscale, dshift, dweight, dbias = grads
    return (
        dx, None, dnorm_weight, dnorm_bias, None, dscale, dshift, None, None, dweight, dbias, None, None, None
    )  # fmt: skip
