"""What the ops with a linear layer compute on a backend: see `_compose.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import zero
from ._compose import EXECUTED, ZERO_GATE, ZERO_WEIGHT, _host_verdict, _verdict, _zeros, bare_residual, planned
from .reference import modulation
from .steps.conv import add_residual


def linear_grads(P, dy: Tensor, h: Tensor, weight: Tensor, has_bias: bool, mask: list[bool]):
    """(dh, dweight, dbias) of linear(h) for [..., K] inputs, each only where mask asks; all of one dtype."""
    flat = dy.reshape(-1, weight.shape[0])
    dh = P.linear(flat, weight.t(), None).view(h.shape) if mask[0] else None
    dweight = P.linear(flat.t(), h.reshape(-1, weight.shape[1]).t(), None) if mask[1] else None
    return dh, dweight, flat.sum(0) if mask[2] and has_bias else None


def layer_norm_modulate_linear(P, x, shift, scale, weight, bias, eps):
    h, mean, rstd = P.layer_norm_modulate(x, shift, scale, None, None, eps, False)
    h = h.to(weight.dtype)
    if planned(P):
        return P.LINEAR(P, h, weight, bias, None, None, None, zero.NEVER, False)[0], mean, rstd
    return P.linear(h, weight, bias), mean, rstd


def layer_norm_modulate_linear_bwd(P, dy, x, mean, rstd, shift, scale, weight, eps, has_bias, mask):
    """(dx, dshift, dscale, dweight, dbias); mask: dx and the modulation's, dweight, dbias."""
    h = x
    if mask[1]:
        h = P.layer_norm_modulate(x, shift, scale, None, None, eps, False)[0].to(weight.dtype)
    dh, dweight, dbias = linear_grads(P, dy.to(weight.dtype), h, weight, has_bias, mask)
    if not mask[0]:
        return None, None, None, dweight, dbias
    dx, dshift, dscale, _, _ = P.layer_norm_modulate_bwd(dh, x, mean, rstd, shift, scale, None, None, False)
    return dx, dshift, dscale, dweight, dbias


def linear_gate_residual(P, h, weight, bias, gate, residual, activation, zero_skip, save_branch):
    """(y, branch, skipped); branch is kept for dgate when save_branch, else empty."""
    if zero_skip == zero.DEVICE and P.why_library("linear_gate_residual", h, weight, gate, residual, None) is None:
        zero.count("linear_gate_residual", False)
        flag = P.zero_flags([weight] if gate is None or save_branch else [weight, gate], any_of=True)
        return own_linear(P, P, h, weight, bias, gate, residual, activation, flag, save_branch)
    host = zero_skip == zero.HOST
    zero_gate = host and gate is not None and not save_branch and zero.is_exactly_zero(gate)
    zero_weight = host and not zero_gate and zero.is_exactly_zero(weight)
    zero.count("linear_gate_residual", zero_gate or zero_weight)
    if zero_gate or zero_weight:
        size = (*h.shape[:-1], weight.shape[0])
        branch = h.new_zeros(size if save_branch else 0, dtype=weight.dtype)
        bias = None if zero_gate else bias
        if bias is not None and save_branch:
            branch.copy_(bias)
        gate = None if gate is None else modulation(gate)
        dtype = weight.dtype if gate is None else torch.promote_types(weight.dtype, gate.dtype)
        y = bare_residual(residual, bias, gate, -1, dtype, lambda: h.new_empty(size, dtype=dtype))
        return y.contiguous(), branch, _verdict(h, ZERO_GATE if zero_gate else ZERO_WEIGHT)
    step = P.LINEAR if planned(P) else library_linear
    return step(P, h, weight, bias, gate, residual, activation, zero_skip, save_branch)


def own_linear(P, own, h, weight, bias, gate, residual, activation, flag, save_branch, **config):
    """By the backend `own`; the flag, where there is one, stops its kernels."""
    a = h if activation is None else P.activation(h, activation, flag=flag)
    y, kept = own.linear_gate_residual(a.to(weight.dtype), weight, bias, gate, residual, flag, save_branch, **config)
    kept = y.new_empty(0, dtype=weight.dtype) if kept is None else kept
    return y, kept, _verdict(h, EXECUTED) if flag is None else flag


def library_linear(P, h, weight, bias, gate, residual, activation, zero_skip, save_branch):
    """By the library's GEMM."""
    a = h if activation is None else P.activation(h, activation)
    branch = P.linear(a.to(weight.dtype), weight, bias)
    none = branch.new_empty(0)
    if gate is None:
        return add_residual(residual, branch).contiguous(), none, _verdict(h, EXECUTED)
    if residual is None:
        y = modulation(gate) * branch
    else:
        y = P.gate_residual(residual, gate, branch)
    return y, branch if save_branch else none, _verdict(h, EXECUTED)


def linear_gate_residual_bwd(P, dy, h, weight, gate, branch, skipped, zero_skip, activation, has_bias, mask):
    """(dh, dweight, dbias, dgate); mask in that order."""
    verdict = _host_verdict(skipped, zero_skip)
    dgate, dbranch = None, dy
    if gate is not None:
        need_dbranch = verdict != ZERO_GATE and (mask[1] or mask[2] or (mask[0] and not verdict))
        dgate, dbranch = P.gate_residual_bwd(dy, gate, branch if mask[3] else dy, mask[3], need_dbranch)
    if verdict == ZERO_GATE:
        dh, dweight = (_zeros(t) if m else None for t, m in ((h, mask[0]), (weight, mask[1])))
        return dh, dweight, weight.new_zeros(weight.shape[0]) if mask[2] and has_bias else None, dgate
    dbranch = None if dbranch is None else dbranch.to(weight.dtype)
    dh = None
    if mask[0]:
        dh = _zeros(h) if verdict else linear_grads(P, dbranch, h, weight, False, [True, False, False])[0]
    a = h
    if activation is not None and mask[0] and not verdict:  # one read of h gives both
        dh, a = P.activation_bwd(dh.to(h.dtype), h, activation, mask[1])
    elif activation is not None and mask[1]:
        a = P.activation(h, activation)
    if not (mask[1] or mask[2]):
        return dh, None, None, dgate
    _, dweight, dbias = linear_grads(
        P, dbranch, a.to(weight.dtype) if mask[1] else h, weight, has_bias, [False, mask[1], mask[2]]
    )
    return dh, dweight, dbias, dgate
