"""The backend as eager PyTorch runs it: the library's kernels one after another, in the dtypes of their operands.

They are the candidate "library" of the planned steps on a GPU (`gpu/`): what a call costs without zeroblock's own
kernels. Operands of several dtypes go to `reference.py`. No kernel here reads a flag on the device: it is accepted and
not used, the results are those of the arithmetic.
The library rounds the statistics that its group norm keeps for backward to the dtype of x; ours are fp32, so that in
training half precision goes through its fp32 kernels, as under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout import as_layout
from ..kernels._torch import HAS_FUSED_RMS_NORM
from ..plan.mode import is_fixed, is_training
from ..reference import channel_view, modulation
from .base import MaybeTensor
from .reference import Reference, in_format_of, normalised_rows, sum_to, sum_to_maybe

if HAS_FUSED_RMS_NORM:
    _fused_rms_norm = torch.ops.aten._fused_rms_norm.default
    _fused_rms_norm_backward = torch.ops.aten._fused_rms_norm_backward.default


def _takes(x: Tensor, *operands: MaybeTensor) -> bool:
    """Whether the library's norm kernels take the call: something to do, one dtype."""
    return x.numel() > 0 and all(t is None or t.dtype == x.dtype for t in operands)


def _to(t: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    return t if t is None else t.to(dtype)


def _film(y: Tensor, scale: MaybeTensor, shift: MaybeTensor) -> Tensor:
    y = y if scale is None else y * (1 + channel_view(scale, y.dim()))
    return y if shift is None else y + channel_view(shift, y.dim())


def _normed(x: Tensor, mean: Tensor, rstd: Tensor, weight: MaybeTensor, bias: MaybeTensor) -> Tensor:
    """The group norm again, as its kernel computes it: x * gain + offset in fp32, rounded once."""
    per_group = x.shape[1] // mean.shape[1]
    gain, offset = rstd.repeat_interleave(per_group, 1), mean.repeat_interleave(per_group, 1)
    gain = gain if weight is None else gain * weight
    offset = -offset * gain if bias is None else bias - offset * gain
    return torch.addcmul(channel_view(offset, x.dim()), x, channel_view(gain, x.dim())).to(x.dtype)


class Eager(Reference):
    name = "library"

    def group_norm_silu(
        self,
        x: Tensor,
        num_groups: int,
        weight: MaybeTensor,
        bias: MaybeTensor,
        eps: float,
        scale: MaybeTensor,
        shift: MaybeTensor,
        silu: bool,
        flag: MaybeTensor = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _takes(x, weight, bias, scale, shift):
            return super().group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu)
        N, C = x.shape[:2]
        kept = is_training() or is_fixed()  # the dispatcher's calls do not tell
        wide = torch.float32 if kept else x.dtype
        y, mean, rstd = torch.native_group_norm(
            x.to(wide).contiguous(), _to(weight, wide), _to(bias, wide), N, C, x.numel() // (N * C), num_groups, eps
        )
        y = _film(y.to(x.dtype), scale, shift)
        y = F.silu(y) if silu else y
        return in_format_of(x, y), mean.float(), rstd.float()

    def group_norm_silu_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        scale: MaybeTensor,
        shift: MaybeTensor,
        num_groups: int,
        silu: bool,
        flag: MaybeTensor = None,
    ) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
        if not _takes(x, weight, bias, scale, shift):
            return super().group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu)
        (N, C), spatial = x.shape[:2], list(range(2, x.dim()))
        dense, dz = x.contiguous(), as_layout(dy.to(x.dtype), None)
        normed = _normed(dense, mean, rstd, weight, bias) if silu or scale is not None else dense
        if silu:
            dz = torch.ops.aten.silu_backward(dz, _film(normed, scale, shift))
        dscale = None if scale is None else (dz * normed).sum(spatial).view(scale.shape)
        dshift = None if shift is None else dz.sum(spatial).view(shift.shape)
        g = dz if scale is None else dz * (1 + channel_view(scale, x.dim()))
        pixels, mask = x.numel() // (N * C), [True, weight is not None, bias is not None]
        gamma = _to(weight, torch.float32)
        if gamma is None and bias is not None:
            gamma = mean.new_ones(C)  # without a weight torch before 2.14 gives no bias gradient
        dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
            g.float(), dense.float(), mean, rstd, gamma, N, C, pixels, num_groups, mask
        )
        return in_format_of(x, dx.to(x.dtype)), _to(dweight, x.dtype), _to(dbias, x.dtype), dscale, dshift

    def layer_norm_modulate(
        self,
        x: Tensor,
        shift: MaybeTensor,
        scale: MaybeTensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        eps: float,
        rms: bool,
    ) -> tuple[Tensor, MaybeTensor, Tensor]:
        if not _takes(x, weight, bias, shift, scale) or (rms and not HAS_FUSED_RMS_NORM):
            return super().layer_norm_modulate(x, shift, scale, weight, bias, eps, rms)
        mean = None
        if rms:
            y, rstd = _fused_rms_norm(x, x.shape[-1:], weight, eps)
        else:
            y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
            mean = mean.float().view(x.shape[:2])
        y = y if scale is None else y * (1 + modulation(scale))
        y = y if shift is None else y + modulation(shift)
        return y.contiguous(), mean, rstd.float().view(x.shape[:2])

    def layer_norm_modulate_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        mean: MaybeTensor,
        rstd: Tensor,
        shift: MaybeTensor,
        scale: MaybeTensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        rms: bool,
    ) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
        # The CPU has no backward kernel of its RMS norm.
        if not _takes(x, weight, bias, shift, scale) or (rms and (x.is_cpu or not HAS_FUSED_RMS_NORM)):
            return super().layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, weight, bias, rms)
        dy, size = dy.to(x.dtype), x.shape[-1:]
        dscale = None
        if scale is not None:
            xhat = normalised_rows(x, mean, rstd)
            xhat = xhat if weight is None else xhat * weight
            normed = (xhat if bias is None else xhat + bias).to(x.dtype)
            dscale = sum_to(dy * normed, scale)
        g = dy if scale is None else dy * (1 + modulation(scale))
        if mean is None:
            mask = [True, weight is not None]
            dx, dweight = _fused_rms_norm_backward(g, x, size, rstd[..., None], weight, mask)
            dbias = None
        else:
            # The dtype in which the kernel of each device keeps its statistics.
            kept = torch.float32 if x.device.type == "cuda" else x.dtype
            mean, rstd = mean[..., None].to(kept), rstd[..., None].to(kept)
            mask = [True, weight is not None, bias is not None]
            dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(g, x, size, mean, rstd, weight, bias, mask)
        return dx.contiguous(), sum_to_maybe(dy, shift), dscale, dweight, dbias

    def gate_residual(self, residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return in_format_of(residual, residual + modulation(gate) * branch)

    def gate_residual_bwd(
        self, dy: Tensor, gate: Tensor, branch: Tensor, need_dgate: bool, need_dbranch: bool
    ) -> tuple[MaybeTensor, MaybeTensor]:
        dgate = sum_to(dy * branch, gate) if need_dgate else None
        if not need_dbranch:
            return dgate, None
        return dgate, in_format_of(branch, (dy * modulation(gate)).to(branch.dtype))


EAGER = Eager()
