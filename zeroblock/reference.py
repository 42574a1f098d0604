"""Every op of zeroblock in plain PyTorch: the specification, the fp64 oracle, and the path where no kernel runs.

These functions work for any floating dtype, device and layout, are differentiable to any order, and hold under
torch.func transforms, forward-mode AD, torch.compile and export. Norms compute in fp32 (fp64 for fp64 input) and
round once, at the end; shapes are written `[N, C, *S]` (images, any number of dimensions) and `[B, T, D]` (tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtypes import INTEGERS, cast
from ._dtypes import promoted as promoted
from ._padding import padded

Padding = int | Sequence[int]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and accumulation: fp64 for fp64 input, fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def channel_view(v: Tensor, ndim: int) -> Tensor:
    """[C] or [N, C] shaped to broadcast against [N, C, *S] of `ndim` dimensions."""
    return v.reshape(*(v.shape if v.dim() == 2 else (1, *v.shape)), *([1] * (ndim - 2)))


def by_group(x: Tensor, num_groups: int) -> Tensor:
    """[N, C, *S] as [N, G, C / G * S]; nothing is left to be inferred, the batch may be empty."""
    return x.reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)


def _rstd(variance: Tensor, eps: float) -> Tensor:
    """1 / sqrt(variance + eps); NaN for a variance beyond the dtype's range, where 0 would hide it."""
    return (variance + 0.0 * variance + eps).rsqrt()


def group_moments(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and 1/sqrt(var + eps) of each group of each sample, [N, G]; the mean first, then the centred squares."""
    grouped = by_group(x, num_groups).to(compute_dtype(x))
    mean = grouped.mean(dim=2)
    # The mean of what is left corrects the rounding of the first one where |mean| is far above the deviation.
    mean = mean + (grouped - mean[:, :, None]).mean(dim=2)
    return mean, _rstd((grouped - mean[:, :, None]).square().mean(dim=2), eps)


def row_moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """mean and 1/sqrt(var + eps) of each row of [..., D]."""
    mean, rstd = _kept_moments(x, eps)
    return mean.squeeze(-1), rstd.squeeze(-1)


def _kept_moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = cast(x, compute_dtype(x))
    mean = x.mean(dim=-1, keepdim=True)
    mean = mean + (x - mean).mean(dim=-1, keepdim=True)
    return mean, _rstd((x - mean).square().mean(dim=-1, keepdim=True), eps)


def modulation(v: Tensor) -> Tensor:
    """[B, D] -> [B, 1, D], broadcast over the tokens; [B, T, D], [D] and [1] as they are."""
    return v.unsqueeze(1) if v.dim() == 2 else v


def apply_activation(h: Tensor, activation: str | None) -> Tensor:
    """None, "silu", "gelu" (erf) or "gelu_tanh"."""
    if activation is None:
        return h
    if activation == "silu":
        return F.silu(h)
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


def draw_keep(h: Tensor, p: float, training: bool) -> Tensor | None:
    """The dropout mask that eager's F.dropout(h, p, training) would draw, as bool, consuming the random stream as that
    does for h's shape, dtype and layout; None when it would keep everything."""
    if not training or p == 0.0:
        return None
    return F.dropout(torch.ones_like(h), p, True) != 0


def dropout_keep(h: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """Dropout with a given boolean mask: h / (1 - p) where kept, 0 elsewhere (p = 1 keeps nothing)."""
    return h if keep is None else h * (cast(keep, h.dtype) * (1.0 / (1.0 - p) if p < 1 else 0.0))


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
    """act(group_norm(x) * (1 + scale) + shift); x [N, C, *S], weight/bias [C], scale/shift [N, C]; per_frame: of each
    frame of [N, C, T, H, W]."""
    if per_frame:
        N, T = x.shape[0], x.shape[2]
        scale, shift = (v if v is None else v[:, None].expand(-1, T, -1).flatten(0, 1) for v in (scale, shift))
        frames = x.movedim(2, 1).flatten(0, 1)
        y = group_norm_silu(frames, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation)
        return y.unflatten(0, (N, T)).movedim(1, 2)
    mean, rstd = group_moments(x, num_groups, eps)
    per_channel = x.shape[1] // num_groups
    mean, rstd = (channel_view(m.repeat_interleave(per_channel, dim=1), x.dim()) for m in (mean, rstd))
    z = (cast(x, mean.dtype) - mean) * rstd
    return activated_affine(z, weight, bias, scale, shift, activation).to(x.dtype)


def channel_rstd(x: Tensor, eps: float, inside: bool) -> Tensor:
    """What each pixel of [N, C, *S] is multiplied by, [N, 1, *S]: 1 / sqrt(mean(x^2) + eps) over its channels or, not
    inside, sqrt(C) / max(norm, eps), negative where eps is no less, for that divisor is a constant."""
    squares = cast(x, compute_dtype(x)).square()
    if inside:
        return (squares.mean(dim=1, keepdim=True) + eps).rsqrt()
    squares = squares.sum(dim=1, keepdim=True)
    constant = squares.sqrt() <= eps
    root = math.sqrt(x.shape[1])
    return (root / squares.masked_fill(constant, 1.0).sqrt()).masked_fill(
        constant, -root / eps if eps > 0 else -math.inf
    )


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
    """act((normalize(x, dim=1) * sqrt(C) * weight + bias) * (1 + scale) + shift); x [N, C, *S], weight/bias [C],
    scale/shift [N, C]; eps_mode "inside": x / sqrt(mean(x^2) + eps) for the norm."""
    rstd = channel_rstd(x, eps, eps_mode == "inside").abs()
    return activated_affine(cast(x, rstd.dtype) * rstd, weight, bias, scale, shift, activation).to(x.dtype)


def activated_affine(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Tensor:
    """act((z * weight + bias) * (1 + scale) + shift) in the dtype of z [N, C, *S]."""
    if weight is not None:
        z = z * channel_view(cast(weight, z.dtype), z.dim())
    if bias is not None:
        z = z + channel_view(cast(bias, z.dtype), z.dim())
    if scale is not None:
        z = z * (1 + channel_view(scale.to(z.dtype), z.dim()))
    if shift is not None:
        z = z + channel_view(shift.to(z.dtype), z.dim())
    return apply_activation(z, activation)


def conv(h: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding) -> Tensor:
    """Stride-1 convolution in as many dimensions as the weight has; padding in either form (`_padding.py`)."""
    dims, ones = weight.dim() - 2, [1] * (weight.dim() - 2)
    pad = [padding] * dims if isinstance(padding, int) else list(padding)
    h, pad = (h, pad) if len(pad) == dims else (padded(h, pad), [0] * dims)
    return torch.convolution(h, weight, bias, ones, pad, ones, False, [0] * dims, 1)


def conv_residual(
    h: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, padding: Padding = 1
) -> Tensor:
    """residual + conv(h); h [N, Cin, *S], weight [Cout, Cin, *K], residual [N, Cout, *S']."""
    y = conv(h, weight, bias, padding)
    return y if residual is None else residual + y


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
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    padding: Padding = 1,
) -> Tensor:
    """residual + conv(dropout(silu(group_norm(x) * (1 + scale) + shift))), the convolution in the dtype of `weight`."""
    h = group_norm_silu(x, num_groups, norm_weight, norm_bias, eps, scale=scale, shift=shift).to(weight.dtype)
    return conv_residual(dropout_keep(h, keep, dropout_p), weight, bias, residual, padding=padding)


def modulated(xhat: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    if scale is not None:
        xhat = xhat * (1 + cast(modulation(scale), xhat.dtype))
    return xhat if shift is None else xhat + cast(modulation(shift), xhat.dtype)


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift; x [B, T, D], shift/scale [B, D] or [B, T, D], weight/bias [D]."""
    mean, rstd = _kept_moments(x, eps)
    xhat = (cast(x, mean.dtype) - mean) * rstd
    if weight is not None:
        xhat = xhat * cast(weight, xhat.dtype)
    if bias is not None:
        xhat = xhat + cast(bias, xhat.dtype)
    return cast(modulated(xhat, shift, scale), x.dtype)


def rms_norm_modulate(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, *, eps: float = 1e-6, weight: Tensor | None = None
) -> Tensor:
    """rms_norm(x) * (1 + scale) + shift, rms_norm(x) = x / sqrt(mean(x^2) + eps) [* weight]."""
    wide = cast(x, compute_dtype(x))
    xhat = wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        xhat = xhat * cast(weight, xhat.dtype)
    return cast(modulated(xhat, shift, scale), x.dtype)


def gate_residual(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """residual + gate * branch in their promoted dtype, rounded once; gate [B, D], [B, T, D], [D] or [1]."""
    out = promoted(residual, gate, branch)
    wide = torch.promote_types(out, torch.float32)
    return cast(added(cast(residual, wide), cast(modulation(gate), wide) * cast(branch, wide)), out)


def gate_residual_layer_norm_modulate(
    residual: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x_new = residual + gate * branch and layer_norm_modulate(x_new, shift, scale)."""
    x_new = gate_residual(residual, gate, branch)
    return x_new, layer_norm_modulate(x_new, shift, scale, eps=eps)


def layer_norm_modulate_linear(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """linear(layer_norm_modulate(x, shift, scale)); weight [O, D]."""
    return F.linear(cast(layer_norm_modulate(x, shift, scale, eps=eps), weight.dtype), weight, bias)


def linear_gate_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    *,
    activation: str | None = None,
) -> Tensor:
    """residual + gate * linear(act(h)); h [B, T, K], weight [D, K], gate as in gate_residual, or None (1)."""
    return add_gated(residual, gate, F.linear(cast(apply_activation(h, activation), weight.dtype), weight, bias))


def add_gated(residual: Tensor | None, gate: Tensor | None, branch: Tensor) -> Tensor:
    """residual + gate * branch, either of them None where it is absent."""
    if residual is not None:
        return added(residual, branch) if gate is None else gate_residual(residual, gate, branch)
    return branch if gate is None else modulation(gate) * branch


def added(residual: Tensor, branch: Tensor) -> Tensor:
    """The sum; of tokens laid out like its first operand, the branch: a patch embedding is a transposed residual."""
    return branch + residual if branch.dim() == 3 else residual + branch


def is_zero(*tensors: Tensor) -> Tensor:
    """One bool per tensor: every element is +0 or -0. Judged on the bits, so that flushed denormals do not pass."""
    flags = [((t.contiguous().view(INTEGERS[t.dtype]) << 1) == 0).all() for t in tensors]
    return torch.stack(flags) if flags else torch.empty(0, dtype=torch.bool)
