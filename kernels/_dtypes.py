"""The dtypes of the kernels' operands: the one table of kernels/. README.md says what else another dtype needs."""

from __future__ import annotations

import torch

# What rows, images and weights may be. Arithmetic is fp32 whatever they are.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's name of every dtype that a pointer argument may have: flags and bit patterns as well.
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
# The integer of as many bytes.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def long_name(dtype: torch.dtype) -> str:
    """PyTorch's own name, "bfloat16"."""
    return str(dtype).removeprefix("torch.")
