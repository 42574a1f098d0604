"""The element types: one table for everything in Python but the Triton kernels, which have kernels/_dtypes.py."""

from __future__ import annotations

import torch
from torch import Tensor

KERNELS = (torch.float32, torch.bfloat16, torch.float16)
FLOATING = (*KERNELS, torch.float64)  # float64 runs through the reference

# The integer of as many bits, by which an element is tested for zero.
INTEGERS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}

_names = [str(dtype).removeprefix("torch.") for dtype in FLOATING]
FLOATING_NAMES = f"{', '.join(_names[:-1])} or {_names[-1]}"


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in this dtype; where it is, no operation, which torch.compile would have to trace."""
    return t if t.dtype == dtype else t.to(dtype)


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype PyTorch's arithmetic gives these tensors (none of them 0-dimensional)."""
    dtype = tensors[0].dtype
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype
