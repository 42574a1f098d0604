"""Of images [N, C, *S]: group norm with SiLU and FiLM, and convolutions with a residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks, ops, zero
from .. import reference as ref
from .._autocast import autocast
from .operands import needs_fp64

Padding = int | Sequence[int | Sequence[int]]


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
    per_frame: bool = False,
) -> Tensor:
    """y = act(group_norm(x) * (1 + scale) + shift), one pass, statistics in float32.

    Args:
        x: [N, C, *S], contiguous or channels-last (other layouts are copied); float32, bfloat16, float16
            (float64 by the reference).
        num_groups: divides C.
        weight, bias: [C], any floating dtype, or None.
        eps: >= 0, added to the variance.
        scale, shift: [N, C] (FiLM), any strides and floating dtype, or None.
        activation: "silu" or None.
        per_frame: statistics of each frame of [N, C, T, H, W], over H and W. On a GPU a contiguous x and its result
            are copied, a channels-last one is not.

    Returns y like x. Saved for backward: x, mean, rstd.
    Raises TypeError (kind, dtype), ValueError (shape, eps, group count, activation, device).
    Source: Wu & He 2018; FiLM as in openai/guided-diffusion `ResBlock`.

    >>> y = group_norm_silu(torch.randn(2, 64, 8, 8), 32)
    """
    op = "group_norm_silu"
    if is_compiling():
        mixed = _checks.mixed(x, weight, bias, scale, shift)
    else:
        mixed = _checks.floating(op, 1, x=x, weight=weight, bias=bias, scale=scale, shift=shift)
        _checks.images(op, x, num_groups, scale, shift, weight=weight, bias=bias)
        _checks.eps_value(op, eps)
    _checks.choice(op, "activation", activation, ("silu", None))
    if per_frame:
        _checks.video(op, x)
    if mixed and needs_fp64(x, weight, bias, scale, shift):
        wide = x.double()
        return group_norm_silu(
            wide, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation, per_frame=per_frame
        ).to(x.dtype)
    if zero.transforms_active():
        return ref.group_norm_silu(
            x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation, per_frame=per_frame
        )
    return ops.group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, activation == "silu", per_frame)[0]


def channel_rms_norm_silu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    eps_mode: str = "max",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """y = act((F.normalize(x, dim=1) * sqrt(C) * weight + bias) * (1 + scale) + shift), one pass, in float32.

    Args:
        x: [N, C, *S], contiguous or channels-last (other layouts are copied); float32, bfloat16, float16
            (float64 by the reference).
        weight, bias: [C], [C, 1, 1] or the like, any floating dtype, or None.
        eps: >= 0.
        eps_mode: "max", the divisor is max(norm, eps) as in F.normalize; or "inside", x / sqrt(mean(x^2) + eps).
        scale, shift: [N, C] (FiLM), any strides and floating dtype, or None.
        activation: "silu" or None.

    Returns y like x. Saved for backward: x, and one number per pixel.
    Raises TypeError (kind, dtype), ValueError (shape, eps, mode, activation, device).
    Source: the RMS norms of the autoencoders of Wan 2.1, Qwen-Image and HunyuanVideo 1.5 ("max") and LTX ("inside").

    >>> y = channel_rms_norm_silu(torch.randn(1, 96, 5, 8, 8), torch.ones(96, 1, 1, 1))
    """
    op = "channel_rms_norm_silu"
    traced = is_compiling()
    if traced:
        mixed = _checks.mixed(x, weight, bias, scale, shift)
    else:
        mixed = _checks.floating(op, 1, x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    weight, bias = _checks.channel_vector(weight), _checks.channel_vector(bias)
    if not traced:
        _checks.images(op, x, 1, scale, shift, weight=weight, bias=bias)
        _checks.eps_value(op, eps)
    _checks.choice(op, "eps_mode", eps_mode, ("max", "inside"))
    _checks.choice(op, "activation", activation, ("silu", None))
    if mixed and needs_fp64(x, weight, bias, scale, shift):
        wide = channel_rms_norm_silu(
            x.double(), weight, bias, eps=eps, eps_mode=eps_mode, scale=scale, shift=shift, activation=activation
        )
        return wide.to(x.dtype)
    if zero.transforms_active():
        return ref.channel_rms_norm_silu(
            x, weight, bias, eps=eps, eps_mode=eps_mode, scale=scale, shift=shift, activation=activation
        )
    return ops.channel_rms_norm_silu(x, weight, bias, eps, eps_mode == "inside", scale, shift, activation == "silu")[0]


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
    padding: Padding = 1,
    padding_mode: str | Sequence[str] = "zeros",
    dropout_p: float = 0.0,
    training: bool = False,
    zero_skip: str = "auto",
    keep: Tensor | None = None,
) -> Tensor:
    """y = residual + conv(dropout(silu(group_norm(x) * (1 + scale) + shift))), half a U-Net ResBlock; stride 1.

    Args:
        x: [N, C, *S] in 1 to 3 dimensions of space.
        num_groups: divides C.
        norm_weight, norm_bias: [C] or None.
        weight: [Cout, C, *K], of the dtype of bias.
        bias: [Cout] or None.
        residual: [N, Cout, *S'] or None (0).
        eps: >= 0, the norm's.
        scale, shift: [N, C] (FiLM) or None.
        padding: one number or one per dimension: of zeros on both sides, or a pair (front, back).
        padding_mode: "zeros" or "replicate" (repeats the edge), or one per dimension. ((2, 0), 1, 1) is causal in time.
        dropout_p, training: as of F.dropout.
        zero_skip: "auto", "sync" or "never": how the weight is tested for zero (zeroblock/zero.py).
        keep: bool, like x: dropout's mask, if it was drawn before.

    Returns y in the dtype and memory format eager gives (residual and weight promoted). The convolution is not executed
    while weight is exactly zero. Saved for backward: x, mean, rstd and the mask; the activated tensor is recomputed.
    What padding copies: `conv_residual`. Video in pieces takes that function, with group_norm_silu before it.
    Raises TypeError (kind, dtype), ValueError (shape, value, device), RuntimeError ("sync" during CUDA-graph capture).
    Source: openai/guided-diffusion `ResBlock.in_layers`, `out_layers`.
    """
    op = "group_norm_silu_conv_residual"
    given, traced = weight, is_compiling()
    if traced:
        mixed = _checks.mixed(x, norm_weight, norm_bias, scale, shift)
        pad = _checks.traced_padding(op, x, weight, bias, residual, padding, padding_mode)
    else:
        mixed = _checks.floating(
            op,
            2,
            x=x,
            weight=weight,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            bias=bias,
            residual=residual,
            scale=scale,
            shift=shift,
        )
        _checks.images(op, x, num_groups, scale, shift, norm_weight=norm_weight, norm_bias=norm_bias)
        _checks.eps_value(op, eps)
        _checks.probability(op, dropout_p)
        pad = _checks.convolution(op, x, weight, bias, residual, padding, padding_mode)
    weight, bias = autocast(weight, bias)
    if not traced:
        _checks.same_dtype(op, weight=weight, bias=bias)
    if keep is not None:
        _checks.same_shape(op, "keep", keep, "x", x.shape)
    elif training:
        keep = ref.draw_keep(x, dropout_p, True)
    if mixed and needs_fp64(x, norm_weight, norm_bias, scale, shift):
        x = x.double()
    if zero.transforms_active():
        return ref.group_norm_silu_conv_residual(
            x, num_groups, norm_weight, norm_bias, weight, bias, residual, eps=eps, scale=scale, shift=shift, keep=keep,
            dropout_p=dropout_p, padding=pad,
        )  # fmt: skip
    skip = zero.test_of(op, zero_skip, weight, given)
    norm = num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p
    return ops.group_norm_silu_conv_residual(x, *norm, weight, bias, residual, pad, skip)[0]


def conv_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    padding: Padding = 1,
    padding_mode: str | Sequence[str] = "zeros",
    conv_cache: Tensor | None = None,
    zero_skip: str = "auto",
) -> Tensor:
    """y = residual + conv(h), stride 1; without the convolution while `weight` is exactly zero.

    Args:
        h: [N, Cin, *S] in 1 to 3 dimensions of space.
        weight: [Cout, Cin, *K]; h, weight and bias have one dtype.
        bias: [Cout] or None.
        residual: [N, Cout, *S'] or None (0).
        padding: one number or one per dimension: of zeros on both sides, or a pair (front, back).
        padding_mode: "zeros" or "replicate" (repeats the edge), or one per dimension. ((2, 0), 1, 1) is causal in time.
        conv_cache: [N, Cin, F, *S[1:]] or None: the F frames that came before h, for video that comes in pieces. They
            take the place of F frames of the padding in front. For the next piece: the last frames of cache and h.
        zero_skip: "auto", "sync" or "never": how the weight is tested for zero (zeroblock/zero.py).

    Returns y in the promoted dtype of residual and weight, in eager's memory format. Saved for backward: h, weight.
    Padding copies h where it is not zeros of one width on both sides, but not in the first of three dimensions: frames
    at its edges are convolved with the taps that reach any. A conv_cache and h are copied into one tensor.
    Raises TypeError (kind, dtype), ValueError (shape, value, device), RuntimeError ("sync" during CUDA-graph capture).
    Source: `zero_module` convolutions of openai/guided-diffusion and lllyasviel/ControlNet.
    """
    op = "conv_residual"
    given, traced = weight, is_compiling()
    if not traced:
        _checks.floating(op, 2, h=h, weight=weight, bias=bias, residual=residual)
        if h.dim() < 3:
            raise _checks.fail(op, "h", "have shape [N, Cin, *S]", list(h.shape))
    if conv_cache is not None:
        h, padding = _with_cache(op, h, conv_cache, padding, weight.dim() - 2)
    check = _checks.traced_padding if traced else _checks.convolution
    pad = check(op, h, weight, bias, residual, padding, padding_mode)
    weight, bias, h = autocast(weight, bias, h)
    if not traced:
        _checks.same_dtype(op, h=h, weight=weight, bias=bias)
    if zero.transforms_active():
        return ref.conv_residual(h, weight, bias, residual, padding=pad)
    return ops.conv_residual(h, weight, bias, residual, pad, zero.test_of(op, zero_skip, weight, given))[0]


def _with_cache(op: str, h: Tensor, cache: Tensor, padding: Any, dims: int) -> tuple[Tensor, Any]:
    """The cached frames and h in one tensor, and the padding that is left."""
    _checks.floating(op, 2, h=h, conv_cache=cache)
    size = (*h.shape[:2], cache.shape[2] if cache.dim() == h.dim() else 0, *h.shape[3:])
    _checks.shapes(op, size, "[N, Cin, F, *S[1:]]", conv_cache=cache)
    sides = [padding] * dims if isinstance(padding, int) else padding
    if not isinstance(sides, (list, tuple)) or len(sides) != dims:
        return h, padding  # which is refused
    time, *space = sides
    front, back = (time, time) if isinstance(time, int) else time
    if size[2] > front:
        raise _checks.fail(op, "conv_cache", f"have at most as many frames as the padding in front, {front}", size[2])
    return torch.cat([cache.to(h.dtype), h], 2), ((front - size[2], back), *space)
