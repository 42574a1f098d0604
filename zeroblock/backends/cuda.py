"""The backend of the CUDA C++ kernels of csrc/cuda: settles layouts, then calls the private ops of csrc/torch.

Small operands travel in their own dtype and strides, and no call waits for the device. `CUDA.missing` says why the
kernels cannot run here; with the emulator of the tests they run on CPU tensors (`CUDA.using`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .._layout import (
    as_layout,
    as_norm_input,
    dense_view,
    gate_gradient,
    is_single,
    like,
    pointwise_format,
    tokens,
    untokens,
)
from .._version import NAMESPACE
from ..kernels._counters import counters
from ..reference import promoted
from .base import MaybeTensor
from .cuda_convs import CudaConvs, Kernels, flag_byte
from .cuda_images import CudaImages, why_not_channels
from .cuda_rows import CudaRows, why_not_row

# Channels of a group, eight numbers of each of which lie in the shared memory of every GPU (99 KB at least):
# kMostSlabChannels of csrc/cuda/group_norm_tile.cuh.
MOST_GROUPED = 3072


def _gate(gate: Tensor, x: Tensor) -> Tensor:
    """A per-token gate comes in the dtype of x, which has come to the one that holds both."""
    return gate if gate.dim() != 3 else gate.to(x.dtype)


def _gate_row(gate: Tensor, x: Tensor) -> Tensor:
    """The combined kernel takes rows only: a single gate becomes one row."""
    return gate.expand(x.shape[-1]).contiguous() if gate.dim() == 1 else gate


def _shift_grad(dshift: Tensor, dy: Tensor, shift: MaybeTensor, scale: MaybeTensor) -> Tensor:
    """What the kernel leaves out: dy itself, or its sum over tokens where the kernel sums dy * (1 + scale) instead."""
    if shift is not None and shift.dim() == 3:
        return dy.clone()
    if shift is not None and scale is not None and scale.dim() == 3:
        return dy.sum(1, dtype=torch.float32)
    return dshift


class Cuda(CudaConvs, CudaImages, CudaRows):
    name = "cuda"

    def __init__(self) -> None:
        self.device = "cuda"
        try:
            self.kernels = Kernels.load(NAMESPACE)
        except AttributeError:
            self.missing = (
                "the extension was built without CUDA kernels (they need a CUDA build of torch and nvcc; "
                "ZEROBLOCK_BUILD_CUDA=1 says what is missing)"
            )

    @contextlib.contextmanager
    def using(self, namespace: str, device: str) -> Iterator[None]:
        """Runs the block with the private ops of torch.ops.<namespace>, whose tensors live on this type of device."""
        before = self.__dict__.copy()
        self.kernels, self.device, self.missing = Kernels.load(namespace), device, None
        try:
            yield
        finally:
            self.__dict__ = before

    def archs(self) -> str:
        """The GPU architectures that the kernels were compiled for."""
        return getattr(torch.ops, NAMESPACE)._cuda_archs()

    def why_not(self, op: str, x: Tensor) -> str | None:
        if x.numel() == 0 and op != "is_zero":
            return "the tensor is empty"
        if op.startswith("channel_rms_norm"):
            return why_not_channels(x)
        return why_not_row(x) if op.startswith("residual_norm") else None

    # ---- norms --------------------------------------------------------------------------------------------------

    def why_not_groups(self, x: Tensor, num_groups: int) -> str | None:
        """Why the reference serves a group norm, else None."""
        channels = x.shape[1] // num_groups
        if channels <= MOST_GROUPED:
            return None
        return f"groups of {channels} channels are wider than the {MOST_GROUPED} that a block takes"

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
        if self.why_not_groups(x, num_groups) is not None:
            return super().group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu)
        x, last = as_norm_input(x)
        flag = flag_byte(flag)
        return self.kernels.group_norm_silu(x, weight, bias, scale, shift, num_groups, eps, silu, last, flag)

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
        if self.why_not_groups(x, num_groups) is not None:
            return super().group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu)
        layout = pointwise_format(x)
        x, dy, last = as_layout(x, layout), as_layout(dy.to(x.dtype), layout), layout is not None
        dx, dweight, dbias, dscale, dshift = self.kernels.group_norm_silu_bwd(
            dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, last, flag_byte(flag)
        )
        return dx, like(dweight, weight), like(dbias, bias), like(dscale, scale), like(dshift, shift)

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
        _, y, mean, rstd = self.kernels.row_norm(x, None, None, shift, scale, weight, bias, eps, rms)
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
        x, dy = x.contiguous(), dy.to(x.dtype).contiguous()
        dx, _, _, dshift, dscale, dweight, dbias = self.kernels.row_norm_bwd(
            None, dy, x, mean, rstd, None, None, shift, scale, weight, bias, rms
        )
        dshift = _shift_grad(dshift, dy, shift, scale)
        return dx, like(dshift, shift), like(dscale, scale), like(dweight, weight), like(dbias, bias)

    # ---- gates --------------------------------------------------------------------------------------------------

    def gate_residual(self, residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        dtype = promoted(residual, gate, branch)
        layout, single = pointwise_format(residual), is_single(gate)
        branch = tokens(branch.to(dtype), single, layout)
        residual_tokens = tokens(residual.to(dtype), single, layout)
        y = self.kernels.gate_residual(residual_tokens, _gate(gate, branch), branch)
        return untokens(y, residual.shape, layout)

    def gate_residual_bwd(
        self, dy: Tensor, gate: Tensor, branch: Tensor, need_dgate: bool, need_dbranch: bool
    ) -> tuple[MaybeTensor, MaybeTensor]:
        layout, single = pointwise_format(branch), is_single(gate)
        flat, dy = tokens(branch.to(dy.dtype), single, layout), tokens(dy, single, layout)
        dgate, dbranch = self.kernels.gate_residual_bwd(dy, _gate(gate, flat), flat, need_dgate, need_dbranch)
        return (
            gate_gradient(dgate, gate) if need_dgate else None,
            untokens(dbranch, branch.shape, layout).to(branch.dtype) if need_dbranch else None,
        )

    def gate_residual_layer_norm_modulate(
        self, residual: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        branch, residual = branch.contiguous(), residual.contiguous()
        operands = _gate_row(gate, branch), shift, scale, None, None
        return self.kernels.row_norm(residual, branch, *operands, eps, False)

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
        dx_new, dy, branch = None if dx_new is None else dx_new.contiguous(), dy.contiguous(), branch.contiguous()
        operands = branch, _gate_row(gate, branch), shift, scale
        dresidual, dbranch, dgate, dshift, dscale, _, _ = self.kernels.row_norm_bwd(
            dx_new, dy, x_new, mean, rstd, *operands, None, None, False
        )
        if is_single(gate):
            dgate = dgate.sum(dtype=torch.float32).view(1)
        dshift = _shift_grad(dshift, dy, shift, scale)
        return dresidual, gate_gradient(dgate, gate), dbranch, dshift.to(shift.dtype), dscale.to(scale.dtype)

    # ---- the zero test ------------------------------------------------------------------------------------------

    def are_zero(self, tensors: list[Tensor]) -> Tensor:
        """One launch for every 64 tensors."""
        return self._zero_flag(tensors, False) != 0

    def is_zero(self, t: Tensor) -> bool:
        return bool(self.are_zero([t])[0])

    def zero_flag(self, tensors: list[Tensor]) -> Tensor:
        return self._zero_flag(tensors, True)

    def _zero_flag(self, tensors: list[Tensor], any_of: bool) -> Tensor:
        return self.kernels.zero_flag([dense_view(t) for t in tensors], any_of, counters(tensors[0].device))


CUDA = Cuda()
