"""The GPU's backend: every step planned between the library's kernels, Triton's and CUDA C++'s.

Norms, gates and activations are the planned steps themselves (`norms_gates.py`); a call of one goes straight to the way
that was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...plan.mode import is_fixed
from ...plan.planned import Explanation
from ...steps.flag import DEVICE, NEVER
from ...steps.hint import describe, seen_zero
from ...steps.linear import LinearGateCall
from ...steps.norm_conv import norm_grads, normalised
from .. import available
from ..base import Backend, ConvGrads, GroupNorm, MaybeTensor, Step
from ..eager import EAGER
from ..reference import Reference
from ..residual_norm import Branch, Needed, Norm, ResidualNormGrads, Stats
from . import norms_gates
from .conv_grads import CONV_DGRAD, CONV_WGRAD, FLAGGED_DGRAD, DgradCall, WgradCall
from .convs import (
    CONV_RESIDUAL,
    HINTED_CONV,
    HINTED_NORM_CONV,
    NORM_CONV_RESIDUAL,
    FlaggedConvCall,
    FlaggedNormConvCall,
)
from .explain import steps_of, why_not_flagged
from .linear import HINTED_LINEAR, LINEAR_GATE_RESIDUAL


def _first(op: str, x: Tensor) -> Backend:
    """The first backend with kernels for a step that is not planned, else eager's."""
    name = next((b for b in ("triton", "cuda") if available.why_not(b, op, x) is None), None)
    found = None if name is None else available.gpu_backend(name)
    return EAGER if found is None else found


def _to_read(flag: MaybeTensor, weight: Tensor) -> MaybeTensor:
    """Forward's flag where backward's kernels are to read it. Compiled graphs do not tell whether forward's did: there
    the hint chooses once more."""
    return None if is_fixed() and not seen_zero(weight) else flag


class Gpu(Reference):
    """An op without a planned step runs the reference's."""

    name = "planned"
    device = "cuda"

    group_norm_silu = norms_gates.GROUP_NORM_SILU
    group_norm_silu_bwd = norms_gates.GROUP_NORM_SILU_BWD
    channel_rms_norm_silu = norms_gates.CHANNEL_RMS_NORM_SILU
    channel_rms_norm_silu_bwd = norms_gates.CHANNEL_RMS_NORM_SILU_BWD
    layer_norm_modulate = norms_gates.LAYER_NORM_MODULATE
    layer_norm_modulate_bwd = norms_gates.LAYER_NORM_MODULATE_BWD
    gate_residual = norms_gates.GATE_RESIDUAL
    gate_residual_bwd = norms_gates.GATE_RESIDUAL_BWD
    gate_residual_layer_norm_modulate = norms_gates.GATE_RESIDUAL_LAYER_NORM_MODULATE
    gate_residual_layer_norm_modulate_bwd = norms_gates.GATE_RESIDUAL_LAYER_NORM_MODULATE_BWD
    residual_norm_modulate = norms_gates.RESIDUAL_NORM_MODULATE
    activation = norms_gates.ACTIVATION
    activation_bwd = norms_gates.ACTIVATION_BWD

    def steps(self, op: str, arguments: dict[str, Any], training: bool) -> Iterator[Step]:
        return steps_of(self, op, arguments, training)

    def why_no_zero_path(self, op: str, arguments: dict[str, Any], plans: Sequence[Explanation]) -> str | None:
        return why_not_flagged(self, op, arguments)

    def hint(self, weight: Tensor) -> str | None:
        return describe(weight)

    def residual_norm_modulate_bwd(
        self,
        dx_new: MaybeTensor,
        dy: MaybeTensor,
        x: MaybeTensor,
        stats: Stats,
        branch: Branch | None,
        norm: Norm | None,
        index: MaybeTensor,
        residual_dtype: torch.dtype,
        needed: Needed,
    ) -> ResidualNormGrads:
        like = x if branch is None else branch.branch
        assert like is not None
        return norms_gates.RESIDUAL_NORM_MODULATE_BWD(
            like, dx_new, dy, x, stats, branch, norm, index, residual_dtype, needed
        )

    def add_bias(self, x: Tensor, bias: MaybeTensor, dim: int) -> Tensor:
        return _first("add_bias", x).add_bias(x, bias, dim)

    def is_zero(self, t: Tensor) -> bool:
        return bool(self.are_zero([t])[0])

    def are_zero(self, tensors: list[Tensor]) -> Tensor:
        return _first("is_zero", tensors[0]).are_zero(tensors)

    def zero_flag(self, tensors: list[Tensor]) -> Tensor:
        return _first("is_zero", tensors[0]).zero_flag(tensors)

    def linear(self, x: Tensor, weight: Tensor, bias: MaybeTensor, activation: str | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        return y if activation is None else self.activation(y, activation, None)

    def norm_linear(self, h: Tensor, weight: Tensor, bias: MaybeTensor) -> Tensor:
        return LINEAR_GATE_RESIDUAL(LinearGateCall(self, h, weight, bias, None, None, None, NEVER, False))[0]

    def conv_residual(
        self,
        h: Tensor,
        weight: Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        padding: tuple[int, ...],
        zero_skip: int,
    ) -> tuple[Tensor, Tensor]:
        call = FlaggedConvCall(self, h, weight, bias, residual, padding, zero_skip)
        return HINTED_CONV(call) if zero_skip == DEVICE else CONV_RESIDUAL(call)

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
        dh = dweight = dbias = None
        flag = _to_read(flag, weight)
        if mask[0]:
            dgrad = CONV_DGRAD if flag is None else FLAGGED_DGRAD
            dh = dgrad(DgradCall(self, dy, h, weight, flag, padding))
        wanted = mask[1], mask[2] and has_bias
        if any(wanted):
            dweight, dbias = CONV_WGRAD(WgradCall(self, dy, h, weight, has_bias, padding, wanted))
        return dh, dweight, dbias

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
        call = FlaggedNormConvCall(self, x, norm, weight, bias, residual, padding, zero_skip)
        return HINTED_NORM_CONV(call) if zero_skip == DEVICE else NORM_CONV_RESIDUAL(call)

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
        flag = _to_read(flag, weight)
        # The gradient of h takes only the shape of h.
        h = normalised(self, x, norm, weight.dtype)[0] if mask[1] else x.to(weight.dtype)
        dh, dweight, dbias = self.conv_grads(dy, h, weight, flag, has_bias, padding, mask)
        upstream = (None,) * 5 if dh is None else norm_grads(self, dh, x, mean, rstd, norm, flag)
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
        return HINTED_LINEAR(call) if zero_skip == DEVICE else LINEAR_GATE_RESIDUAL(call)


GPU = Gpu()
