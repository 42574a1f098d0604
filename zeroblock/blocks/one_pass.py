"""Inference of a branch that may be zero, where nothing but its residual is left to compute: one native call.

The same rules as `_branch.py` (contract: zero.py), without gradients, for operands that the kernel takes as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._layout import channels_last_format
from ..backends.select import select
from ..steps import packed as _packed

_PLAIN = (Tensor, nn.Parameter)


def residual_if_zero(layer: nn.Module, residual: Tensor, parts: int = 1, which: int = 1) -> Any:
    """Test and result in one pass over memory: residual + bias where the weight of `layer`, a plain convolution or
    linear, is exactly zero; None where it is not; NotImplemented for operands that take the two steps apart.

    With parts > 1 weight and bias are cut into that many runs of rows; those whose bits are set in `which` have to be
    zero, and the result is the residual alone. For inference only, and where `zero.may_skip_branch` holds.
    """
    own, parameters = layer.__dict__, layer._parameters
    weight: Any = parameters["weight"]
    bias = parameters.get("bias")
    P, dtype = select("add_bias", residual), residual.dtype
    if (
        P.residual_if_zero is None
        or type(residual) not in _PLAIN
        or residual.layout is not torch.strided
        or not _takes(weight, dtype)
        or (bias is not None and not _takes(bias, dtype))
        or "weight" in own  # an attribute that hides the parameter
        or "bias" in own
        or (_packed.copies and any(t is not None and _packed.is_frozen(t) for t in (weight, bias)))
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None  # torch.jit.trace would record the undefined result
    ):
        return NotImplemented
    is_linear, last = weight.dim() == 2, not residual.is_contiguous()
    if last and (is_linear or channels_last_format(residual) is None):
        return NotImplemented
    if parts > 1:
        return P.residual_if_zero(weight, bias, parts, which, residual, None, True)
    if residual.size(-1 if is_linear else 1) != weight.size(0) or not (is_linear or residual.dim() == weight.dim()):
        return NotImplemented
    return P.residual_if_zero(weight, None, 1, 1, residual, bias, last or is_linear)


def _takes(t: Tensor, dtype: torch.dtype) -> bool:
    plain = type(t) in _PLAIN and t.dtype == dtype and t.layout is torch.strided and t.is_cpu
    return plain and (t.is_contiguous() or channels_last_format(t) is not None)
