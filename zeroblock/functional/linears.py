"""Of tokens [B, T, D]: a linear layer after a modulated norm, and before a gated residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from .. import _checks, ops, zero
from .. import reference as ref
from .._autocast import autocast
from . import operands
from .general import NORMS, Gated, Modulated, check_gated, residual_norm


def layer_norm_modulate_linear(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """y = linear(layer_norm(x) * (1 + scale) + shift); the modulated tensor is recomputed in backward.

    Args:
        x: [B, T, D].
        shift, scale: as for layer_norm_modulate.
        weight: [O, D], of the dtype of bias.
        bias: [O] or None.
        eps: >= 0, added to the variance.
        shift_table, scale_table, index: as for layer_norm_modulate.

    Returns y [B, T, O] in the dtype of weight. Saved for backward: x, mean, rstd.
    Raises TypeError (kind, dtype), ValueError (shape, eps, device).
    Source: facebookresearch/DiT `DiTBlock` (qkv, fc1).
    """
    op = "layer_norm_modulate_linear"
    traced = is_compiling()
    if traced:
        mixed = _checks.mixed(x, shift, scale)
    else:
        mixed = _checks.floating(op, 2, x=x, weight=weight, shift=shift, scale=scale, bias=bias)
        _checks.tokens(op, "x", x)
        _checks.eps_value(op, eps)
        _checks.linear(op, x.shape[2], weight, bias)
    taken = None
    if shift_table is scale_table is index is None:
        taken = operands.modulated(op, x, shift, scale)
    weight, bias = autocast(weight, bias)
    if not traced:
        _checks.same_dtype(op, weight=weight, bias=bias)
    if taken is None:
        a = Modulated(NORMS["layer"], None, None, shift, scale, shift_table, scale_table, eps, weight.dtype)
        mixed = _checks.floating(op, 1, x=x, **a.tensors())
        return _recomputed(lambda: F.linear(residual_norm(op, x, None, a, index, mixed)[1], weight, bias))
    x, shift, scale = taken
    if mixed and operands.needs_fp64(x, shift, scale):
        x = x.double()
    if zero.transforms_active():
        return ref.layer_norm_modulate_linear(x, shift, scale, weight, bias, eps=eps)
    return ops.layer_norm_modulate_linear(x, shift, scale, weight, bias, eps)[0]


def _recomputed(call: Callable[[], Tensor]) -> Tensor:
    """call() with its intermediate tensor computed again in backward; the linear is not."""
    if not torch.is_grad_enabled() or is_compiling() or zero.transforms_active():
        return call()
    result: Tensor = checkpoint(call, use_reentrant=False, preserve_rng_state=False)
    return result


def linear_gate_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    *,
    activation: str | None = None,
    zero_skip: str = "auto",
    gate_table: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """y = residual + gate * linear(act(h)); without the linear while `weight` (or a frozen gate) is exactly zero.

    Args:
        h: [B, T, K]; h, weight and bias have one dtype.
        weight: [D, K].
        bias: [D] or None.
        gate: [1], [D], [B, D] or [B, F, D] where F divides T, B of which may be 1, or None (1).
        residual: [B, T, D] or None (0). A batch of 1, of h too, is expanded.
        activation: None, "silu", "gelu" (erf) or "gelu_tanh".
        zero_skip: "auto", "sync" or "never": how the weight is tested for zero (zeroblock/zero.py).
        gate_table, index: as for gate_residual.

    Returns y in the promoted dtype of residual and weight, contiguous, also of a transposed residual. Saved for
    backward: h before the activation, and the linear's output when the gate wants a gradient.
    Raises TypeError (kind, dtype), ValueError (shape, value, device), RuntimeError ("sync" during CUDA-graph capture).
    Source: facebookresearch/DiT `DiTBlock` (proj, fc2).
    """
    op = "linear_gate_residual"
    traced = is_compiling()
    if traced:
        mixed = _checks.mixed(weight, gate, residual)
    else:
        mixed = _checks.floating(op, 2, h=h, weight=weight, bias=bias, gate=gate, residual=residual)
        _checks.tokens(op, "h", h)
        _checks.linear(op, h.shape[2], weight, bias)
    _checks.choice(op, "activation", activation, _checks.ACTIVATIONS)
    plain = gate_table is index is None and not (mixed and operands.needs_fp64(weight, gate, residual))
    if not plain or (gate is not None and gate.dim() == 3 and operands.has_frames(h.shape[1], gate)):
        branch = linear_gate_residual(h, weight, bias, None, None, activation=activation, zero_skip=zero_skip)
        onto = branch.new_zeros(()).expand(branch.shape) if residual is None else residual
        gated = Gated(branch, gate, gate_table)
        return residual_norm(op, onto, gated, None, index, check_gated(op, onto, gated))[0]
    h, gate, residual = operands.around_linear(op, h, weight.shape[0], gate, residual)
    given = weight
    weight, bias, h = autocast(weight, bias, h)
    if not traced:
        _checks.same_dtype(op, h=h, weight=weight, bias=bias)
    if zero.transforms_active():
        return ref.linear_gate_residual(h, weight, bias, gate, residual, activation=activation)
    skip = zero.test_of(op, zero_skip, weight, given)
    save_branch = gate is not None and gate.requires_grad and torch.is_grad_enabled()
    return ops.linear_gate_residual(h, weight, bias, gate, residual, activation, skip, save_branch)[0]
