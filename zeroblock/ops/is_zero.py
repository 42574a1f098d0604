"""is_zero: which tensors consist of +0 and -0 alone, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.select import select
from .register import Op

FORWARD = Op("is_zero(Tensor[] tensors) -> Tensor")


@FORWARD.forward
def is_zero(tensors: list[Tensor], *, direct: bool = False) -> Tensor:
    if not direct and (route := FORWARD.route(*tensors)):
        return route(tensors)
    if not tensors:
        return torch.empty(0, dtype=torch.bool)
    return select("is_zero", tensors[0]).are_zero(tensors)


@FORWARD.fake
def _fake(tensors: list[Tensor]) -> Tensor:
    return torch.empty(len(tensors), dtype=torch.bool, device=tensors[0].device if tensors else None)
