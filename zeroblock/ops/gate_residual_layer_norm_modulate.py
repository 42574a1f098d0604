"""gate_residual_layer_norm_modulate: x_new = residual + gate * branch and layer_norm(x_new) * (1 + scale) + shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .. import reference as ref
from ..backends import reference as reference_backend
from ..backends.base import MaybeTensor
from ..backends.select import select
from . import shapes
from .gate_residual import gate_residual_bwd
from .layer_norm_modulate import layer_norm_modulate
from .layer_norm_modulate import traced as norm
from .register import Grads, Op, recorded_grads


def _x_new_and_statistics(inputs: Sequence[Any], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output[0], *output[2:]


def _norm_again(inputs: Sequence[Any], extra: Sequence[MaybeTensor]) -> Tensor:
    """y, of x_new."""
    _, _, _, shift, scale, eps = inputs
    return layer_norm_modulate(extra[0], shift, scale, None, None, eps, direct=True)[0]  # type: ignore[arg-type]


FORWARD = Op(
    "gate_residual_layer_norm_modulate(Tensor residual, Tensor gate, Tensor branch, Tensor shift, Tensor scale, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    differentiable=2,
    residual=0,
    save=_x_new_and_statistics,
    again=(1, _norm_again),
)
BACKWARD = Op(
    "gate_residual_layer_norm_modulate_bwd(Tensor? dx_new, Tensor dy, Tensor x_new, Tensor mean, Tensor rstd, "
    "Tensor gate, Tensor branch, Tensor shift, Tensor scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    device_arg=1,
)


@FORWARD.forward
def gate_residual_layer_norm_modulate(
    residual: Tensor,
    gate: Tensor,
    branch: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    direct: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_new, y, mean, rstd)"""
    if not direct and (route := FORWARD.route(residual, gate, branch, shift, scale)):
        return route(residual, gate, branch, shift, scale, eps)
    backend = select("gate_residual_layer_norm_modulate", residual)
    return backend.gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps)


@FORWARD.fake
def _fake(
    residual: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, ...]:
    op = "gate_residual_layer_norm_modulate"
    _checks.floating(op, 5, residual=residual, gate=gate, branch=branch, shift=shift, scale=scale)
    _checks.modulated(op, residual, eps, shift=shift, scale=scale)
    _checks.same_shape(op, "branch", branch, "residual", residual.shape)
    _checks.gate(op, gate, branch.shape)
    x_new, rows = branch.new_empty(branch.shape), branch.shape[:2]
    return x_new, x_new.new_empty(x_new.shape), shapes.statistics(x_new, *rows), shapes.statistics(x_new, *rows)


@BACKWARD.forward
def gate_residual_layer_norm_modulate_bwd(
    dx_new: MaybeTensor,
    dy: Tensor,
    x_new: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    branch: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    direct: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of (residual, gate, branch, shift, scale)."""
    if not direct and (route := BACKWARD.route(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale)):
        return route(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale)
    backend = select("gate_residual_layer_norm_modulate_bwd", dy)
    return backend.gate_residual_layer_norm_modulate_bwd(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale)


@BACKWARD.fake
def _fake_bwd(
    dx_new: MaybeTensor,
    dy: Tensor,
    x_new: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    branch: Tensor,
    shift: Tensor,
    scale: Tensor,
) -> tuple[Tensor, ...]:
    dresidual, dbranch = (branch.new_empty(branch.shape) for _ in range(2))
    dgate, dshift, dscale = shapes.small_grads(gate, shift, scale, like=branch)
    return dresidual, dgate, dbranch, dshift, dscale


@FORWARD.definition
def _traced(
    residual: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x_new = ref.gate_residual(residual, gate, branch)
    return x_new, norm(x_new, shift, scale, None, None, eps)


def _double_backward(
    inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[MaybeTensor], extra: Sequence[Tensor]
) -> Grads:
    """x_new, a saved output, carries the graph of residual, gate and branch."""
    _, gate, branch, shift, scale, eps = inputs
    dx_new, dy = grads
    dresidual, dshift, dscale = dx_new, None, None
    if dy is not None:

        def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return ref.layer_norm_modulate(x, shift, scale, eps=eps)

        dx, dshift, dscale = recorded_grads(norm, (extra[0], shift, scale), dy)
        dresidual = dx if dx_new is None else dx_new if dx is None else dx + dx_new
    if dresidual is None:  # shift and scale alone have a gradient
        return None, None, None, dshift, dscale, None
    return dresidual, *reference_backend.gate_residual_bwd(dresidual, gate, branch, True, True), dshift, dscale, None


@FORWARD.backward(_double_backward)
def _backward(
    inputs: Sequence[Any],
    needed: Sequence[bool],
    dx_new: MaybeTensor,
    dy: MaybeTensor,
    x_new: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Grads:
    _, gate, branch, shift, scale, _ = inputs
    if dy is None:
        assert dx_new is not None
        dgate, dbranch = gate_residual_bwd(dx_new, gate, branch, True, True)
        return dx_new, dgate, dbranch, torch.zeros_like(shift), torch.zeros_like(scale), None
    return *gate_residual_layer_norm_modulate_bwd(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale), None
