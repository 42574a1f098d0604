"""The backend of the Triton kernels: settles layouts and dtypes, then calls the launchers of `zeroblock.kernels`.

It takes CUDA and ROCm tensors, or, in an interpreting process, CPU tensors. Import this module only when triton is
installed (`available.py`).
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .._layout import as_layout, as_norm_input, dense_rows, dense_view, is_single, pointwise_format
from ..kernels import _row_tiles
from ..kernels import activation as _activation
from ..kernels import add_bias as _add_bias
from ..kernels import channel_rms_norm_silu as _channel_norm
from ..kernels import gate_residual as _gate_residual
from ..kernels import gate_residual_layer_norm_modulate as _gate_norm
from ..kernels import group_norm_silu as _group_norm
from ..kernels import group_norm_silu_bwd as _group_norm_bwd
from ..kernels import layer_norm_modulate as _layer_norm
from ..kernels._group_tiles import ALONE, held
from ..kernels.zero_flag import zero_flag as _zero_flag
from ..reference import promoted
from .base import MaybeTensor
from .reference import Reference
from .triton_gemms import TritonGemms
from .triton_rows import TritonRows

# The second and third dimension of a grid go to 65535: samples, and blocks of 4096 elements under a single gate.
_MOST_SAMPLES, _MOST_GATED = 65535, 65535 * 4096
INTERPRETS: bool = not isinstance(_activation._forward, triton.JITFunction)

# Numbers that a thread holds, by method: the launcher's own choice, then what a plan may choose as well.
PER_THREAD: dict[str, tuple[int, ...]] = {
    "layer_norm_modulate": _row_tiles.FORWARD_PER_THREAD,
    "layer_norm_modulate_bwd": _row_tiles.BACKWARD_PER_THREAD,
    "gate_residual": _gate_residual.PER_THREAD,
    "gate_residual_bwd": _gate_residual.PER_THREAD,
    "gate_residual_layer_norm_modulate": _row_tiles.FORWARD_PER_THREAD,
    "gate_residual_layer_norm_modulate_bwd": _row_tiles.BACKWARD_PER_THREAD,
}


def splits(N: int, C: int, pixels: int, num_groups: int, size: int, backward: bool) -> bool:
    """Whether the kernels of a channels-last group norm read it twice."""
    table, alone = (_group_norm_bwd.HELD, ALONE // 2) if backward else (_group_norm.HELD, ALONE)
    return held(N, C // num_groups, pixels, num_groups, True, size, table, alone) is None


def why_not_tile(op: str, x: Tensor) -> str | None:
    """Why a call of a norm or gate has one choice of `per_thread`, else None."""
    return _row_tiles.why_not_tile(x.shape[-1]) if "layer_norm" in op else None


def _per_token_shift_grad(dy: Tensor, shift: Tensor, dshift: Tensor) -> Tensor:
    """The gradient of a per-token shift is dy, as a tensor of its own."""
    return dshift if shift.dim() == 2 else dy.to(shift.dtype, copy=True, memory_format=torch.contiguous_format)


def _gate_layout(gate: Tensor, x: Tensor) -> torch.memory_format | None:
    """A single gate takes the elements of x in any dense order, other gates rows of tokens."""
    return pointwise_format(x) if is_single(gate) else None


def _gate_rows(gate: Tensor, x: Tensor) -> Tensor:
    """The combined kernel takes a gate per sample or token: one that all samples share is a row of stride 0, in fp32,
    so that the samples' gradients are added up before they are rounded."""
    if gate.dim() > 1:
        return gate if gate.stride(-1) == 1 else gate.contiguous()
    return gate.float().expand(x.shape[-1]).contiguous().expand(x.shape[0], -1)


def _gate_grad(dgate: Tensor, gate: Tensor) -> Tensor:
    """From the rows of `_gate_rows`."""
    if gate.dim() > 1:
        return dgate
    return (dgate.sum(0) if gate.numel() > 1 else dgate.sum()).to(gate.dtype).view(gate.shape)


class Triton(TritonGemms, TritonRows, Reference):
    """An op without a kernel here runs the reference's."""

    name = "triton"
    device = "cpu" if INTERPRETS else "cuda"

    def why_not(self, op: str, x: Tensor) -> str | None:
        if op == "is_zero":
            return None
        if op.startswith("residual_norm"):
            return self._why_not_rows(x)
        if x.shape[0] > _MOST_SAMPLES and x.dim() > 1:
            return f"{x.shape[0]} samples are more than the {_MOST_SAMPLES} of a grid"
        if op.startswith("gate_residual") and x.numel() > _MOST_GATED:
            return f"{x.numel()} elements are more than the {_MOST_GATED} of a grid"
        if op.startswith("channel_rms_norm"):
            return _channel_norm.why_not_channels(x.shape[1])
        return self._why_not_rows(x) if "layer_norm" in op or "rms_norm" in op else None

    def _why_not_rows(self, x: Tensor) -> str | None:
        D = x.shape[-1]
        if D <= _layer_norm.MAX_D:
            return None
        return f"rows of {D} elements are longer than the {_layer_norm.MAX_D} that a program holds"

    # ---- norms --------------------------------------------------------------------------------------------------

    def group_norm_silu(
        self,
        x: Tensor,
        num_groups: int,
        weight: MaybeTensor,
        bias: MaybeTensor,
        eps: float,
        scale: MaybeTensor,
        shift: MaybeTensor,
        silu: bool,
        flag: MaybeTensor = None,
        *,
        split: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = [dense_rows(v) for v in (weight, bias)], [dense_rows(v) for v in (scale, shift)]
        x, last = as_norm_input(x)
        return _group_norm.forward(x, num_groups, *rows[0], eps, *rows[1], silu, last, flag, split=split)

    def group_norm_silu_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        scale: MaybeTensor,
        shift: MaybeTensor,
        num_groups: int,
        silu: bool,
        flag: MaybeTensor = None,
        *,
        split: bool | None = None,
    ) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
        layout = pointwise_format(x)
        x, dy, last = as_layout(x, layout), as_layout(dy.to(x.dtype), layout), layout is not None
        rows = [dense_rows(v) for v in (weight, bias, scale, shift)]
        return _group_norm_bwd.backward(dy, x, mean, rstd, *rows, num_groups, silu, last, flag, split=split)

    def channel_rms_norm_silu(
        self,
        x: Tensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        eps: float,
        eps_inside: bool,
        scale: MaybeTensor,
        shift: MaybeTensor,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        x, last = as_norm_input(x)
        weight, bias, scale, shift = (dense_rows(v) for v in (weight, bias, scale, shift))
        return _channel_norm.forward(x, weight, bias, eps, eps_inside, scale, shift, silu, last)

    def channel_rms_norm_silu_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        rstd: Tensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        scale: MaybeTensor,
        shift: MaybeTensor,
        silu: bool,
    ) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
        layout = pointwise_format(x)
        x, dy, last = as_layout(x, layout), as_layout(dy.to(x.dtype), layout), layout is not None
        rows = [dense_rows(v) for v in (weight, bias, scale, shift)]
        return _channel_norm.backward(dy, x, rstd, *rows, silu, last)

    def layer_norm_modulate(
        self,
        x: Tensor,
        shift: MaybeTensor,
        scale: MaybeTensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        eps: float,
        rms: bool,
        **tile: int,
    ) -> tuple[Tensor, MaybeTensor, Tensor]:
        rows = [dense_rows(v) for v in (shift, scale, weight, bias)]
        return _layer_norm.forward(x.contiguous(), *rows, eps, rms, **tile)

    def layer_norm_modulate_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        mean: MaybeTensor,
        rstd: Tensor,
        shift: MaybeTensor,
        scale: MaybeTensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        rms: bool,
        **tile: int,
    ) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
        x, dy = x.contiguous(), dy.to(x.dtype).contiguous()
        rows = [dense_rows(v) for v in (scale, weight, bias)]
        dx, dshift, *grads = _layer_norm.backward(dy, x, mean, rstd, shift, *rows, rms, **tile)
        return dx, dshift if shift is None else _per_token_shift_grad(dy, shift, dshift), *grads

    # ---- gates --------------------------------------------------------------------------------------------------

    def gate_residual(self, residual: Tensor, gate: Tensor, branch: Tensor, **tile: int) -> Tensor:
        dtype = promoted(residual, gate, branch)
        if dtype == torch.float64:
            return super().gate_residual(residual, gate, branch)
        layout = _gate_layout(gate, residual)
        residual, branch = as_layout(residual, layout), as_layout(branch, layout)
        return _gate_residual.forward(residual, dense_rows(gate), branch, dtype, **tile)

    def gate_residual_bwd(
        self, dy: Tensor, gate: Tensor, branch: Tensor, need_dgate: bool, need_dbranch: bool, **tile: int
    ) -> tuple[MaybeTensor, MaybeTensor]:
        layout = _gate_layout(gate, branch)
        dy, branch = as_layout(dy, layout), as_layout(branch, layout)
        return _gate_residual.backward(dy, dense_rows(gate), branch, need_dgate, need_dbranch, **tile)

    def gate_residual_layer_norm_modulate(
        self, residual: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float, **tile: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        branch, residual = branch.contiguous(), residual.contiguous()
        gate, shift_rows, scale_rows = _gate_rows(gate, branch), dense_rows(shift), dense_rows(scale)
        return _gate_norm.forward(residual, gate, branch, shift_rows, scale_rows, eps, **tile)

    def gate_residual_layer_norm_modulate_bwd(
        self,
        dx_new: MaybeTensor,
        dy: Tensor,
        x_new: Tensor,
        mean: Tensor,
        rstd: Tensor,
        gate: Tensor,
        branch: Tensor,
        shift: Tensor,
        scale: Tensor,
        **tile: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        dy = dy.contiguous()
        dx_new = None if dx_new is None else dx_new.contiguous()
        operands = _gate_rows(gate, branch), branch.contiguous(), shift, dense_rows(scale)
        dresidual, dgate, dbranch, dshift, dscale = _gate_norm.backward(
            dx_new, dy, x_new, mean, rstd, *operands, **tile
        )
        return dresidual, _gate_grad(dgate, gate), dbranch, _per_token_shift_grad(dy, shift, dshift), dscale

    # ---- activations, biases, the zero test ---------------------------------------------------------------------

    def activation(self, x: Tensor, name: str, flag: MaybeTensor = None) -> Tensor:
        return _activation.forward(x.contiguous(), name, flag)

    def activation_bwd(self, dy: Tensor, x: Tensor, name: str, need_y: bool) -> tuple[Tensor, MaybeTensor]:
        return _activation.backward(dy.contiguous(), x.contiguous(), name, need_y)

    def add_bias(self, x: Tensor, bias: MaybeTensor, dim: int, residual: MaybeTensor = None) -> Tensor:
        """With a residual, which has the strides of x, x + bias + residual in place."""
        innermost = dim == -1 or not x.is_contiguous()
        columns = x.shape[dim] if innermost else math.prod(x.shape[2:])
        return _add_bias.add_bias(x, dense_rows(bias), columns, innermost, residual)

    def is_zero(self, t: Tensor) -> bool:
        return bool(self.are_zero([t]))

    def are_zero(self, tensors: list[Tensor]) -> Tensor:
        return _zero_flag([dense_view(t) for t in tensors], False) != 0

    def zero_flag(self, tensors: list[Tensor]) -> Tensor:
        return _zero_flag([dense_view(t) for t in tensors], True)


TRITON = Triton()
