"""The primitives on the native CPU kernels: settles layouts and dtypes, then calls the private C++ ops of
csrc/bindings.cpp.

Same names and signatures as `_plain.py`. Import this module only when the extension is loaded (see `_backends.py`).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .._layout import as_layout, channels_last_format
from .._operands import dense_view, gate_gradient, is_single, like, tokens, untokens
from ..reference import promoted
from ..steps.linear import LINEAR

NAME = "cpu"
_lib = torch.ops.zeroblock
_group_norm_silu = _lib._group_norm_silu.default
_group_norm_silu_bwd = _lib._group_norm_silu_bwd.default
_layer_norm_modulate = _lib._layer_norm_modulate.default
_layer_norm_modulate_bwd = _lib._layer_norm_modulate_bwd.default
_gate_residual = _lib._gate_residual.default
_gate_residual_bwd = _lib._gate_residual_bwd.default
_gate_norm = _lib._gate_residual_layer_norm_modulate.default
_gate_norm_bwd = _lib._gate_residual_layer_norm_modulate_bwd.default
_activation = _lib._activation.default
_activation_bwd = _lib._activation_bwd.default
_add_bias = _lib._add_bias.default
_add_bias_ = _lib._add_bias_.default
_is_zero = _lib._is_zero.default
# Called by _bare.py, which settles its arguments.
residual_if_zero = _lib._residual_if_zero.default
# Called by _winograd.py, which settles their arguments.
group_norm_statistics = _lib._group_norm_statistics.default
group_norm_affine = _lib._group_norm_affine.default
winograd_conv = _lib._winograd_conv.default
winograd_weight_grad = _lib._winograd_weight_grad.default
winograd_pack = _lib._winograd_pack.default

_ACTIVATION_IDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu):
    layout = channels_last_format(x)
    x = as_layout(x, layout)
    return _group_norm_silu(x, weight, bias, scale, shift, num_groups, eps, silu, layout is not None)


def group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu):
    layout = channels_last_format(x)
    x, dy = as_layout(x, layout), as_layout(dy if dy.dtype is x.dtype else dy.to(x.dtype), layout)
    return _group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, layout is not None)


def _operand(v: Tensor | None, x: Tensor) -> Tensor | None:
    """A per-token operand in the dtype of x with dense rows; per-sample ones are converted by the binding."""
    if v is None or v.dim() != 3:
        return v
    v = v.to(x.dtype)
    return v if v.stride(2) == 1 or v.shape[2] == 1 else v.contiguous()


def layer_norm_modulate(x, shift, scale, weight, bias, eps, rms):
    x = x.contiguous()
    y, mean, rstd = _layer_norm_modulate(x, _operand(shift, x), _operand(scale, x), weight, bias, eps, rms)
    return y, None if rms else mean, rstd


def layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, weight, bias, rms):
    x, dy = x.contiguous(), (dy if dy.dtype is x.dtype else dy.to(x.dtype)).contiguous()
    shift_op = shift if shift is None or shift.dim() == 2 else None
    grads = _layer_norm_modulate_bwd(dy, x, mean, rstd, shift_op, _operand(scale, x), weight, bias, rms)
    if shift_op is shift and (scale is None or grads[2].dtype is scale.dtype):
        return grads
    dx, dshift, dscale, dweight, dbias = grads
    return dx, dshift if shift_op is shift else like(dy.clone(), shift), like(dscale, scale), dweight, dbias


def gate_residual(residual, gate, branch):
    if (
        gate.dim() == 2
        and residual.dtype == branch.dtype == gate.dtype
        and residual.is_contiguous()
        and branch.is_contiguous()
    ):
        return _gate_residual(residual, gate, branch)
    dtype = promoted(residual, gate, branch)
    layout, single = channels_last_format(residual), is_single(gate)
    branch = tokens(branch.to(dtype), single, layout)
    y = _gate_residual(tokens(residual.to(dtype), single, layout), _operand(gate, branch), branch)
    return untokens(y, residual.shape, layout)


def gate_residual_bwd(dy, gate, branch, need_dgate, need_dbranch):
    if gate.dim() == 2 and dy.dtype == branch.dtype == gate.dtype and dy.is_contiguous() and branch.is_contiguous():
        return _gate_residual_bwd(dy, gate, branch, need_dgate, need_dbranch)
    layout, single = channels_last_format(branch), is_single(gate)
    flat, dy = tokens(branch.to(dy.dtype), single, layout), tokens(dy, single, layout)
    dgate, dbranch = _gate_residual_bwd(dy, _operand(gate, flat), flat, need_dgate, need_dbranch)
    return (
        gate_gradient(dgate, gate) if need_dgate else None,
        untokens(dbranch, branch.shape, layout).to(branch.dtype) if need_dbranch else None,
    )


def gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps):
    branch, residual = branch.contiguous(), residual.contiguous()
    return _gate_norm(residual, _row(gate, branch), branch, _operand(shift, branch), _operand(scale, branch), eps)


def gate_residual_layer_norm_modulate_bwd(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale):
    branch = branch.contiguous()
    grads = _gate_norm_bwd(
        None if dx_new is None else dx_new.contiguous(),
        dy.contiguous(),
        x_new,
        mean,
        rstd,
        _row(gate, branch),
        branch,
        _operand(shift, branch),
        _operand(scale, branch),
    )
    if gate.dim() == shift.dim() == scale.dim() == 2:
        return grads
    dresidual, dgate, dbranch, dshift, dscale = grads
    if is_single(gate):
        dgate = dgate.sum().view(1)
    dshift = dy.clone(memory_format=torch.contiguous_format) if shift.dim() == 3 else dshift
    return dresidual, gate_gradient(dgate, gate), dbranch, like(dshift, shift), like(dscale, scale)


def _row(gate: Tensor, x: Tensor) -> Tensor | None:
    """The combined kernel takes rows only: a single gate becomes one row."""
    return gate.expand(x.shape[-1]).contiguous() if gate.dim() == 1 else _operand(gate, x)


def add_bias(x, bias, dim):
    """x + (bias + 0) along `dim` (1 or -1), x dense in one of the two layouts; a bias of None adds 0."""
    return _add_bias(x, bias, dim == -1 or channels_last_format(x) is not None)


def add_bias_(x, bias, dim):
    """add_bias in place, and x."""
    _add_bias_(x, bias, dim == -1 or channels_last_format(x) is not None)
    return x


_this = sys.modules[__name__]


def linear(x, weight, bias, activation=None):
    """act(x @ weight.T + bias)"""
    return LINEAR(_this, x, weight, bias, activation)


def activation(x, name):
    return _activation(x.contiguous(), _ACTIVATION_IDS[name])


def activation_bwd(dy, x, name, need_y):
    dx, y = _activation_bwd(dy.contiguous(), x.contiguous(), _ACTIVATION_IDS[name], need_y)
    return dx, y


def is_zero(t: Tensor) -> bool:
    return _is_zero(t if t.is_contiguous() else dense_view(t))


def why_library(op, h, weight, gate, residual) -> str | None:
    return "the verdict is taken on the host"
