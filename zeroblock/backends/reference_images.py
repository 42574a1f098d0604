"""The norms of images of the backend in plain PyTorch (`reference.py`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference as ref
from .._layout import as_frames, in_layout, of_each_frame, of_frames, over_frames, pointwise_format
from ..reference import channel_view, compute_dtype
from .base import MaybeTensor
from .dense import DenseSteps


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory format in which the ops return results for x."""
    return in_layout(y, pointwise_format(x))


class ImageNorms(DenseSteps):
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
        mean, rstd = ref.group_moments(x, num_groups, eps)
        activation = "silu" if silu else None
        y = ref.group_norm_silu(x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation)
        return in_format_of(x, y), mean, rstd

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
        """dz = dy * silu'(z); g = weight * (1 + scale): dx = rstd * (g dz - mean(g dz) - xhat * mean(g dz xhat))."""
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
            in_format_of(x, dx.reshape(x.shape).to(x.dtype)),
            None if weight is None else (gain * dz_xhat).sum(0).to(weight.dtype),
            None if bias is None else (gain * dz_sum).sum(0).to(bias.dtype),
            None if scale is None else (dz * normed).sum(2).to(scale.dtype),
            None if shift is None else dz_sum.to(shift.dtype),
        )

    def group_norm_silu_frames(
        self,
        x: Tensor,
        num_groups: int,
        weight: MaybeTensor,
        bias: MaybeTensor,
        eps: float,
        scale: MaybeTensor,
        shift: MaybeTensor,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By group_norm_silu, the frames beside the samples."""
        film = of_each_frame(scale, x.shape[2]), of_each_frame(shift, x.shape[2])
        y, mean, rstd = self.group_norm_silu(as_frames(x), num_groups, weight, bias, eps, *film, silu)
        return of_frames(y, x), mean, rstd

    def group_norm_silu_frames_bwd(
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
    ) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
        T = x.shape[2]
        operands = weight, bias, of_each_frame(scale, T), of_each_frame(shift, T)
        dx, dweight, dbias, dscale, dshift = self.group_norm_silu_bwd(
            as_frames(dy), as_frames(x), mean, rstd, *operands, num_groups, silu
        )
        return of_frames(dx, x), dweight, dbias, over_frames(dscale, x), over_frames(dshift, x)

    def channel_rms_norm_silu(
        self,
        x: Tensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        eps: float,
        eps_inside: bool,
        scale: MaybeTensor,
        shift: MaybeTensor,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        rstd = ref.channel_rstd(x, eps, eps_inside)
        z = x.to(rstd.dtype) * rstd.abs()
        y = ref.activated_affine(z, weight, bias, scale, shift, "silu" if silu else None)
        return in_format_of(x, y.to(x.dtype)), rstd.squeeze(1).contiguous()

    def channel_rms_norm_silu_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        rstd: Tensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        scale: MaybeTensor,
        shift: MaybeTensor,
        silu: bool,
    ) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
        """With g the gradient of xhat: dx = |rstd| * (g - xhat * mean(g xhat)), the mean 0 where rstd is negative."""
        ndim, rstd = x.dim(), rstd[:, None]
        pixels = list(range(2, ndim))
        xhat = x.to(rstd.dtype) * rstd.abs()
        normed = ref.activated_affine(xhat, weight, bias, None, None, None)
        dz = dy.to(rstd.dtype)
        if silu:
            z = ref.activated_affine(normed, None, None, scale, shift, None)
            s = z.sigmoid()
            dz = dz * (s * (1 + z * (1 - s)))
        da = dz if scale is None else dz * (1 + channel_view(scale.to(dz.dtype), ndim))
        g = da if weight is None else da * channel_view(weight.to(dz.dtype), ndim)
        along = (g * xhat).mean(1, keepdim=True).masked_fill(rstd < 0, 0.0)
        over_pixels = lambda t: t.sum(pixels) if pixels else t  # noqa: E731
        return (
            in_format_of(x, (rstd.abs() * (g - xhat * along)).to(x.dtype)),
            None if weight is None else over_pixels(da * xhat).sum(0).to(weight.dtype),
            None if bias is None else over_pixels(da).sum(0).to(bias.dtype),
            None if scale is None else over_pixels(dz * normed).to(scale.dtype).contiguous(),
            None if shift is None else over_pixels(dz).to(shift.dtype).contiguous(),
        )
