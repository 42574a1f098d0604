"""Triton's own convolutions and linear layers, in the configurations that a plan chooses among (kernels/_gemm.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .._layout import channels_last_format
from ..kernels import _dtypes, _gemm
from ..kernels import activation as _activation
from ..kernels import conv_residual as _conv
from ..kernels import group_norm_silu_conv_residual as _norm_conv
from ..kernels import linear_gate_residual as _linear
from ..plan.describe import dtype_name
from ..steps.flag import may_test
from ..steps.linear import LinearGateCall
from .base import GroupNorm, MaybeTensor
from .flagged import FlaggedSteps

# What a plan may choose among, by name; compiled ahead of time in CI (COMPILE_CASES of the kernels).
GEMMS = {f"{c.BM}x{c.BN}x{c.BK}": c for c in (*_gemm.HALF, *_gemm.FULL)}
FOLDS = [name for name, c in GEMMS.items() if any(c in _gemm.folding_configs(d) for d in _dtypes.DTYPES)]
WGRADS = [name for name, c in GEMMS.items() if any(c in _conv.wgrad_configs(d) for d in _dtypes.DTYPES)]


def _launch_plan(config: str | None, x: Tensor, weight: Tensor, rows: int) -> tuple[_gemm.Config, int] | None:
    """(configuration, splits): the reduction is split under the smallest tiles alone. None: the kernel's own rule."""
    if config is None:
        return None
    found, shipped = GEMMS[config], _gemm.configs(x.dtype)
    if found != shipped[-1]:
        return found, 1
    return _gemm.choose(rows, weight.shape[0], weight.shape[1:].numel(), (found,), x.device)


class TritonGemms(FlaggedSteps):
    def linear(self, x: Tensor, weight: Tensor, bias: MaybeTensor, activation: str | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        return y if activation is None else _activation.forward(y, activation, None)

    def gemm_by_size(self, x: Tensor, weight: Tensor, rows: int) -> str:
        """The name of the configuration that the launchers take for rows x weight before anything is measured."""
        config, _ = _gemm.choose(rows, weight.shape[0], weight.shape[1:].numel(), _gemm.configs(x.dtype), x.device)
        return f"{config.BM}x{config.BN}x{config.BK}"

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
        if config is not None and GEMMS[config] not in _gemm.configs(weight.dtype):
            return f"no configuration for {dtype_name(weight)}"
        if not may_test(weight) or (gate is not None and not may_test(gate)):
            return "the weight is not a plain tensor"
        if op == "linear_gate_residual":
            return _linear.why_not(h, weight, gate, residual)
        reason = _conv.why_not(h, weight, residual)
        if reason is None and channels_last_format(h) is None and channels_last_format(weight) is None:
            reason = "the own convolution is channels-last, neither the input nor the weight is"
        return reason

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
        plan = _launch_plan(config, h, weight, math.prod(_conv.output_size(h, weight, padding)) // weight.shape[0])
        return _conv.conv_residual(h, weight, bias, residual, padding, flag, plan)

    def own_conv_dgrad(
        self, dy: Tensor, weight: Tensor, padding: Sequence[int], flag: MaybeTensor, config: str | None = None
    ) -> Tensor:
        plan = None
        if config is not None:
            kernel = zip(dy.shape[2:], weight.shape[2:], padding, strict=True)
            pixels = dy.shape[0] * math.prod(n + k - 1 - 2 * p for n, k, p in kernel)
            plan = _launch_plan(config, dy, weight.transpose(0, 1), pixels)
        return _conv.conv_dgrad(dy, weight, padding, flag, plan)

    def own_conv_wgrad(
        self, dy: Tensor, h: Tensor, weight: Tensor, padding: Sequence[int], config: str | None = None
    ) -> Tensor:
        return _conv.conv_wgrad(dy, h, weight.shape, padding, None if config is None else GEMMS[config])

    def why_not_folded(self, x: Tensor, weight: Tensor, residual: MaybeTensor, keep: MaybeTensor) -> str | None:
        return _norm_conv.why_not(x, weight, residual, keep)

    def folded_norm_conv(
        self,
        x: Tensor,
        norm: GroupNorm,
        weight: Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        padding: Sequence[int],
        flag: MaybeTensor,
        config: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(y, mean, rstd) of a norm that the convolution's loader applies."""
        groups, norm_weight, norm_bias, eps, scale, shift, _, _ = norm
        folded = groups, norm_weight, norm_bias, eps, scale, shift
        plan = GEMMS[config], 1
        return _norm_conv.group_norm_silu_conv_residual(x, *folded, weight, bias, residual, padding, flag, plan=plan)

    def group_moments(self, x: Tensor, num_groups: int, eps: float, flag: MaybeTensor = None) -> tuple[Tensor, Tensor]:
        """mean and rstd [N, G] of a channels-last x, read once."""
        pixels, partial = x.shape[2:].numel(), _norm_conv.tile_moments(x, flag)
        tile = _norm_conv.TILE_PIXELS
        return _norm_conv.statistics(partial, tile, pixels, num_groups, None, None, eps, flag=flag)[:2]

    def own_linear_gate(
        self, call: LinearGateCall, flag: MaybeTensor, config: str | None = None
    ) -> tuple[Tensor, Tensor]:
        backend, h, weight, bias, gate, residual, activation, _, save_branch = call
        a = (h if activation is None else backend.activation(h, activation, flag)).to(weight.dtype)
        plan = _launch_plan(config, a, weight, h.numel() // max(1, h.shape[-1]))
        y, branch = _linear.linear_gate_residual(a, weight, bias, gate, residual, flag, save_branch, plan)
        return y, y.new_empty(0, dtype=weight.dtype) if branch is None else branch
