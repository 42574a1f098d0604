"""The part of `Backend` (base.py) that norms and gates are."""

from __future__ import annotations

import torch
from torch import Tensor

from .residual_norm import Branch, Needed, Norm, ResidualNorm, ResidualNormGrads, Stats

MaybeTensor = Tensor | None
NormGrads = tuple[Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]  # of x and four operands


class NormsGates:
    """N samples, C channels, G groups, *S space; B samples, T tokens, D features. `flag`: as base.py says."""

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
        """(y, mean, rstd); x [N, C, *S], mean and rstd [N, G]."""
        raise NotImplementedError

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
    ) -> NormGrads:
        """The gradients of (x, weight, bias, scale, shift)."""
        raise NotImplementedError

    def group_norm_silu_frames(
        self,
        x: Tensor,
        num_groups: int,
        weight: MaybeTensor,
        bias: MaybeTensor,
        eps: float,
        scale: MaybeTensor,
        shift: MaybeTensor,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """group_norm_silu of each frame of x [N, C, T, H, W]; mean and rstd [N * T, G]."""
        raise NotImplementedError

    def group_norm_silu_frames_bwd(
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
    ) -> NormGrads:
        """The gradients of (x, weight, bias, scale, shift)."""
        raise NotImplementedError

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
        """(y, rstd); x [N, C, *S], rstd [N, *S] as ops/channel_rms_norm_silu.py says."""
        raise NotImplementedError

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
    ) -> NormGrads:
        """The gradients of (x, weight, bias, scale, shift)."""
        raise NotImplementedError

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
        """(y, mean, rstd); x [B, T, D], mean (None where rms) and rstd [B, T]."""
        raise NotImplementedError

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
    ) -> NormGrads:
        """The gradients of (x, shift, scale, weight, bias)."""
        raise NotImplementedError

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
        """(y, y2, mean, rstd): two of `layer_norm_modulate`, here one after the other."""
        y, mean, rstd = self.layer_norm_modulate(x, shift, scale, None, None, eps, rms)
        return y, self.layer_norm_modulate(x, shift2, scale2, None, None, eps, rms)[0], mean, rstd

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
    ) -> NormGrads:
        """The gradients of (x, shift, scale, shift2, scale2)."""
        one = self.layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, None, None, rms)
        two = self.layer_norm_modulate_bwd(dy2, x, mean, rstd, shift2, scale2, None, None, rms)
        return one[0] + two[0], *one[1:3], *two[1:3]

    def gate_residual(self, residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        """residual + gate * branch."""
        raise NotImplementedError

    def gate_residual_bwd(
        self, dy: Tensor, gate: Tensor, branch: Tensor, need_dgate: bool, need_dbranch: bool
    ) -> tuple[MaybeTensor, MaybeTensor]:
        """The gradients of (gate, branch), each only where it is needed."""
        raise NotImplementedError

    def gate_residual_layer_norm_modulate(
        self, residual: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x_new, y, mean, rstd): x_new = residual + gate * branch, y its modulated norm."""
        raise NotImplementedError

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
        """The gradients of (residual, gate, branch, shift, scale)."""
        raise NotImplementedError

    def residual_norm_modulate(
        self, residual: Tensor, branch: Branch | None, norm: Norm | None, index: MaybeTensor
    ) -> ResidualNorm:
        """x_new, and the modulated norm of it as it is stored; contiguous."""
        raise NotImplementedError

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
        """x: what the norm was of; norm is None where no dy reaches it, and the residual's gradient then dx_new."""
        raise NotImplementedError
