"""What the Triton and CUDA backends have in common: convolutions and linears of their own, which read a flag.

Where an op tests its weight on the device (zero_skip DEVICE) and the backend's own kernel takes the call, that kernel
runs and leaves early while the weight is zero. Every other call is the library's (`dense.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..plan.planned import Explanation
from ..steps.conv_bwd import CONV_BWD, ConvGradsCall
from ..steps.flag import DEVICE
from ..steps.linear import LinearGateCall
from ..steps.norm_conv import norm_grads, normalised
from .base import ConvGrads, GroupNorm, MaybeTensor
from .dense import ConvArguments, DenseSteps


class FlaggedSteps(DenseSteps):
    """`config` names a configuration in which a plan may ask for a kernel; None: the launcher's own choice."""

    def why_not_own(
        self,
        op: str,
        h: Tensor,
        weight: Tensor,
        gate: MaybeTensor,
        residual: MaybeTensor,
        padding: Sequence[int] | None,
        config: str | None = None,
    ) -> str | None:
        """Why the own kernel of an op ("conv_residual" or "linear_gate_residual") does not take a call, else None."""
        raise NotImplementedError

    def own_conv(
        self,
        h: Tensor,
        weight: Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        padding: Sequence[int],
        flag: MaybeTensor,
        config: str | None = None,
    ) -> Tensor:
        """residual + conv(h), stride 1; a flag that is set leaves residual + bias."""
        raise NotImplementedError

    def own_conv_dgrad(
        self, dy: Tensor, weight: Tensor, padding: Sequence[int], flag: MaybeTensor, config: str | None = None
    ) -> Tensor:
        """The gradient of conv(h) by h, 0 where the flag is set."""
        raise NotImplementedError

    def own_linear_gate(
        self, call: LinearGateCall, flag: MaybeTensor, config: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """(y, branch) of the call; its activation by the call's backend."""
        raise NotImplementedError

    def why_no_zero_path(self, op: str, arguments: dict[str, Any], plans: Sequence[Explanation]) -> str | None:
        weight = arguments["weight"]
        if op == "linear_gate_residual":
            return self.why_not_own(op, arguments["h"], weight, arguments["gate"], arguments["residual"], None)
        a = ConvArguments.of(op, arguments)
        return self.why_not_own("conv_residual", a.x, weight, None, a.residual, a.padding)

    # ---- the steps ----------------------------------------------------------------------------------------------

    def _reads_flag(
        self, zero_skip: int, h: Tensor, weight: Tensor, residual: MaybeTensor, padding: Sequence[int]
    ) -> bool:
        """Whether the weight is tested on the device and the own convolution, which reads the flag, runs."""
        if zero_skip != DEVICE:
            return False
        return self.why_not_own("conv_residual", h, weight, None, residual, padding) is None

    def conv_residual(
        self,
        h: Tensor,
        weight: Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        padding: tuple[int, ...],
        zero_skip: int,
    ) -> tuple[Tensor, Tensor]:
        if not self._reads_flag(zero_skip, h, weight, residual, padding):
            return super().conv_residual(h, weight, bias, residual, padding, zero_skip)
        flag = self.zero_flag([weight])
        return self.own_conv(h, weight, bias, residual, padding, flag), flag

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
        if flag is None or not mask[0] or not self._reads_flag(DEVICE, h, weight, None, padding):
            return super().conv_grads(dy, h, weight, flag, has_bias, padding, mask)
        rest = (False, mask[1], mask[2])
        _, dweight, dbias = CONV_BWD(ConvGradsCall(self, dy, h, weight, has_bias, padding, rest))
        return self.own_conv_dgrad(dy, weight, padding, flag), dweight, dbias

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
        if not self._reads_flag(zero_skip, x, weight, residual, padding):
            return super().norm_conv_residual(x, norm, weight, bias, residual, padding, zero_skip)
        flag = self.zero_flag([weight])
        h, mean, rstd = normalised(self, x, norm, weight.dtype, flag)
        return self.own_conv(h, weight, bias, residual, padding, flag), mean, rstd, flag

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
        if flag is None:
            return super().norm_conv_grads(dy, x, mean, rstd, norm, weight, flag, has_bias, padding, mask)
        # The gradient of h takes only the shape of h.
        h = normalised(self, x, norm, weight.dtype)[0] if mask[1] else x.to(weight.dtype)
        dh, dweight, dbias = self.conv_grads(dy, h, weight, flag, has_bias, padding, mask)
        if dh is None:
            return None, None, None, None, None, dweight, dbias
        read = flag if self._reads_flag(DEVICE, h, weight, None, padding) else None
        return *norm_grads(self, dh, x, mean, rstd, norm, read), dweight, dbias

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
        if zero_skip != DEVICE or self.why_not_own("linear_gate_residual", h, weight, gate, residual, None) is not None:
            return super().linear_gate_residual(*call[1:])
        flag = self.zero_flag(call.tested())
        return *self.own_linear_gate(call, flag), flag
