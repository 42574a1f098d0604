"""The norms of images of the backend of the native CPU kernels (`cpu.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import as_layout, as_norm_input, in_layout, of_each_frame, over_frames, pointwise_format
from .._version import NAMESPACE
from .base import MaybeTensor
from .reference import Reference

_native = getattr(torch.ops, NAMESPACE)
_group_norm_silu = _native._group_norm_silu.default
_group_norm_silu_bwd = _native._group_norm_silu_bwd.default
_channel_rms_norm_silu = _native._channel_rms_norm_silu.default
_channel_rms_norm_silu_bwd = _native._channel_rms_norm_silu_bwd.default


def to_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


class CpuImages(Reference):
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
        x, last = as_norm_input(x)
        return _group_norm_silu(x, weight, bias, scale, shift, num_groups, eps, silu, last)

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
        layout = pointwise_format(x)
        x, dy, last = as_layout(x, layout), as_layout(to_dtype(dy, x.dtype), layout), layout is not None
        return _group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, last)

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
        if pointwise_format(x) is not None:
            return super().group_norm_silu_frames(x, num_groups, weight, bias, eps, scale, shift, silu)
        film = of_each_frame(scale, x.shape[2]), of_each_frame(shift, x.shape[2])
        return _group_norm_silu(in_layout(x, None), weight, bias, *film, num_groups, eps, silu, False, True)

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
        if pointwise_format(x) is not None:
            return super().group_norm_silu_frames_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu)
        x, dy, T = x.contiguous(), to_dtype(dy, x.dtype).contiguous(), x.shape[2]
        operands = weight, bias, of_each_frame(scale, T), of_each_frame(shift, T)
        dx, dweight, dbias, dscale, dshift = _group_norm_silu_bwd(
            dy, x, mean, rstd, *operands, num_groups, silu, False, True
        )
        return dx, dweight, dbias, over_frames(dscale, x), over_frames(dshift, x)

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
        x, last = as_norm_input(x)
        return _channel_rms_norm_silu(x, weight, bias, scale, shift, eps, eps_inside, silu, last)

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
        layout = pointwise_format(x)
        x, dy, last = as_layout(x, layout), as_layout(to_dtype(dy, x.dtype), layout), layout is not None
        return _channel_rms_norm_silu_bwd(dy, x, rstd, weight, bias, scale, shift, silu, last)
