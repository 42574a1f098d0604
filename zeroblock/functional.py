"""The public functions: check the arguments, apply the autocast policy, call the op.

Autocast: activations and the weights of convolutions and linears go to the autocast dtype where eager would send them;
norm parameters and residuals stay as they are; statistics are fp32. The result has the dtype eager gives.
Under torch.func transforms and forward-mode AD every function is its definition in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, ops, zero
from . import reference as ref
from ._autocast import autocast


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """y = act(group_norm(x) * (1 + scale) + shift), one pass, statistics in fp32.

    Args: x [N, C, *S], contiguous or channels-last (other layouts are copied); weight, bias [C]; scale, shift [N, C]
    (FiLM), any strides; activation "silu" or None. dtypes float32, bfloat16, float16; float64 by the reference.
    Returns y like x. Raises ValueError or TypeError on a wrong shape, dtype, device, eps or group count.
    Saved for backward: x, mean, rstd. Source: Wu & He 2018; FiLM as in openai/guided-diffusion `ResBlock`.

    >>> y = group_norm_silu(torch.randn(2, 64, 8, 8), 32)
    """
    op = "group_norm_silu"
    _checks.floating(op, 1, x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    _checks.images(op, x, num_groups, scale, shift, weight=weight, bias=bias)
    _checks.eps_value(op, eps)
    _checks.choice(op, "activation", activation, ("silu", None))
    if zero.transforms_active():
        return ref.group_norm_silu(x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation)
    return ops.group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, activation == "silu")[0]


def group_norm_silu_conv_residual(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    padding: int | Sequence[int] = 1,
    dropout_p: float = 0.0,
    training: bool = False,
    zero_skip: str = "auto",
    keep: Tensor | None = None,
) -> Tensor:
    """y = residual + conv(dropout(silu(group_norm(x) * (1 + scale) + shift))): half a U-Net ResBlock.

    Args: x [N, C, *S]; norm_weight, norm_bias [C]; weight [Cout, C, *K], stride 1; bias [Cout]; residual [N, Cout,
    *S']; scale, shift [N, C]; dropout as F.dropout, or its mask given as `keep` (bool, like x). zero_skip: see
    zero.py.
    Returns y in the dtype eager gives (residual and weight promoted). Raises ValueError or TypeError.
    Saved for backward: x, mean, rstd and the mask; the activated tensor is recomputed.
    Source: openai/guided-diffusion `ResBlock.in_layers`, `out_layers`.
    """
    op = "group_norm_silu_conv_residual"
    _checks.floating(
        op, 2, x=x, weight=weight, norm_weight=norm_weight, norm_bias=norm_bias, bias=bias, residual=residual,
        scale=scale, shift=shift,
    )  # fmt: skip
    _checks.images(op, x, num_groups, scale, shift, norm_weight=norm_weight, norm_bias=norm_bias)
    _checks.eps_value(op, eps)
    _checks.probability(op, dropout_p)
    pad = _checks.convolution(op, x.shape[1], x, weight, bias, residual, padding)
    weight, bias = autocast(weight, bias)
    _checks.same_dtype(op, weight=weight, bias=bias)
    if keep is None:
        keep = ref.draw_keep(x, dropout_p, training)
    else:
        _checks.same_shape(op, "keep", keep, "x", x.shape)
    if zero.transforms_active():
        return ref.group_norm_silu_conv_residual(
            x, num_groups, norm_weight, norm_bias, weight, bias, residual, eps=eps, scale=scale, shift=shift, keep=keep,
            dropout_p=dropout_p, padding=pad,
        )  # fmt: skip
    skip = zero.test_of(op, zero_skip, weight)
    norm = num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p
    return ops.group_norm_silu_conv_residual(x, *norm, weight, bias, residual, pad, skip)[0]


def conv_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    padding: int | Sequence[int] = 1,
    zero_skip: str = "auto",
) -> Tensor:
    """y = residual + conv(h), stride 1; without the convolution while `weight` is exactly zero.

    Args: h [N, Cin, *S], weight [Cout, Cin, *K], bias [Cout], residual [N, Cout, *S'] or None (0), in 1 to 3
    dimensions.
    Returns y in the promoted dtype of residual and weight. Raises ValueError or TypeError.
    Source: `zero_module` convolutions of openai/guided-diffusion and lllyasviel/ControlNet.
    """
    op = "conv_residual"
    _checks.floating(op, 2, h=h, weight=weight, bias=bias, residual=residual)
    if h.dim() < 3:
        raise _checks.fail(op, "h", "have shape [N, Cin, *S]", list(h.shape))
    pad = _checks.convolution(op, h.shape[1], h, weight, bias, residual, padding)
    weight, bias, h = autocast(weight, bias, h)
    _checks.same_dtype(op, h=h, weight=weight, bias=bias)
    if zero.transforms_active():
        return ref.conv_residual(h, weight, bias, residual, padding=pad)
    return ops.conv_residual(h, weight, bias, residual, pad, zero.test_of(op, zero_skip, weight))[0]


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

    Args: x [B, T, D]; shift, scale [B, D] (broadcast over T; views of a chunked tensor need no copy) or [B, T, D];
    weight, bias [D]. Returns y like x. Raises ValueError or TypeError. Saved for backward: x, mean, rstd.
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

    Arguments, results and errors as in `layer_norm_modulate`, without a mean and a bias. Saved for backward: x, rstd.
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

    Args: residual and branch of one shape; gate [1], or, for [B, T, D], also [D], [B, D] (broadcast over T) or [B, T,
    D].
    Returns y in their promoted dtype. Raises ValueError or TypeError.
    Saved for backward: gate and branch. Source: facebookresearch/DiT `DiTBlock`; ReZero, Bachlechner et al. 2021.
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

    Args: residual, branch [B, T, D] of one dtype; gate as in `gate_residual`; shift, scale as in `layer_norm_modulate`.
    Returns (x_new, modulated). Raises ValueError or TypeError. Saved for backward: x_new, branch, mean, rstd.
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
    """y = linear(layer_norm(x) * (1 + scale) + shift); saves x, recomputes the modulated tensor in backward.

    Args: x, shift, scale as in `layer_norm_modulate`; weight [O, D], bias [O]. Returns y [B, T, O] in the dtype of
    weight. Raises ValueError or TypeError. Source: facebookresearch/DiT `DiTBlock` (qkv, fc1).
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

    Args: h [B, T, K]; weight [D, K]; bias [D]; gate as in `gate_residual`, or None (1); residual [B, T, D] or None (0);
    activation None, "silu", "gelu" (erf) or "gelu_tanh". Returns y in the promoted dtype of residual and weight.
    Raises ValueError or TypeError. Saved for backward: h before the activation, and the linear's output when the gate
    wants a gradient. Source: facebookresearch/DiT `DiTBlock` (proj, fc2).
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


def is_zero(*tensors: Tensor) -> Tensor:
    """Which tensors consist of +0 and -0 alone: bool [len(tensors)] on their device, without a host sync.

    Judged on the bits: denormals and NaN are not zero, whatever the flush-denormal mode. float32, float64, bfloat16,
    float16, all on one device. Raises TypeError or ValueError.

    >>> is_zero(torch.zeros(3), torch.ones(3)).tolist()
    [True, False]
    """
    named = {f"tensors[{i}]": t for i, t in enumerate(tensors)}
    _checks.floating("is_zero", len(tensors), **named)
    return ops.is_zero(list(tensors))
