"""What the calls of a thread are: under the fixed rule, of a training step, allowed reduced float32 precision, to round
where eager rounds; and whether they go into a CUDA graph.

One number holds the first four: reading an attribute of a thread's own costs as much as testing a bit (every planned
step reads it, benchmarks/overhead.py).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch

from ..kernels._torch import capturing as capturing

FIXED, TRAINING, REDUCED, EAGER = 1, 2, 4, 8

_precision = torch._C._get_float32_matmul_precision


class _Mode(threading.local):
    bits = 0


mode = _Mode()


@contextlib.contextmanager
def _with(bits: int, on: bool = True) -> Iterator[None]:
    before = mode.bits
    mode.bits = before | bits if on else before & ~bits
    try:
        yield
    finally:
        mode.bits = before


def fixed_rule() -> contextlib.AbstractContextManager[None]:
    """No measured choice in the block (this thread)."""
    return _with(FIXED)


def allow_reduced(on: bool = True) -> contextlib.AbstractContextManager[None]:
    """Ways of reduced float32 precision may run in the block (this thread); False: only by the user's own setting."""
    return _with(REDUCED, on)


def eager_rounding() -> contextlib.AbstractContextManager[None]:
    """Blocks round where PyTorch's operators round, in the block (this thread): what is fused otherwise is computed by
    these, one after another."""
    return _with(EAGER)


def training(on: bool = True) -> contextlib.AbstractContextManager[None]:
    """The calls of the block are those of a training step (this thread)."""
    return _with(TRAINING, on)


def is_training() -> bool:
    return bool(mode.bits & TRAINING)


def rounds_as_eager() -> bool:
    return bool(mode.bits & EAGER)


def is_fixed() -> bool:
    return bool(mode.bits & FIXED)


def reduced_allowed() -> bool:
    """Whether the user allowed reduced float32 precision."""
    return bool(mode.bits & REDUCED) or _precision() != "highest"


def warn_of_capture(step: str) -> None:
    warnings.warn(
        f"zeroblock: {step} is captured in a CUDA graph before a call like it ran: the graph gets the library's "
        "kernels. Run the model once, in the same mode, before the capture.",
        stacklevel=5,
    )
