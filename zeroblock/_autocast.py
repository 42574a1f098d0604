"""The autocast policy: in which dtype a convolution or linear computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_autocast(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # which raises for meta


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype autocast gives a convolution or linear with this weight now; None when it leaves it alone (fp64
    too)."""
    device = "cpu" if weight.is_cpu else weight.device.type  # a device costs as much as all the rest
    if device == "meta" or not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def autocast(weight: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """(weight, *others), the operands of a convolution or linear, in the dtype autocast gives it."""
    dtype = autocast_dtype(weight)
    if dtype is None:
        return weight, *others
    return weight.to(dtype), *(t if t is None else t.to(dtype) for t in others)
