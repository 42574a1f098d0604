"""The backend of the native CPU kernels: settles layouts and dtypes, then calls the private C++ ops of csrc/torch.

Import this module only when the extension is loaded (`available.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout import (
    dense_rows,
    dense_view,
    gate_gradient,
    is_single,
    like,
    pointwise_format,
    tokens,
    untokens,
)
from .._version import NAMESPACE
from ..plan.planned import Explanation
from ..reference import promoted
from ..steps.linear import FEW_PRODUCTS, LINEAR, LinearCall
from ..steps.packed import is_frozen
from .base import MaybeTensor, Step, WinogradKernels
from .cpu_images import CpuImages, to_dtype
from .cpu_rows import CpuRows
from .dense import with_dtype

_native = getattr(torch.ops, NAMESPACE)
# Bound once: looking an overload up costs as much as a small kernel (benchmarks/overhead.py).
_layer_norm_modulate = _native._layer_norm_modulate.default
_layer_norm_modulate_bwd = _native._layer_norm_modulate_bwd.default
_two = _native._layer_norm_modulate_two.default
_two_bwd = _native._layer_norm_modulate_two_bwd.default
_gate_residual = _native._gate_residual.default
_gate_residual_bwd = _native._gate_residual_bwd.default
_gate_norm = _native._gate_residual_layer_norm_modulate.default
_gate_norm_bwd = _native._gate_residual_layer_norm_modulate_bwd.default
_activation = _native._activation.default
_activation_bwd = _native._activation_bwd.default
_add_bias = _native._add_bias.default
_add_bias_ = _native._add_bias_.default
_is_zero = _native._is_zero.default

_ACTIVATION_IDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def _operand(v: MaybeTensor, x: Tensor) -> MaybeTensor:
    """A per-token operand with dense rows, in the dtype of x or in fp32, which holds every other one; per-sample ones
    are converted by the binding."""
    if v is None or v.dim() != 3:
        return v
    return dense_rows(v if v.dtype is x.dtype else to_dtype(v, torch.float32))


def _gate(gate: Tensor, x: Tensor) -> Tensor:
    """A per-token gate with dense rows, in the dtype of x: x has come to the one that holds both."""
    rows = dense_rows(to_dtype(gate, x.dtype)) if gate.dim() == 3 else gate
    assert rows is not None
    return rows


def _gate_row(gate: Tensor, x: Tensor) -> Tensor:
    """The combined kernel takes rows only: a single gate becomes one row."""
    return gate.expand(x.shape[-1]).contiguous() if gate.dim() == 1 else _gate(gate, x)


class Cpu(CpuImages, CpuRows):
    """An op without a kernel here runs the reference's."""

    name = "cpu"
    uses_packed_linears = True
    winograd = WinogradKernels(
        conv=_native._winograd_conv.default,
        weight_grad=_native._winograd_weight_grad.default,
        pack=_native._winograd_pack.default,
        statistics=_native._group_norm_statistics.default,
        affine=_native._group_norm_affine.default,
    )
    residual_if_zero = _native._residual_if_zero.default

    def why_no_zero_path(self, op: str, arguments: dict[str, Any], plans: Sequence[Explanation]) -> str | None:
        return "the weight is tested on the host"

    def steps(self, op: str, arguments: dict[str, Any], training: bool) -> Iterator[Step]:
        if op in ("layer_norm_modulate_linear", "linear_gate_residual"):
            weight = arguments["weight"]
            h = with_dtype(arguments["h" if op == "linear_gate_residual" else "x"], weight.dtype)
            yield LINEAR, (LinearCall(self, h, weight, arguments["bias"], None),)
        yield from super().steps(op, arguments, training)

    def layer_norm_modulate(
        self,
        x: Tensor,
        shift: MaybeTensor,
        scale: MaybeTensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        eps: float,
        rms: bool,
    ) -> tuple[Tensor, MaybeTensor, Tensor]:
        x = x.contiguous()
        y, mean, rstd = _layer_norm_modulate(x, _operand(shift, x), _operand(scale, x), weight, bias, eps, rms)
        return y, None if rms else mean, rstd

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
    ) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
        x, dy = x.contiguous(), to_dtype(dy, x.dtype).contiguous()
        row_shift = shift if shift is None or shift.dim() == 2 else None
        grads = _layer_norm_modulate_bwd(dy, x, mean, rstd, row_shift, _operand(scale, x), weight, bias, rms)
        if row_shift is shift and (scale is None or grads[2].dtype is scale.dtype):
            return grads
        dx, dshift, dscale, dweight, dbias = grads
        # The gradient of a per-token shift is dy, as a tensor of its own.
        dshift = dshift if row_shift is shift else like(dy.clone(), shift)
        return dx, dshift, like(dscale, scale), dweight, dbias

    def norm_modulate_two(
        self,
        x: Tensor,
        shift: MaybeTensor,
        scale: MaybeTensor,
        shift2: MaybeTensor,
        scale2: MaybeTensor,
        eps: float,
        rms: bool,
    ) -> tuple[Tensor, Tensor, MaybeTensor, Tensor]:
        return _two(x.contiguous(), shift, scale, shift2, scale2, eps, rms)  # type: ignore[no-any-return]

    def norm_modulate_two_bwd(
        self,
        dy: Tensor,
        dy2: Tensor,
        x: Tensor,
        mean: MaybeTensor,
        rstd: Tensor,
        shift: MaybeTensor,
        scale: MaybeTensor,
        shift2: MaybeTensor,
        scale2: MaybeTensor,
        rms: bool,
    ) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
        grads = (dy.contiguous(), dy2.contiguous(), x.contiguous(), mean, rstd)
        return _two_bwd(*grads, shift, scale, shift2, scale2, rms)  # type: ignore[no-any-return]

    def gate_residual(self, residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        one_dtype = residual.dtype == branch.dtype == gate.dtype
        if gate.dim() == 2 and one_dtype and residual.is_contiguous() and branch.is_contiguous():
            return _gate_residual(residual, gate, branch)
        dtype = promoted(residual, gate, branch)
        layout, single = pointwise_format(residual), is_single(gate)
        branch = tokens(branch.to(dtype), single, layout)
        y = _gate_residual(tokens(residual.to(dtype), single, layout), _gate(gate, branch), branch)
        return untokens(y, residual.shape, layout)

    def gate_residual_bwd(
        self, dy: Tensor, gate: Tensor, branch: Tensor, need_dgate: bool, need_dbranch: bool
    ) -> tuple[MaybeTensor, MaybeTensor]:
        one_dtype = dy.dtype == branch.dtype == gate.dtype
        if gate.dim() == 2 and one_dtype and dy.is_contiguous() and branch.is_contiguous():
            return _gate_residual_bwd(dy, gate, branch, need_dgate, need_dbranch)
        layout, single = pointwise_format(branch), is_single(gate)
        flat, dy = tokens(branch.to(dy.dtype), single, layout), tokens(dy, single, layout)
        dgate, dbranch = _gate_residual_bwd(dy, _gate(gate, flat), flat, need_dgate, need_dbranch)
        return (
            gate_gradient(dgate, gate) if need_dgate else None,
            untokens(dbranch, branch.shape, layout).to(branch.dtype) if need_dbranch else None,
        )

    def gate_residual_layer_norm_modulate(
        self, residual: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        branch, residual = branch.contiguous(), residual.contiguous()
        shift_rows, scale_rows = _operand(shift, branch), _operand(scale, branch)
        return _gate_norm(residual, _gate_row(gate, branch), branch, shift_rows, scale_rows, eps)

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        branch = branch.contiguous()
        dx_new = None if dx_new is None else dx_new.contiguous()
        rows = _gate_row(gate, branch), branch, _operand(shift, branch), _operand(scale, branch)
        grads = _gate_norm_bwd(dx_new, dy.contiguous(), x_new, mean, rstd, *rows)
        if gate.dim() == shift.dim() == scale.dim() == 2:
            return grads
        dresidual, dgate, dbranch, dshift, dscale = grads
        if is_single(gate):
            dgate = dgate.sum().view(1)
        dshift = dy.clone(memory_format=torch.contiguous_format) if shift.dim() == 3 else dshift
        return dresidual, gate_gradient(dgate, gate), dbranch, dshift.to(shift.dtype), dscale.to(scale.dtype)

    def activation(self, x: Tensor, name: str, flag: MaybeTensor = None) -> Tensor:
        return _activation(x.contiguous(), _ACTIVATION_IDS[name])

    def activation_bwd(self, dy: Tensor, x: Tensor, name: str, need_y: bool) -> tuple[Tensor, MaybeTensor]:
        return _activation_bwd(dy.contiguous(), x.contiguous(), _ACTIVATION_IDS[name], need_y)

    def add_bias(self, x: Tensor, bias: MaybeTensor, dim: int) -> Tensor:
        return _add_bias(x, bias, dim == -1 or not x.is_contiguous())

    def add_bias_in_place(self, x: Tensor, bias: MaybeTensor, dim: int) -> Tensor:
        _add_bias_(x, bias, dim == -1 or not x.is_contiguous())
        return x

    def linear(self, x: Tensor, weight: Tensor, bias: MaybeTensor, activation: str | None = None) -> Tensor:
        if x.numel() * weight.shape[0] <= FEW_PRODUCTS and not is_frozen(weight):  # the library's, by every rule
            y = F.linear(x, weight, bias)
            return y if activation is None else self.activation(y, activation)
        return LINEAR(LinearCall(self, x, weight, bias, activation))

    def is_zero(self, t: Tensor) -> bool:
        if t.is_contiguous():
            return _is_zero(t)
        # Of rows with gaps between them (a part of a modulation) the first one mostly tells, and needs no copy.
        if t.dim() > 1 and t.shape[0] > 0 and not self.is_zero(t.select(0, 0)):
            return False
        return _is_zero(dense_view(t))

    def are_zero(self, tensors: list[Tensor]) -> Tensor:
        return torch.tensor([self.is_zero(t) for t in tensors], dtype=torch.bool)


CPU = Cpu()
