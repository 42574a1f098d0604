"""The CUDA kernels as the backend calls them, and its tensor-core convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._layout import channels_last_format
from ..steps.flag import may_test
from .base import GroupNorm, MaybeTensor
from .flagged import FlaggedSteps


class Kernels(NamedTuple):
    """The private ops of one build of csrc/cuda."""

    zero_flag: Callable[..., Any]
    group_norm_silu: Callable[..., Any]
    group_norm_silu_bwd: Callable[..., Any]
    channel_rms_norm_silu: Callable[..., Any]
    channel_rms_norm_silu_bwd: Callable[..., Any]
    residual_norm: Callable[..., Any]
    residual_norm_bwd: Callable[..., Any]
    row_norm: Callable[..., Any]
    row_norm_bwd: Callable[..., Any]
    gate_residual: Callable[..., Any]
    gate_residual_bwd: Callable[..., Any]
    conv_residual: Callable[..., Any]
    conv_moments: Callable[..., Any]

    @classmethod
    def load(cls, namespace: str) -> Kernels:
        """Those of torch.ops.<namespace>. AttributeError where it was built without."""
        ops = getattr(torch.ops, namespace)
        return cls(*(getattr(ops, f"_{name}_cuda").default for name in cls._fields))


def flag_byte(flag: MaybeTensor) -> MaybeTensor:
    """The flag [1] of an op, int32 with 0 or 1 in it, as the kernels read it: its lowest byte."""
    return flag if flag is None or flag.dtype == torch.bool else flag.view(torch.bool)[:1]


def _nhwc(t: Tensor) -> Tensor:
    """A channels-last tensor in memory order that starts at 16 bytes; anything else is copied."""
    t = t.permute(0, 2, 3, 1).contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


# Channels whose tables of the norm, eight bytes each, lie beside the tiles in the shared memory of every GPU (99 KB at
# least): tests/cuda/test_conv.py.
MOST_NORMED = 4096


def conv_takes(x: Tensor, weight: Tensor, padding: Sequence[int]) -> bool:
    """Whether the tensor-core convolution takes this call: half precision, 3x3 same or 1x1, channels by 8."""
    K, C, *size = weight.shape
    same = size in ([3, 3], [1, 1]) and list(padding) == [size[0] // 2] * 2
    half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return same and half and C % 8 == 0 and K % 8 == 0 and x.dim() == 4


class CudaConvs(FlaggedSteps):
    kernels: Kernels

    def why_not_own(
        self,
        op: str,
        h: Tensor,
        weight: Tensor,
        gate: MaybeTensor,
        residual: MaybeTensor,
        padding: Sequence[int] | None,
        config: str | None = None,
    ) -> str | None:
        if op == "linear_gate_residual":
            return "the linears are the library's"
        if not may_test(weight):
            return "the weight is not a plain tensor"
        if not conv_takes(h, weight, padding or ()):
            return "the kernel takes bf16 or fp16, 3x3 with padding 1 or 1x1, channels divisible by 8"
        if channels_last_format(h) is None and channels_last_format(weight) is None:
            return "the own convolution is channels-last, neither the input nor the weight is"
        if residual is not None and (residual.dtype, *residual.shape) != (h.dtype, len(h), len(weight), *h.shape[2:]):
            return "the kernel adds a residual of the result's shape and dtype"
        return None

    def own_conv(
        self,
        h: Tensor,
        weight: Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        padding: Sequence[int],
        flag: MaybeTensor,
        config: str | None = None,
    ) -> Tensor:
        return self.conv_and_statistics(h, weight, bias, residual, False, flag)[0]

    def own_conv_dgrad(
        self, dy: Tensor, weight: Tensor, padding: Sequence[int], flag: MaybeTensor, config: str | None = None
    ) -> Tensor:
        """The convolution of dy with the mirrored taps."""
        return self.own_conv(dy.to(weight.dtype), weight.flip(2, 3).transpose(0, 1), None, None, padding, flag)

    def conv_and_statistics(
        self,
        h: Tensor,
        weight: Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        statistics: bool = False,
        flag: MaybeTensor = None,
    ) -> tuple[Tensor, Tensor]:
        """(residual + conv(h), partial statistics of it for `moments`), where `conv_takes`."""
        return self._conv(h, weight, bias, residual, (None,) * 6, statistics, flag)

    def why_not_norm_conv(self, x: Tensor) -> str | None:
        """Beside `why_not_own`."""
        if x.shape[1] <= MOST_NORMED:
            return None
        return f"{x.shape[1]} channels are more than the {MOST_NORMED} whose norm a block keeps in shared memory"

    def norm_conv(
        self,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm: GroupNorm,
        weight: Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        flag: MaybeTensor = None,
    ) -> Tensor:
        """residual + conv(silu(norm(x))); what the norm gives never reaches memory. mean and rstd are those of x."""
        operands = mean, rstd, norm.weight, norm.bias, norm.scale, norm.shift
        return self._conv(x, weight, bias, residual, operands, False, flag)[0]

    def _conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        norm: tuple[MaybeTensor, ...],
        statistics: bool,
        flag: MaybeTensor,
    ) -> tuple[Tensor, Tensor]:
        added = None if residual is None else _nhwc(residual)
        y, partial = self.kernels.conv_residual(
            _nhwc(x), _nhwc(weight), bias, added, *norm, statistics, flag_byte(flag)
        )
        return y.permute(0, 3, 1, 2), partial

    def moments(self, y: Tensor, partial: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """mean and rstd [N, G] of y from the partial statistics that its convolution wrote."""
        return self.kernels.conv_moments(partial, _nhwc(y), num_groups, eps)
