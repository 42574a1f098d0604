"""The primitives as eager PyTorch runs them: the library's kernels one after another, in the dtypes of their operands.

They are the candidate "library" of the planned steps on a GPU (`_gpu.py`): what a call costs without zeroblock's own
kernels. Same names and signatures as `_plain.py`, which takes operands of several dtypes. No kernel here reads a flag
on the device: it is accepted and not used, the results are those of the arithmetic.
The library rounds the statistics that its group norm keeps for backward to the dtype of x; ours are fp32, so that in
training half precision goes through its fp32 kernels, as under autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import as_layout, channels_last_format
from ..plan.planned import state
from ..reference import apply_activation, channel_view, modulation
from . import reference as _plain
from .reference import _dense, _sum_to, activation_bwd, add_bias, linear

__all__ = ["activation_bwd", "add_bias", "linear"]

NAME = "library"
_fused_rms_norm = torch.ops.aten._fused_rms_norm.default
_fused_rms_norm_backward = torch.ops.aten._fused_rms_norm_backward.default


def _takes(x: Tensor, *operands: Tensor | None) -> bool:
    """Whether the library's norm kernels take the call: something to do, one dtype."""
    return x.numel() > 0 and all(t is None or t.dtype == x.dtype for t in operands)


# ---- group_norm_silu ------------------------------------------------------------------------------------------------


def group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu, flag=None):
    if not _takes(x, weight, bias, scale, shift):
        return _plain.group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu)
    N, C = x.shape[:2]
    kept = state.training or state.fixed  # the dispatcher's calls do not tell
    wide = torch.float32 if kept else x.dtype
    y, mean, rstd = torch.native_group_norm(
        x.to(wide).contiguous(), _to(weight, wide), _to(bias, wide), N, C, x.numel() // (N * C), num_groups, eps
    )
    y = _film(y.to(x.dtype), scale, shift)
    y = torch.nn.functional.silu(y) if silu else y
    return _dense(y, x), mean.float(), rstd.float()


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None else t.to(dtype)


def _film(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = y if scale is None else y * (1 + channel_view(scale, y.dim()))
    return y if shift is None else y + channel_view(shift, y.dim())


def group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, flag=None):
    if not _takes(x, weight, bias, scale, shift):
        return _plain.group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu)
    (N, C), spatial = x.shape[:2], list(range(2, x.dim()))
    dense, dz = x.contiguous(), as_layout(dy.to(x.dtype), None)
    normed = _normed(dense, mean, rstd, weight, bias) if silu or scale is not None else None
    if silu:
        dz = torch.ops.aten.silu_backward(dz, _film(normed, scale, shift))
    dscale = None if scale is None else (dz * normed).sum(spatial).view(scale.shape)
    dshift = None if shift is None else dz.sum(spatial).view(shift.shape)
    g = dz if scale is None else dz * (1 + channel_view(scale, x.dim()))
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        g.float(), dense.float(), mean, rstd, _to(weight, torch.float32), N, C, x.numel() // (N * C), num_groups,
        [True, weight is not None, bias is not None],
    )  # fmt: skip
    return _dense(dx.to(x.dtype), x), _to(dweight, x.dtype), _to(dbias, x.dtype), dscale, dshift


def _normed(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The norm again, as its kernel computes it: x * gain + offset in fp32, rounded once."""
    per_group = x.shape[1] // mean.shape[1]
    gain, offset = rstd.repeat_interleave(per_group, 1), mean.repeat_interleave(per_group, 1)
    gain = gain if weight is None else gain * weight
    offset = -offset * gain if bias is None else bias - offset * gain
    return torch.addcmul(channel_view(offset, x.dim()), x, channel_view(gain, x.dim())).to(x.dtype)


# ---- layer_norm_modulate, rms_norm_modulate -------------------------------------------------------------------------


def layer_norm_modulate(x, shift, scale, weight, bias, eps, rms):
    if not _takes(x, weight, bias, shift, scale):
        return _plain.layer_norm_modulate(x, shift, scale, weight, bias, eps, rms)
    mean = None
    if rms:
        y, rstd = _fused_rms_norm(x, x.shape[-1:], weight, eps)
    else:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        mean = mean.float().view(x.shape[:2])
    y = y if scale is None else y * (1 + modulation(scale))
    y = y if shift is None else y + modulation(shift)
    return y.contiguous(), mean, rstd.float().view(x.shape[:2])


def layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, weight, bias, rms):
    if not _takes(x, weight, bias, shift, scale) or (rms and x.device.type == "cpu"):  # no such kernel on the CPU
        return _plain.layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, weight, bias, rms)
    dy, size = dy.to(x.dtype), x.shape[-1:]
    dscale = None
    if scale is not None:
        xhat = _plain._normalised(x, mean, rstd)
        xhat = xhat if weight is None else xhat * weight
        normed = (xhat if bias is None else xhat + bias).to(x.dtype)
        dscale = _sum_to(dy * normed, scale)
    g = dy if scale is None else dy * (1 + modulation(scale))
    if rms:
        dx, dweight = _fused_rms_norm_backward(g, x, size, rstd[..., None], weight, [True, weight is not None])
        dbias = None
    else:
        # The dtype in which the kernel of each device keeps its statistics.
        kept = torch.float32 if x.device.type == "cuda" else x.dtype
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            g, x, size, mean[..., None].to(kept), rstd[..., None].to(kept), weight, bias,
            [True, weight is not None, bias is not None],
        )  # fmt: skip
    return dx.contiguous(), _sum_to(dy, shift), dscale, dweight, dbias


# ---- gates ----------------------------------------------------------------------------------------------------------


def gate_residual(residual, gate, branch):
    return as_layout(residual + modulation(gate) * branch, channels_last_format(residual))


def gate_residual_bwd(dy, gate, branch, need_dgate, need_dbranch):
    dgate = _sum_to(dy * branch, gate) if need_dgate else None
    return dgate, _dense((dy * modulation(gate)).to(branch.dtype), branch) if need_dbranch else None


def gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps):
    x_new = gate_residual(residual, gate, branch).contiguous()
    return x_new, *layer_norm_modulate(x_new, shift, scale, None, None, eps, False)


def gate_residual_layer_norm_modulate_bwd(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale):
    dx, dshift, dscale, _, _ = layer_norm_modulate_bwd(dy, x_new, mean, rstd, shift, scale, None, None, False)
    dresidual = dx if dx_new is None else dx + dx_new
    dgate, dbranch = gate_residual_bwd(dresidual, gate, branch, True, True)
    return dresidual.contiguous(), dgate, dbranch, dshift, dscale


# ---- activations ----------------------------------------------------------------------------------------------------


def activation(x, name, flag=None):
    return apply_activation(x, name)
