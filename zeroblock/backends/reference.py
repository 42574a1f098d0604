"""The primitives in plain PyTorch: forward by reference.py, backward by explicit formulas, any device and dtype.

A primitives module (this one, `_cpu`) holds the memory-bound kernels under fixed names and signatures; everything
else is composed from them in `_compose.py`. Results that do not apply are None.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference as ref
from .._layout import as_layout, channels_last_format
from ..reference import channel_view, compute_dtype, modulation

NAME = "reference"


def _dense(y: Tensor, like: Tensor) -> Tensor:
    """y in the format in which the ops return results for `like`."""
    return as_layout(y, channels_last_format(like))


def group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu):
    mean, rstd = ref.group_moments(x, num_groups, eps)
    activation = "silu" if silu else None
    y = ref.group_norm_silu(x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation)
    return _dense(y, x), mean, rstd


def group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu):
    """dz = dy * silu'(z); with g = weight * (1 + scale): dx = rstd * (g dz - mean(g dz) - xhat * mean(g dz xhat))."""
    wide = compute_dtype(x)
    N, C = x.shape[:2]
    flat = (N, C, math.prod(x.shape[2:]))
    grouped = (N, num_groups, C // num_groups * flat[2])
    xhat = ((x.reshape(grouped).to(wide) - mean[:, :, None]) * rstd[:, :, None]).reshape(flat)
    w = torch.ones(C, dtype=wide, device=x.device) if weight is None else weight.to(wide)
    b = torch.zeros(C, dtype=wide, device=x.device) if bias is None else bias.to(wide)
    gain = 1 + scale.to(wide) if scale is not None else torch.ones(N, C, dtype=wide, device=x.device)
    normed = xhat * w[None, :, None] + b[None, :, None]
    dz = dy.reshape(flat).to(wide)
    if silu:
        z = normed * gain[:, :, None] + (0 if shift is None else shift.to(wide)[:, :, None])
        s = z.sigmoid()
        dz = dz * (s * (1 + z * (1 - s)))
    dz_sum, dz_xhat = dz.sum(2), (dz * xhat).sum(2)  # [N, C]
    g = (dz * (w * gain)[:, :, None]).reshape(grouped)
    xhat = xhat.reshape(grouped)
    dx = rstd[:, :, None] * (g - g.mean(2, keepdim=True) - xhat * (g * xhat).mean(2, keepdim=True))
    return (
        _dense(dx.reshape(x.shape).to(x.dtype), x),
        None if weight is None else (gain * dz_xhat).sum(0).to(weight.dtype),
        None if bias is None else (gain * dz_sum).sum(0).to(bias.dtype),
        None if scale is None else (dz * normed).sum(2).to(scale.dtype),
        None if shift is None else dz_sum.to(shift.dtype),
    )


def layer_norm_modulate(x, shift, scale, weight, bias, eps, rms):
    if rms:
        rstd = (x.to(compute_dtype(x)).square().mean(dim=-1) + eps).rsqrt()
        return ref.rms_norm_modulate(x, shift, scale, eps=eps, weight=weight).contiguous(), None, rstd
    mean, rstd = ref.row_moments(x, eps)
    y = ref.layer_norm_modulate(x, shift, scale, eps=eps, weight=weight, bias=bias)
    return y.contiguous(), mean, rstd


def _sum_to(grad: Tensor, operand: Tensor | None) -> Tensor | None:
    """A full [B, T, D] gradient reduced to the shape and dtype of its operand."""
    if operand is None:
        return None
    if operand.dim() == 2:
        grad = grad.sum(1)
    elif operand.dim() == 1:
        grad = grad.flatten(0, -2).sum(0) if operand.numel() > 1 else grad.sum().reshape(1)
    return grad.to(operand.dtype, copy=grad.dim() == 3).reshape(operand.shape).contiguous()


def _normalised(x, mean, rstd):
    wide = x.to(rstd.dtype)
    return (wide if mean is None else wide - mean[..., None]) * rstd[..., None]


def layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, weight, bias, rms):
    """dx = rstd * (g - mean(g) - xhat * mean(g xhat)) with g the gradient of xhat; rms has no mean(g) term."""
    xhat = _normalised(x, mean, rstd)
    affine = xhat if weight is None else xhat * weight.to(xhat.dtype)
    if bias is not None:
        affine = affine + bias.to(xhat.dtype)
    dy = dy.to(xhat.dtype)
    da = dy if scale is None else dy * (1 + modulation(scale).to(xhat.dtype))
    g = da if weight is None else da * weight.to(xhat.dtype)
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if not rms:
        dx = dx - g.mean(-1, keepdim=True)
    return (
        (rstd[..., None] * dx).to(x.dtype).contiguous(),
        _sum_to(dy, shift),
        _sum_to(dy * affine, scale),
        None if weight is None else _sum_to(da * xhat, weight),
        None if bias is None else _sum_to(da, bias),
    )


def gate_residual(residual, gate, branch):
    return _dense(ref.gate_residual(residual, gate, branch), residual)


def gate_residual_bwd(dy, gate, branch, need_dgate, need_dbranch):
    wide = torch.promote_types(dy.dtype, torch.float32)
    dy = dy.to(wide)
    dgate = _sum_to(dy * branch.to(wide), gate) if need_dgate else None
    return dgate, _dense((dy * modulation(gate).to(wide)).to(branch.dtype), branch) if need_dbranch else None


def gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps):
    x_new = ref.gate_residual(residual, gate, branch).contiguous()
    return x_new, *layer_norm_modulate(x_new, shift, scale, None, None, eps, False)


def gate_residual_layer_norm_modulate_bwd(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale):
    dx, dshift, dscale, _, _ = layer_norm_modulate_bwd(dy, x_new, mean, rstd, shift, scale, None, None, False)
    dresidual = dx if dx_new is None else dx + dx_new
    dgate, dbranch = gate_residual_bwd(dresidual, gate, branch, True, True)
    return dresidual.contiguous(), dgate, dbranch, dshift, dscale


def add_bias(x, bias, dim):
    # Zero products are +0: a bias of -0 comes out of the layer as +0.
    return x + (0.0 if bias is None else bias + 0.0 if dim == -1 else channel_view(bias + 0.0, x.dim()))


def linear(x, weight, bias, activation=None):
    """act(x @ weight.T + bias)"""
    y = F.linear(x, weight, bias)
    return y if activation is None else ref.apply_activation(y, activation)


def activation(x, name):
    return ref.apply_activation(x, name)


def activation_bwd(dy, x, name, need_y):
    y = ref.apply_activation(x, name) if need_y else None
    if name == "silu":
        return torch.ops.aten.silu_backward(dy, x), y
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh" if name == "gelu_tanh" else "none"), y


def is_zero(t: Tensor) -> bool:
    """Reads the answer back to the host."""
    return bool(ref.is_zero(t)[0])


def why_library(op, h, weight, gate, residual, padding) -> str | None:
    """Why the GEMM of an op is the library's, which no flag on the device stops; None: an own one runs."""
    return "the reference has no kernels of its own"
