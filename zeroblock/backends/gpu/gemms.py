"""What the planned steps of convolutions and linears on a GPU share: their candidates, their rule, the zero flag.

An own kernel reads the flag of its weight on the device where zero_skip is DEVICE, the library's cannot: a step whose
choice is "library" has no zero path under "auto". Rule where nothing is measured: under DEVICE
Triton's GEMM, in the configuration that its launcher picks by size, for linears and 1x1 convolutions; the library for
wider ones, for which it has algorithms that an implicit GEMM does not match, and where no flag is read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels._torch import conv_precision, matmul_precision
from ...plan.mode import mode
from ...steps.flag import DEVICE, EXECUTED, skipped
from .. import available
from ..base import Backend, MaybeTensor
from ..flagged import FlaggedSteps

CONFIGS: tuple[str, ...] = ()
FOLDS: tuple[str, ...] = ()
WGRADS: tuple[str, ...] = ()
if available.triton() is not None:
    from .. import triton_gemms

    CONFIGS, FOLDS, WGRADS = tuple(triton_gemms.GEMMS), tuple(triton_gemms.FOLDS), tuple(triton_gemms.WGRADS)


class OwnGemm(NamedTuple):
    """One way of a convolution or linear beside the library's."""

    backend_name: str
    config: str | None

    @property
    def name(self) -> str:
        return self.backend_name if self.config is None else f"{self.backend_name} {self.config}"

    @property
    def backend(self) -> FlaggedSteps:
        found = available.gpu_backend(self.backend_name)
        assert found is not None
        return found

    def why_not(
        self,
        op: str,
        h: Tensor,
        weight: Tensor,
        gate: MaybeTensor,
        residual: MaybeTensor,
        padding: Sequence[int] | None,
    ) -> str | None:
        reason = available.why_not(self.backend_name, op, h)
        return reason or self.backend.why_not_own(op, h, weight, gate, residual, padding, self.config)


TRITON_GEMMS = [OwnGemm("triton", config) for config in CONFIGS]
OWN_GEMMS = [*TRITON_GEMMS, OwnGemm("cuda", None)]


@functools.lru_cache
def _not_zero(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def zero_flag(backend: Backend, tensors: list[Tensor], zero_skip: int) -> MaybeTensor:
    """int32 [1] on the device, whether one of the tensors is zero; None where the op does not ask.

    While a plan is measured the tensors are scanned, but the answer is 0: tails are zero when they are new, and what
    is fastest at skipping would be kept for the rest of the training.
    """
    if zero_skip != DEVICE:
        return None
    return forward_flag(backend.zero_flag(tensors))


def forward_flag(flag: MaybeTensor) -> MaybeTensor:
    """A flag as kernels get it: 0 while a plan is measured."""
    return _not_zero(flag.device) if flag is not None and mode.measuring else flag


def skipped_or(flag: MaybeTensor, like: Tensor) -> Tensor:
    """What the op reports of a flag."""
    return skipped(like, EXECUTED) if flag is None else flag


def library_settings(x: Tensor) -> tuple:
    """What the time of the library's kernels, and the arithmetic in fp32, depends on beside the tensors."""
    if x.dtype != torch.float32:
        return (torch._C._get_cudnn_benchmark(),)
    return torch._C._get_cudnn_benchmark(), conv_precision(), matmul_precision()


def describe_flag(flagged: bool) -> str:
    return "flagged" if flagged else "no flag"


def rule(
    op: str,
    rows: int,
    factor: Tensor,
    h: Tensor,
    weight: Tensor,
    gate: MaybeTensor,
    residual: MaybeTensor,
    padding: Sequence[int] | None,
    flagged: bool,
) -> str:
    """The name of the candidate where nothing is measured; rows of the result, and what they are multiplied with."""
    narrow = weight.dim() == 2 or weight.shape[2:].numel() == 1
    triton = available.triton()
    if not (flagged and narrow) or triton is None:
        return "library"
    if OwnGemm("triton", None).why_not(op, h, weight, gate, residual, padding) is not None:
        return "library"
    return f"triton {triton.gemm_by_size(h, factor, rows)}"
