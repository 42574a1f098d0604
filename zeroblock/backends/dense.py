"""Convolutions and linear layers by planned steps around the library's: what most backends have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._padding import is_padded
from ..steps.conv import CONV, ConvCall, unit_geometry
from ..steps.conv_bwd import CONV_BWD, ConvGradsCall
from ..steps.flag import EXECUTED, skipped
from ..steps.linear import LinearGateCall, library_linear_gate
from ..steps.norm_conv import NORM_CONV, NORM_CONV_BWD, NormConvCall, NormConvGradsCall, norm_grads
from ..steps.padded import calls as padded_calls
from .base import Backend, ConvGrads, GroupNorm, MaybeTensor, Step


class ConvArguments(NamedTuple):
    """Of a call of conv_residual or group_norm_silu_conv_residual, for `explain`."""

    x: Tensor
    h: Tensor  # stands for the convolution's input: its shape, layout and dtype
    norm: GroupNorm | None
    weight: Tensor
    bias: MaybeTensor
    residual: MaybeTensor
    padding: tuple[int, ...]

    @classmethod
    def of(cls, op: str, a: dict[str, Any]) -> ConvArguments:
        x, norm = a["h" if op == "conv_residual" else "x"], None
        if op != "conv_residual":
            names = "num_groups", "norm_weight", "norm_bias", "eps", "scale", "shift", "keep", "dropout_p"
            norm = GroupNorm(*(a[name] for name in names))
        weight, bias, residual = a["weight"], a["bias"], a["residual"]
        how = a["padding"], a["padding_mode"]
        padding = _checks.convolution(op, x, weight, bias, residual, *how)
        return cls(x, with_dtype(x, weight.dtype), norm, weight, bias, residual, tuple(padding))


def why_no_flag(op: str, arguments: dict[str, Any]) -> str | None:
    """Why no kernel of these arguments reads a flag, whatever the backend; None: the backend knows."""
    if op not in ("conv_residual", "group_norm_silu_conv_residual"):
        return None
    a = ConvArguments.of(op, arguments)
    return "its padding takes several convolutions" if is_padded(a.padding, a.weight) else None


def with_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Stands for x in another dtype: same shape and layout, no values."""
    return x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)


class DenseSteps(Backend):
    """No kernel of these steps reads a flag: they run, whatever the weight is."""

    def steps(self, op: str, arguments: dict[str, Any], training: bool) -> Iterator[Step]:
        if op not in ("conv_residual", "group_norm_silu_conv_residual"):
            return
        a = ConvArguments.of(op, arguments)
        if is_padded(a.padding, a.weight):
            for part in padded_calls(self, a.h, a.weight, a.padding):
                yield CONV, (ConvCall(self, part.h, part.weight, a.bias, None, unit_geometry(part.padding)),)
            return
        geometry = unit_geometry(a.padding)
        if a.norm is not None:
            yield NORM_CONV, (NormConvCall(self, a.x, a.norm, a.weight, a.bias, a.residual, geometry),)
        yield CONV, (ConvCall(self, a.h, a.weight, a.bias, a.residual, geometry),)

    def conv_residual(
        self,
        h: Tensor,
        weight: Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        padding: tuple[int, ...],
        zero_skip: int,
    ) -> tuple[Tensor, Tensor]:
        y = CONV(ConvCall(self, h, weight, bias, residual, unit_geometry(padding)))
        return y, skipped(h, EXECUTED)

    def conv_grads(
        self,
        dy: Tensor,
        h: Tensor,
        weight: Tensor,
        flag: MaybeTensor,
        has_bias: bool,
        padding: tuple[int, ...],
        mask: Sequence[bool],
    ) -> ConvGrads:
        return CONV_BWD(ConvGradsCall(self, dy, h, weight, has_bias, padding, mask))

    def norm_conv_residual(
        self,
        x: Tensor,
        norm: GroupNorm,
        weight: Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        padding: tuple[int, ...],
        zero_skip: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        call = NormConvCall(self, x, norm, weight, bias, residual, unit_geometry(padding))
        return *NORM_CONV(call), skipped(x, EXECUTED)

    def norm_conv_grads(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm: GroupNorm,
        weight: Tensor,
        flag: MaybeTensor,
        has_bias: bool,
        padding: tuple[int, ...],
        mask: Sequence[bool],
    ) -> tuple[MaybeTensor, ...]:
        call = NormConvGradsCall(self, dy, x, mean, rstd, norm, weight, has_bias, padding, mask)
        dh, dweight, dbias = NORM_CONV_BWD(call)
        upstream = (None,) * 5 if dh is None else norm_grads(self, dh, x, mean, rstd, norm)
        return *upstream, dweight, dbias

    def linear_gate_residual(
        self,
        h: Tensor,
        weight: Tensor,
        bias: MaybeTensor,
        gate: MaybeTensor,
        residual: MaybeTensor,
        activation: str | None,
        zero_skip: int,
        save_branch: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = LinearGateCall(self, h, weight, bias, gate, residual, activation, zero_skip, save_branch)
        return *library_linear_gate(call), skipped(h, EXECUTED)
