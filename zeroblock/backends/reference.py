"""The backend in plain PyTorch: forward by reference.py, backward by explicit formulas, any device and dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference as ref
from .._layout import in_layout, pointwise_format
from ..plan.planned import Explanation
from ..reference import channel_view, compute_dtype, modulation
from . import reference_rows
from .base import MaybeTensor
from .dense import DenseSteps
from .residual_norm import Branch, Needed, Norm, ResidualNorm, ResidualNormGrads, Stats


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory format in which the ops return results for x."""
    return in_layout(y, pointwise_format(x))


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


class Reference(DenseSteps):
    name = "reference"

    def why_no_zero_path(self, op: str, arguments: dict[str, Any], plans: Sequence[Explanation]) -> str | None:
        return "the reference has no kernels of its own"

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, rstd = ref.group_moments(x, num_groups, eps)
        activation = "silu" if silu else None
        y = ref.group_norm_silu(x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation)
        return in_format_of(x, y), mean, rstd

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
    ) -> tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]:
        """dz = dy * silu'(z); g = weight * (1 + scale): dx = rstd * (g dz - mean(g dz) - xhat * mean(g dz xhat))."""
        wide = compute_dtype(x)
        N, C = x.shape[:2]
        flat = (N, C, math.prod(x.shape[2:]))
        grouped = (N, num_groups, C // num_groups * flat[2])
        xhat = ((x.reshape(grouped).to(wide) - mean[:, :, None]) * rstd[:, :, None]).reshape(flat)
        w = torch.ones(C, dtype=wide, device=x.device) if weight is None else weight.to(wide)
        b = torch.zeros(C, dtype=wide, device=x.device) if bias is None else bias.to(wide)
        gain = 1 + scale.to(wide) if scale is not None else torch.ones(N, C, dtype=wide, device=x.device)
        normed = xhat * w[None, :, None] + b[None, :, None]
        dz = dy.reshape(flat).to(wide)
        if silu:
            z = normed * gain[:, :, None] + (0 if shift is None else shift.to(wide)[:, :, None])
            s = z.sigmoid()
            dz = dz * (s * (1 + z * (1 - s)))
        dz_sum, dz_xhat = dz.sum(2), (dz * xhat).sum(2)  # [N, C]
        g = (dz * (w * gain)[:, :, None]).reshape(grouped)
        xhat = xhat.reshape(grouped)
        dx = rstd[:, :, None] * (g - g.mean(2, keepdim=True) - xhat * (g * xhat).mean(2, keepdim=True))
        return (
            in_format_of(x, dx.reshape(x.shape).to(x.dtype)),
            None if weight is None else (gain * dz_xhat).sum(0).to(weight.dtype),
            None if bias is None else (gain * dz_sum).sum(0).to(bias.dtype),
            None if scale is None else (dz * normed).sum(2).to(scale.dtype),
            None if shift is None else dz_sum.to(shift.dtype),
        )

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

    def residual_norm_modulate(
        self, residual: Tensor, branch: Branch | None, norm: Norm | None, index: MaybeTensor
    ) -> ResidualNorm:
        return reference_rows.forward(residual, branch, norm, index)

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
        return reference_rows.backward(dx_new, dy, x, stats, branch, norm, index, residual_dtype)

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
