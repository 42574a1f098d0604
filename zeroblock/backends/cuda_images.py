"""channel_rms_norm_silu by the CUDA kernels."""

from __future__ import annotations

from torch import Tensor

from .._layout import as_layout, as_norm_input, like, pointwise_format
from .base import MaybeTensor
from .cuda_convs import Kernels
from .reference import Reference

# Channels of a pixel, which the threads of a block keep in registers: kMostNormedChannels of csrc/cuda/cuda_kernels.h.
MOST_CHANNELS = 1024


def why_not_channels(x: Tensor) -> str | None:
    """Why the reference serves the norm of the channels of x, else None."""
    if x.shape[1] <= MOST_CHANNELS:
        return None
    return f"{x.shape[1]} channels are more than the {MOST_CHANNELS} that a block keeps in registers"


class CudaImages(Reference):
    kernels: Kernels

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
        if why_not_channels(x) is not None:
            return super().channel_rms_norm_silu(x, weight, bias, eps, eps_inside, scale, shift, silu)
        x, last = as_norm_input(x)
        return self.kernels.channel_rms_norm_silu(x, weight, bias, scale, shift, eps, eps_inside, silu, last)

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
        if why_not_channels(x) is not None:
            return super().channel_rms_norm_silu_bwd(dy, x, rstd, weight, bias, scale, shift, silu)
        layout = pointwise_format(x)
        x, dy, last = as_layout(x, layout), as_layout(dy.to(x.dtype), layout), layout is not None
        dx, dweight, dbias, dscale, dshift = self.kernels.channel_rms_norm_silu_bwd(
            dy, x, rstd, weight, bias, scale, shift, silu, last
        )
        return dx, like(dweight, weight), like(dbias, bias), like(dscale, scale), like(dshift, shift)
