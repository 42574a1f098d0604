"""What a backend is: the kernels and steps that the ops are made of, under one name and signature each.

`reference`, `eager`, `cpu`, `triton`, `cuda` and `gpu` are its subclasses. An op asks `select` for a call's backend and
calls one method. A result that does not apply is None.
`flag`, an int32 [1] on the op's device: kernels that can read it leave early while it is not 0; no one uses the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan.planned import Explanation, PlannedOp
from .base_norms import MaybeTensor as MaybeTensor
from .base_norms import NormGrads as NormGrads
from .base_norms import NormsGates

Step = tuple[PlannedOp[..., Any], tuple[Any, ...]]  # and the arguments it is called with
ConvGrads = tuple[MaybeTensor, MaybeTensor, MaybeTensor]  # of (h, weight, bias), each where a mask asks for it


class GroupNorm(NamedTuple):
    """dropout(silu(group_norm(x) * (1 + scale) + shift)): all of it but x."""

    num_groups: int
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    eps: float
    scale: Tensor | None  # [N, C]
    shift: Tensor | None  # [N, C]
    keep: Tensor | None  # bool, like x: dropout's mask
    dropout_p: float


class WinogradKernels(NamedTuple):
    """Of csrc/cpu/winograd; `steps/winograd.py` settles their arguments."""

    conv: Callable[..., Tensor]
    weight_grad: Callable[..., Tensor]
    pack: Callable[..., Tensor]
    statistics: Callable[..., tuple[Tensor, Tensor]]
    affine: Callable[..., Tensor]


class Backend(NormsGates):
    """One way to run the ops. N samples, C channels, G groups, *S space; B samples, T tokens, D features."""

    name: str
    device: str = "cpu"  # the type of device whose tensors it takes
    missing: str | None = None  # why it cannot run anything here
    winograd: WinogradKernels | None = None
    uses_packed_linears: bool = False  # whether `linear` computes with the copies that freeze keeps (steps/packed.py)
    residual_if_zero: Callable[..., Tensor | None] | None = None  # test and sum in one pass (`blocks/one_pass.py`)

    def why_not(self, op: str, x: Tensor) -> str | None:
        """None when the kernels take a call of `op` with first tensor x, else the reason."""
        return None

    # ---- for `explain` ------------------------------------------------------------------------------------------

    def steps(self, op: str, arguments: dict[str, Any], training: bool) -> Iterator[Step]:
        """The planned steps that a dense call of `op` takes, its own first; arguments by name, as in functional/."""
        return iter(())

    def why_no_zero_path(self, op: str, arguments: dict[str, Any], plans: Sequence[Explanation]) -> str | None:
        """Why no flag on the device stops the convolution or linear of an op; None where one does."""
        raise NotImplementedError

    def hint(self, weight: Tensor) -> str | None:
        """What chooses between kernels that read the flag and others that do not; None: nothing does."""
        return None

    # ---- activations, biases, the zero test ---------------------------------------------------------------------

    def activation(self, x: Tensor, name: str, flag: MaybeTensor = None) -> Tensor:
        """ "silu", "gelu" (erf) or "gelu_tanh" of x."""
        raise NotImplementedError

    def activation_bwd(self, dy: Tensor, x: Tensor, name: str, need_y: bool) -> tuple[Tensor, MaybeTensor]:
        """(dx, y): y = act(x) comes with it where it is needed."""
        raise NotImplementedError

    def add_bias(self, x: Tensor, bias: MaybeTensor, dim: int) -> Tensor:
        """x + (bias + 0) along `dim` (1 or -1), x dense in one of the two layouts; a bias of None adds 0."""
        raise NotImplementedError

    def add_bias_in_place(self, x: Tensor, bias: MaybeTensor, dim: int) -> Tensor:
        """add_bias, which may write into x."""
        return self.add_bias(x, bias, dim)

    def is_zero(self, t: Tensor) -> bool:
        """Whether every element is +0 or -0. Reads the answer back to the host."""
        raise NotImplementedError

    def are_zero(self, tensors: list[Tensor]) -> Tensor:
        """bool [len(tensors)] on their device: which are exactly zero. Nothing is read back from a device."""
        raise NotImplementedError

    def zero_flag(self, tensors: list[Tensor]) -> Tensor:
        """int32 [1] on their device: whether one of the tensors is exactly zero."""
        return self.are_zero(tensors).any().view(1).to(torch.int32)

    # ---- convolutions and linear layers: steps ------------------------------------------------------------------

    def conv_residual(
        self,
        h: Tensor,
        weight: Tensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        padding: tuple[int, ...],
        zero_skip: int,
    ) -> tuple[Tensor, Tensor]:
        """(residual + conv(h), skipped) of a weight that the host has not found zero (steps/flag.py)."""
        raise NotImplementedError

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
        """The gradients of (h, weight, bias) of conv(h)."""
        raise NotImplementedError

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
        """(residual + conv(norm(x)), mean, rstd, skipped)."""
        raise NotImplementedError

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
        """The gradients of (x, norm weight, norm bias, scale, shift, weight, bias); mask: the first five, then each."""
        raise NotImplementedError

    def linear(self, x: Tensor, weight: Tensor, bias: MaybeTensor, activation: str | None = None) -> Tensor:
        """act(x @ weight.T + bias)."""
        raise NotImplementedError

    def norm_linear(self, h: Tensor, weight: Tensor, bias: MaybeTensor) -> Tensor:
        """linear(h) of a norm's result, the forward step of layer_norm_modulate_linear."""
        return self.linear(h, weight, bias)

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
        """(residual + gate * linear(act(h)), branch, skipped); branch: the linear's output or, not saved, empty."""
        raise NotImplementedError
