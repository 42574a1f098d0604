"""linear_gate_residual: residual + gate * linear(act(h)); without the linear while its weight (or a gate that is not in
training) is exactly zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks, zero
from .. import reference as ref
from .._layout import empty_like_dense
from ..backends.base import MaybeTensor
from ..backends.select import select
from ..reference import modulation, promoted
from ..steps.flag import HOST, NEVER, ZERO_GATE, ZERO_WEIGHT, found_by_host
from ..steps.flag import skipped as report
from ..steps.linear import linear_grads
from . import shapes
from .register import Grads, Op, is_traced, through
from .residual_alone import residual_alone, zero_grad

FORWARD = Op(
    "linear_gate_residual(Tensor h, Tensor weight, Tensor? bias, Tensor? gate, Tensor? residual, str? activation, "
    "int zero_skip, bool save_branch) -> (Tensor, Tensor, Tensor)",
    residual=4,
)
BACKWARD = Op(
    "linear_gate_residual_bwd(Tensor dy, Tensor h, Tensor weight, Tensor? gate, Tensor branch, Tensor skipped, "
    "int zero_skip, str? activation, bool has_bias, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor)",
    device_arg=1,
)


@FORWARD.forward
def linear_gate_residual(
    h: Tensor,
    weight: Tensor,
    bias: MaybeTensor,
    gate: MaybeTensor,
    residual: MaybeTensor,
    activation: str | None,
    zero_skip: int,
    save_branch: bool,
    *,
    direct: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, branch, skipped); branch, the linear's output, is kept for the gate's gradient where it is asked for, else
    empty"""
    if not direct and (route := FORWARD.route(h, weight, bias, gate, residual)):
        return route(h, weight, bias, gate, residual, activation, zero_skip, save_branch)
    found = _zero_now(weight, None if save_branch else gate) if zero_skip == HOST else None
    zero.count("linear_gate_residual", found is not None)
    if found is not None:
        return _alone(h, weight, None if found == ZERO_GATE else bias, gate, residual, found, save_branch)
    backend = select("linear_gate_residual", h)
    return backend.linear_gate_residual(h, weight, bias, gate, residual, activation, zero_skip, save_branch)


def _zero_now(weight: Tensor, gate: MaybeTensor) -> int | None:
    """What makes the branch zero, as the host sees it."""
    if gate is not None and zero.is_exactly_zero(gate):
        return ZERO_GATE
    return ZERO_WEIGHT if zero.is_exactly_zero(weight) else None


def _alone(
    h: Tensor,
    weight: Tensor,
    bias: MaybeTensor,
    gate: MaybeTensor,
    residual: MaybeTensor,
    found: int,
    save_branch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """residual + gate * bias, and the branch, which is the bias."""
    size = (*h.shape[:-1], weight.shape[0])
    branch = h.new_zeros(size if save_branch else 0, dtype=weight.dtype)
    if bias is not None and save_branch:
        branch.copy_(bias)
    gate = None if gate is None else modulation(gate)
    dtype = weight.dtype if gate is None else torch.promote_types(weight.dtype, gate.dtype)

    def empty() -> Tensor:
        return h.new_empty(size, dtype=dtype)

    return residual_alone(residual, bias, gate, -1, dtype, empty).contiguous(), branch, report(h, found)


@FORWARD.fake
def _fake(
    h: Tensor,
    weight: Tensor,
    bias: MaybeTensor,
    gate: MaybeTensor,
    residual: MaybeTensor,
    activation: str | None,
    zero_skip: int,
    save_branch: bool,
) -> tuple[Tensor, ...]:
    op = "linear_gate_residual"
    _checks.floating(op, 2, h=h, weight=weight, bias=bias, gate=gate, residual=residual)
    _checks.tokens(op, "h", h)
    _checks.linear(op, h.shape[2], weight, bias)
    _checks.same_dtype(op, h=h, weight=weight, bias=bias)
    branch = h.new_empty(*h.shape[:-1], weight.shape[0], dtype=weight.dtype)
    if residual is not None:
        _checks.same_shape(op, "residual", residual, "the output", branch.shape)
    if gate is not None:
        _checks.gate(op, gate, branch.shape)
    y = branch if residual is None else empty_like_dense(residual)
    y = y.to(promoted(*(t for t in (residual, gate, branch) if t is not None)))
    return y, branch.new_empty(branch.shape if save_branch else (0,)), shapes.flag(h)


@BACKWARD.forward
def linear_gate_residual_bwd(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    gate: MaybeTensor,
    branch: Tensor,
    skipped: Tensor,
    zero_skip: int,
    activation: str | None,
    has_bias: bool,
    mask: Sequence[bool],
    *,
    direct: bool = False,
) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
    """The gradients of (h, weight, bias, gate), each only where mask asks."""
    if not direct and (route := BACKWARD.route(dy, h, weight, gate, branch, skipped)):
        return route(dy, h, weight, gate, branch, skipped, zero_skip, activation, has_bias, mask)
    backend, found = select("linear_gate_residual_bwd", h), found_by_host(skipped, zero_skip)
    dgate: MaybeTensor = None
    dbranch: MaybeTensor = dy
    if gate is not None:
        need_dbranch = found != ZERO_GATE and (mask[1] or mask[2] or (mask[0] and not found))
        dgate, dbranch = backend.gate_residual_bwd(dy, gate, branch if mask[3] else dy, mask[3], need_dbranch)
    if found == ZERO_GATE:
        dbias = weight.new_zeros(weight.shape[0]) if mask[2] and has_bias else None
        return zero_grad(h) if mask[0] else None, zero_grad(weight) if mask[1] else None, dbias, dgate
    dbranch = None if dbranch is None else dbranch.to(weight.dtype)
    dh: MaybeTensor = None
    activated: MaybeTensor = h
    if mask[0] and found:
        dh = zero_grad(h)
    elif mask[0] and dbranch is not None:
        dh, _, _ = linear_grads(backend, dbranch, h, weight, False, (True, False, False))
    if activation is not None and mask[0] and not found and dh is not None:  # one read of h gives both
        dh, activated = backend.activation_bwd(dh.to(h.dtype), h, activation, mask[1])
    elif activation is not None and mask[1]:
        activated = backend.activation(h, activation)
    if dbranch is None or not (mask[1] or mask[2]):
        return dh, None, None, dgate
    a = h if activated is None or not mask[1] else activated.to(weight.dtype)
    _, dweight, dbias = linear_grads(backend, dbranch, a, weight, has_bias, (False, mask[1], mask[2]))
    return dh, dweight, dbias, dgate


@BACKWARD.fake
def _fake_bwd(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    gate: MaybeTensor,
    branch: Tensor,
    skipped: Tensor,
    zero_skip: int,
    activation: str | None,
    has_bias: bool,
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    bias = weight[:, 0] if has_bias else None
    wanted = [mask[0], mask[1], mask[2] and has_bias, mask[3]]
    return shapes.grads_where(wanted, h, weight, bias, gate, like=dy)


def _reference(
    h: Tensor,
    weight: Tensor,
    bias: MaybeTensor,
    gate: MaybeTensor,
    residual: MaybeTensor,
    activation: str | None,
    zero_skip: int,
    save_branch: bool,
) -> Tensor:
    return ref.linear_gate_residual(h, weight, bias, gate, None, activation=activation)


@FORWARD.definition
def _compiled(
    h: Tensor,
    weight: Tensor,
    bias: MaybeTensor,
    gate: MaybeTensor,
    residual: MaybeTensor,
    activation: str | None,
    zero_skip: int,
    save_branch: bool,
) -> Tensor:
    """The product stays an op, for its zero path: with the gate where a zero gate too would spare it, else alone. The
    bias is then added outside: with its gradient it is part of what the compiler fuses."""
    if zero_skip == NEVER:
        return ref.linear_gate_residual(h, weight, bias, gate, residual, activation=activation)
    if gate is not None and not save_branch:
        return FORWARD.overload(h, weight, bias, gate, residual, activation, zero_skip, False)[0]
    h = ref.apply_activation(h, activation)
    branch = FORWARD.overload(h, weight, None, None, None, None, zero_skip, False)[0]
    return ref.add_gated(residual, gate, branch if bias is None else branch + bias)


@FORWARD.backward(through(_reference))
def _backward(inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor, branch: Tensor, skipped: Tensor) -> Grads:
    h, weight, bias, gate, _, activation, zero_skip, _ = inputs
    grads: tuple[MaybeTensor, ...] = (None, None, None, None)
    if gate is bias is activation is None and h.is_cpu and is_traced():
        dh = None
        if needed[0]:
            only_h = [True, False, False, False]
            dh = linear_gate_residual_bwd(dy, h, weight, None, branch, skipped, zero_skip, None, False, only_h)[0]
        # A plain product, zero or not: the compiler's own.
        flat = dy.reshape(-1, weight.shape[0])
        grads = dh, flat.t() @ h.reshape(-1, weight.shape[1]) if needed[1] else None, None, None
    elif any(needed[:4]):
        grads = linear_gate_residual_bwd(
            dy, h, weight, gate, branch, skipped, zero_skip, activation, bias is not None, needed[:4]
        )
    return *grads, None, None, None, None
