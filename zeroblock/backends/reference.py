"""The backend in plain PyTorch: forward by reference.py, backward by explicit formulas, any device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference as ref
from ..plan.planned import Explanation
from ..reference import channel_view, compute_dtype, modulation
from .base import MaybeTensor
from .reference_images import ImageNorms, in_format_of


def sum_to(grad: Tensor, operand: Tensor) -> Tensor:
    """A full [B, T, D] gradient reduced to the shape and dtype of its operand."""
    if operand.dim() == 2:
        grad = grad.sum(1)
    elif operand.dim() == 1:
        grad = grad.flatten(0, -2).sum(0) if operand.numel() > 1 else grad.sum().reshape(1)
    return grad.to(operand.dtype, copy=grad.dim() == 3).reshape(operand.shape).contiguous()


def sum_to_maybe(grad: Tensor, operand: MaybeTensor) -> MaybeTensor:
    return None if operand is None else sum_to(grad, operand)


def normalised_rows(x: Tensor, mean: MaybeTensor, rstd: Tensor) -> Tensor:
    """(x - mean) * rstd of [B, T, D], in the dtype of the statistics."""
    wide = x.to(rstd.dtype)
    return (wide if mean is None else wide - mean[..., None]) * rstd[..., None]


def gate_residual_bwd(
    dy: Tensor, gate: Tensor, branch: Tensor, need_dgate: bool, need_dbranch: bool
) -> tuple[MaybeTensor, MaybeTensor]:
    """The gradients of (gate, branch) of residual + gate * branch; differentiable to any order."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    dy = dy.to(wide)
    dgate = sum_to(dy * branch.to(wide), gate) if need_dgate else None
    return dgate, in_format_of(branch, (dy * modulation(gate).to(wide)).to(branch.dtype)) if need_dbranch else None


class Reference(ImageNorms):
    name = "reference"

    def why_no_zero_path(self, op: str, arguments: dict[str, Any], plans: Sequence[Explanation]) -> str | None:
        return "the reference has no kernels of its own"

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
        if rms:
            rstd = (x.to(compute_dtype(x)).square().mean(dim=-1) + eps).rsqrt()
            return ref.rms_norm_modulate(x, shift, scale, eps=eps, weight=weight).contiguous(), None, rstd
        mean, rstd = ref.row_moments(x, eps)
        y = ref.layer_norm_modulate(x, shift, scale, eps=eps, weight=weight, bias=bias)
        return y.contiguous(), mean, rstd

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
        """dx = rstd * (g - mean(g) - xhat * mean(g xhat)) with g the gradient of xhat; rms has no mean(g) term."""
        xhat = normalised_rows(x, mean, rstd)
        affine = xhat if weight is None else xhat * weight.to(xhat.dtype)
        if bias is not None:
            affine = affine + bias.to(xhat.dtype)
        dy = dy.to(xhat.dtype)
        da = dy if scale is None else dy * (1 + modulation(scale).to(xhat.dtype))
        g = da if weight is None else da * weight.to(xhat.dtype)
        dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
        if not rms:
            dx = dx - g.mean(-1, keepdim=True)
        return (
            (rstd[..., None] * dx).to(x.dtype).contiguous(),
            sum_to_maybe(dy, shift),
            sum_to_maybe(dy * affine, scale),
            None if weight is None else sum_to(da * xhat, weight),
            sum_to_maybe(da, bias),
        )

    def gate_residual(self, residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return in_format_of(residual, ref.gate_residual(residual, gate, branch))

    def gate_residual_bwd(
        self, dy: Tensor, gate: Tensor, branch: Tensor, need_dgate: bool, need_dbranch: bool
    ) -> tuple[MaybeTensor, MaybeTensor]:
        return gate_residual_bwd(dy, gate, branch, need_dgate, need_dbranch)

    def gate_residual_layer_norm_modulate(
        self, residual: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_new = self.gate_residual(residual, gate, branch).contiguous()
        y, mean, rstd = self.layer_norm_modulate(x_new, shift, scale, None, None, eps, False)
        assert mean is not None
        return x_new, y, mean, rstd

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
        dx, dshift, dscale, _, _ = self.layer_norm_modulate_bwd(dy, x_new, mean, rstd, shift, scale, None, None, False)
        dresidual = dx if dx_new is None else dx + dx_new
        dgate, dbranch = self.gate_residual_bwd(dresidual, gate, branch, True, True)
        assert dgate is not None and dbranch is not None and dshift is not None and dscale is not None
        return dresidual.contiguous(), dgate, dbranch, dshift, dscale

    def activation(self, x: Tensor, name: str, flag: MaybeTensor = None) -> Tensor:
        return ref.apply_activation(x, name)

    def activation_bwd(self, dy: Tensor, x: Tensor, name: str, need_y: bool) -> tuple[Tensor, MaybeTensor]:
        y = ref.apply_activation(x, name) if need_y else None
        if name == "silu":
            return torch.ops.aten.silu_backward(dy, x), y
        return torch.ops.aten.gelu_backward(dy, x, approximate="tanh" if name == "gelu_tanh" else "none"), y

    def add_bias(self, x: Tensor, bias: MaybeTensor, dim: int) -> Tensor:
        # Zero products are +0: a bias of -0 comes out of the layer as +0.
        return x + (0.0 if bias is None else bias + 0.0 if dim == -1 else channel_view(bias + 0.0, x.dim()))

    def linear(self, x: Tensor, weight: Tensor, bias: MaybeTensor, activation: str | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        return y if activation is None else ref.apply_activation(y, activation)

    def is_zero(self, t: Tensor) -> bool:
        return bool(ref.is_zero(t)[0])

    def are_zero(self, tensors: list[Tensor]) -> Tensor:
        return ref.is_zero(*tensors)


REFERENCE = Reference()
