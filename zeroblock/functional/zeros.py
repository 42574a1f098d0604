"""Of any tensors: which are exactly zero."""

from __future__ import annotations

from torch import Tensor

from .. import _checks, ops


def is_zero(*tensors: Tensor) -> Tensor:
    """Which tensors consist of +0 and -0 alone, without a host sync.

    Args:
        *tensors: float32, float64, bfloat16 or float16, all on one device.

    Returns bool [len(tensors)] on their device. By the bits: denormals and NaN are not zero, whatever the
    flush-denormal mode. Raises TypeError (kind, dtype), ValueError (device).

    >>> is_zero(torch.zeros(3), torch.ones(3)).tolist()
    [True, False]
    """
    named = {f"tensors[{i}]": t for i, t in enumerate(tensors)}
    _checks.floating("is_zero", len(tensors), **named)
    return ops.is_zero(list(tensors))
