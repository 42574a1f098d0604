"""Of tokens [B, T, D]: modulated norms, gates, and both with a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, ops, zero
from .. import reference as ref
from .._autocast import autocast


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = layer_norm(x) * (1 + scale) + shift, the adaLN of DiT blocks.

    Args:
        x: [B, T, D]; float32, bfloat16, float16 (float64 by the reference).
        shift, scale: [B, D] (broadcast over T; views of a chunked tensor need no copy) or [B, T, D], or None.
        eps: >= 0, added to the variance.
        weight, bias: [D] or None.

    Returns y like x. Saved for backward: x, mean, rstd.
    Raises TypeError (kind, dtype), ValueError (shape, eps, device).
    Source: Peebles & Xie 2023, facebookresearch/DiT `modulate`.

    >>> y = layer_norm_modulate(torch.randn(2, 16, 64), torch.randn(2, 64), torch.randn(2, 64))
    """
    op = "layer_norm_modulate"
    _checks.floating(op, 1, x=x, shift=shift, scale=scale, weight=weight, bias=bias)
    _checks.modulated(op, x, shift, scale, eps)
    _checks.shapes(op, (x.shape[2],), "[D]", weight=weight, bias=bias)
    if zero.transforms_active():
        return ref.layer_norm_modulate(x, shift, scale, eps=eps, weight=weight, bias=bias)
    return ops.layer_norm_modulate(x, shift, scale, weight, bias, eps)[0]


def rms_norm_modulate(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, *, eps: float = 1e-6, weight: Tensor | None = None
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) [* weight] * (1 + scale) + shift.

    Args:
        x: [B, T, D]; float32, bfloat16, float16 (float64 by the reference).
        shift, scale: [B, D] or [B, T, D], or None.
        eps: >= 0, added to the mean square.
        weight: [D] or None.

    Returns y like x. Saved for backward: x, rstd.
    Raises TypeError (kind, dtype), ValueError (shape, eps, device).
    Source: Zhang & Sennrich 2019.
    """
    op = "rms_norm_modulate"
    _checks.floating(op, 1, x=x, shift=shift, scale=scale, weight=weight)
    _checks.modulated(op, x, shift, scale, eps)
    _checks.shapes(op, (x.shape[2],), "[D]", weight=weight)
    if zero.transforms_active():
        return ref.rms_norm_modulate(x, shift, scale, eps=eps, weight=weight)
    return ops.rms_norm_modulate(x, shift, scale, weight, eps)[0]


def gate_residual(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """y = residual + gate * branch, rounded once.

    Args:
        residual, branch: of one shape, any floating dtype.
        gate: [1]; for residual [B, T, D] also [D], [B, D] (broadcast over T) or [B, T, D].

    Returns y in their promoted dtype; tokens are contiguous, also of a transposed residual. Saved for backward: gate
    and branch.
    Raises TypeError (kind, dtype), ValueError (shape, device).
    Source: facebookresearch/DiT `DiTBlock`; ReZero, Bachlechner et al. 2021.
    """
    op = "gate_residual"
    _checks.floating(op, 3, residual=residual, gate=gate, branch=branch)
    _checks.same_shape(op, "branch", branch, "residual", residual.shape)
    _checks.gate(op, gate, branch.shape)
    if zero.transforms_active():
        return ref.gate_residual(residual, gate, branch)
    return ops.gate_residual(residual, gate, branch)


def gate_residual_layer_norm_modulate(
    residual: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x_new = residual + gate * branch and layer_norm(x_new) * (1 + scale) + shift, in one pass.

    Args:
        residual, branch: [B, T, D], brought to one dtype.
        gate: [1], [D], [B, D] or [B, T, D].
        shift, scale: [B, D] or [B, T, D].
        eps: >= 0, added to the variance.

    Returns (x_new, modulated), contiguous. Saved for backward: x_new, branch, mean, rstd.
    Raises TypeError (kind, dtype), ValueError (shape, eps, device).
    Source: the seam between attention and MLP in facebookresearch/DiT `DiTBlock`.
    """
    op = "gate_residual_layer_norm_modulate"
    _checks.floating(op, 5, residual=residual, gate=gate, branch=branch, shift=shift, scale=scale)
    _checks.tokens(op, "branch", branch)
    _checks.same_shape(op, "residual", residual, "branch", branch.shape)
    _checks.gate(op, gate, branch.shape)
    _checks.modulation(op, branch, shift=shift, scale=scale)
    _checks.eps_value(op, eps)
    if zero.transforms_active():
        return ref.gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps=eps)
    if not residual.dtype == branch.dtype == gate.dtype:
        dtype = ref.promoted(residual, gate, branch)
        residual, branch = residual.to(dtype), branch.to(dtype)
    return ops.gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps)[:2]


def layer_norm_modulate_linear(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """y = linear(layer_norm(x) * (1 + scale) + shift); the modulated tensor is recomputed in backward.

    Args:
        x: [B, T, D].
        shift, scale: [B, D] or [B, T, D], or None.
        weight: [O, D], of the dtype of bias.
        bias: [O] or None.
        eps: >= 0, added to the variance.

    Returns y [B, T, O] in the dtype of weight. Saved for backward: x, mean, rstd.
    Raises TypeError (kind, dtype), ValueError (shape, eps, device).
    Source: facebookresearch/DiT `DiTBlock` (qkv, fc1).
    """
    op = "layer_norm_modulate_linear"
    _checks.floating(op, 2, x=x, weight=weight, shift=shift, scale=scale, bias=bias)
    _checks.modulated(op, x, shift, scale, eps)
    _checks.linear(op, x.shape[2], weight, bias)
    weight, bias = autocast(weight, bias)
    _checks.same_dtype(op, weight=weight, bias=bias)
    if zero.transforms_active():
        return ref.layer_norm_modulate_linear(x, shift, scale, weight, bias, eps=eps)
    return ops.layer_norm_modulate_linear(x, shift, scale, weight, bias, eps)[0]


def linear_gate_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    *,
    activation: str | None = None,
    zero_skip: str = "auto",
) -> Tensor:
    """y = residual + gate * linear(act(h)); without the linear while `weight` (or a frozen gate) is exactly zero.

    Args:
        h: [B, T, K]; h, weight and bias have one dtype.
        weight: [D, K].
        bias: [D] or None.
        gate: [1], [D], [B, D] or [B, T, D], or None (1).
        residual: [B, T, D] or None (0).
        activation: None, "silu", "gelu" (erf) or "gelu_tanh".
        zero_skip: "auto", "sync" or "never": how the weight is tested for zero (zeroblock/zero.py).

    Returns y in the promoted dtype of residual and weight, contiguous, also of a transposed residual. Saved for
    backward: h before the activation, and the linear's output when the gate wants a gradient.
    Raises TypeError (kind, dtype), ValueError (shape, value, device), RuntimeError ("sync" during CUDA-graph capture).
    Source: facebookresearch/DiT `DiTBlock` (proj, fc2).
    """
    op = "linear_gate_residual"
    _checks.floating(op, 2, h=h, weight=weight, bias=bias, gate=gate, residual=residual)
    _checks.tokens(op, "h", h)
    _checks.linear(op, h.shape[2], weight, bias)
    _checks.choice(op, "activation", activation, _checks.ACTIVATIONS)
    size = (h.shape[0], h.shape[1], weight.shape[0])
    if residual is not None:
        _checks.same_shape(op, "residual", residual, "the output", size)
    if gate is not None:
        _checks.gate(op, gate, size)
    weight, bias, h = autocast(weight, bias, h)
    _checks.same_dtype(op, h=h, weight=weight, bias=bias)
    if zero.transforms_active():
        return ref.linear_gate_residual(h, weight, bias, gate, residual, activation=activation)
    skip = zero.test_of(op, zero_skip, weight)
    save_branch = gate is not None and gate.requires_grad and torch.is_grad_enabled()
    return ops.linear_gate_residual(h, weight, bias, gate, residual, activation, skip, save_branch)[0]
