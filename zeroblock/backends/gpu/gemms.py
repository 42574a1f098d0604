"""What the planned steps of convolutions and linears on a GPU share: their candidates, their rule, the zero flag.

An own kernel reads the flag of its weight on the device where zero_skip is zero.DEVICE, the library's cannot: a step
whose choice is "library" has no zero path under "auto" (`has_zero_path`). Rule where nothing is measured: under DEVICE
Triton's GEMM, in the configuration that its launcher picks by size, for linears and 1x1 convolutions; the library for
wider ones, for which it has algorithms that an implicit GEMM does not match, and where no flag is read.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import zero
from ..._compose import EXECUTED, _verdict
from ...plan import planned as _plan
from ...plan.measure import dtype_name
from .. import available as _backends

TRITON: Any = _backends._load("triton")
CONFIGS: tuple[str, ...] = () if TRITON is None else tuple(TRITON.GEMMS)
FOLDS: tuple[str, ...] = () if TRITON is None else tuple(TRITON.FOLDS)
WGRADS: tuple[str, ...] = () if TRITON is None else tuple(TRITON.WGRADS)
# (candidate, backend, options of its launcher)
CANDIDATES: list[tuple[str, str, dict[str, str]]] = [
    *((f"triton {config}", "triton", {"config": config}) for config in CONFIGS), ("cuda", "cuda", {})
]  # fmt: skip


def has_zero_path(choice: str) -> bool:
    return choice != "library"


@functools.lru_cache
def _executed(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def judge(P, tensors: list[Tensor], zero_skip: int) -> Tensor | None:
    """int32 [1] on the device, whether one of the tensors is zero; None where the op does not ask.

    While a plan is measured the tensors are scanned, but the answer is 0: tails are zero when they are new, and what
    is fastest at skipping would be kept for the rest of the training.
    """
    if zero_skip != zero.DEVICE:
        return None
    flag = P.zero_flags(tensors, any_of=True)
    return _executed(flag.device) if _plan.state.measuring else flag


def settled(flag: Tensor | None) -> Tensor | None:
    """Forward's flag for a kernel of backward, 0 while a plan is measured."""
    return _executed(flag.device) if flag is not None and _plan.state.measuring else flag


def verdict(flag: Tensor | None, like: Tensor) -> Tensor:
    """What the op returns of a flag."""
    return _verdict(like, EXECUTED) if flag is None else flag


def settings(x: Tensor) -> tuple:
    """What the time of the library's kernels, and the arithmetic in fp32, depends on beside the tensors."""
    if x.dtype != torch.float32:
        return (torch._C._get_cudnn_benchmark(),)
    cudnn: Any = torch.backends.cudnn
    return torch._C._get_cudnn_benchmark(), cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def describe_flag(flagged: bool) -> str:
    return "flagged" if flagged else "no flag"


def why_not(backend: str, op: str, options: dict[str, str], h, weight, gate, residual, padding) -> str | None:
    reason = _backends.why_not(backend, op, h)
    if reason is not None:
        return reason
    module: Any = _backends._load(backend)
    if options and not module.has_gemm(options["config"], weight.dtype):
        return f"no configuration for {dtype_name(weight)}"
    return module.why_not_own(op, h, weight, gate, residual, padding)


def rule(op: str, rows: int, factor: Tensor, h, weight, gate, residual, padding, flagged: bool) -> str:
    """The name of the candidate where nothing is measured; rows of the result, and what they are multiplied with."""
    narrow = weight.dim() == 2 or weight.shape[2:].numel() == 1
    if flagged and narrow and why_not("triton", op, {}, h, weight, gate, residual, padding) is None:
        return f"triton {TRITON.gemm_by_size(h, factor, rows)}"
    return "library"
