"""What the planned steps of convolutions and linears on a GPU share: their candidates, and the flagged plan's choice.

An own kernel reads the flag of its weight on the device, the library's cannot. So there are two steps of each
(`hinted.py`): the dense one flags nothing, and its rule where nothing is measured is the library's, whose kernels are
expected to win (model, not measured: benchmarks/roofline.md); the flagged one takes our kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels._torch import conv_precision, matmul_precision
from .. import available
from ..base import MaybeTensor
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
UNMEASURED = "our kernels, all of which leave early while the flag is set"


def library_settings(x: Tensor) -> tuple:
    """What the time of the library's kernels, and the arithmetic in fp32, depends on beside the tensors."""
    if x.dtype != torch.float32:
        return (torch._C._get_cudnn_benchmark(),)
    return torch._C._get_cudnn_benchmark(), conv_precision(), matmul_precision()


def own_way(
    op: str,
    rows: int,
    factor: Tensor,
    h: Tensor,
    weight: Tensor,
    gate: MaybeTensor,
    residual: MaybeTensor,
    padding: Sequence[int] | None,
) -> str:
    """The flagged plan's way: Triton's GEMM as its launcher picks it by size, for `rows` of the result and what they
    are multiplied with; else the CUDA convolution; else the library's."""
    own = [OwnGemm(name, None) for name in ("triton", "cuda")]
    able = [gemm.name for gemm in own if gemm.why_not(op, h, weight, gate, residual, padding) is None]
    triton = available.triton()
    if "triton" in able and triton is not None:
        return f"triton {triton.gemm_by_size(h, factor, rows)}"
    return able[0] if able else "library"
