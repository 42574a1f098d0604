"""The primitives on the CUDA C++ kernels of csrc/cuda: settles layouts, then calls the private ops of
csrc/bindings_cuda.cpp.

Same names and signatures as `_cpu.py`. Small operands travel in their own dtype and strides, and no call waits for the
device. `MISSING` says why the kernels cannot run here; with the emulator of tests/cuda/simt they run on CPU tensors
(`library`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from .. import zero
from .._layout import as_layout, channels_last_format
from .._operands import dense_view, gate_gradient, is_single, like, tokens, untokens
from ..reference import promoted
from .reference import activation, activation_bwd, add_bias, linear

__all__ = ["activation", "activation_bwd", "add_bias", "linear"]

NAME = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OPS = (
    "zero_flag",
    "group_norm_silu",
    "group_norm_silu_bwd",
    "row_norm",
    "row_norm_bwd",
    "gate_residual",
    "gate_residual_bwd",
    "conv_residual",
    "conv_moments",
)

device = "cuda"  # where the tensors of the current library live
MISSING: str | None = None
_ops = SimpleNamespace()


def _load(namespace: str) -> SimpleNamespace:
    lib = getattr(torch.ops, namespace)
    return SimpleNamespace(**{name: getattr(lib, f"_{name}_cuda").default for name in _OPS})


try:
    _ops = _load("zeroblock")
except AttributeError:
    MISSING = (
        "the extension was built without CUDA kernels (they need a CUDA build of torch and nvcc; "
        "ZEROBLOCK_BUILD_CUDA=1 says what is missing)"
    )


def why_not(op: str, x: Tensor) -> str | None:
    """None when these kernels take a call of `op` with leading tensor x, else the reason."""
    return "the tensor is empty" if x.numel() == 0 and op != "is_zero" else None


def archs() -> str:
    """The GPU architectures that the kernels were compiled for."""
    return torch.ops.zeroblock._cuda_archs()


@contextlib.contextmanager
def library(namespace: str, on: str) -> Iterator[None]:
    """Runs the block with the private ops of torch.ops.<namespace>, whose tensors live on device type `on`."""
    global _ops, device, MISSING
    before = _ops, device, MISSING
    _ops, device, MISSING = _load(namespace), on, None
    try:
        yield
    finally:
        _ops, device, MISSING = before


def _bool(flag: Tensor | None) -> Tensor | None:
    """The flag [1] of an op, int32 with 0 or 1 in it, as the kernels read it: its lowest byte."""
    return flag if flag is None or flag.dtype == torch.bool else flag.view(torch.bool)[:1]


def group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu, flag=None):
    layout = channels_last_format(x)
    x = as_layout(x, layout)
    return _ops.group_norm_silu(
        x, weight, bias, scale, shift, num_groups, eps, silu, layout is not None, _bool(flag)
    )  # fmt: skip


def group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, flag=None):
    layout = channels_last_format(x)
    x, dy = as_layout(x, layout), as_layout(dy.to(x.dtype), layout)
    dx, dweight, dbias, dscale, dshift = _ops.group_norm_silu_bwd(
        dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, layout is not None, _bool(flag)
    )
    return dx, like(dweight, weight), like(dbias, bias), like(dscale, scale), like(dshift, shift)


def _operand(v: Tensor | None, x: Tensor) -> Tensor | None:
    """A per-token operand comes in the dtype of x: its gradient has that of the activations."""
    return v if v is None or v.dim() != 3 else v.to(x.dtype)


def layer_norm_modulate(x, shift, scale, weight, bias, eps, rms, flag=None):
    shift, scale, x = _operand(shift, x), _operand(scale, x), x.contiguous()
    _, y, mean, rstd = _ops.row_norm(x, None, None, shift, scale, weight, bias, eps, rms, flag)
    return y, None if rms else mean, rstd


def layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, weight, bias, rms, flag=None):
    x, dy = x.contiguous(), dy.to(x.dtype).contiguous()
    dx, _, _, dshift, dscale, dweight, dbias = _ops.row_norm_bwd(
        None, dy, x, mean, rstd, None, None, _operand(shift, x), _operand(scale, x), weight, bias, rms, flag
    )
    dshift = _shift_gradient(dshift, dy, shift, scale)
    return dx, like(dshift, shift), like(dscale, scale), like(dweight, weight), like(dbias, bias)


def _row(gate: Tensor, x: Tensor) -> Tensor | None:
    """The combined kernel takes rows only: a single gate becomes one row."""
    return gate.expand(x.shape[-1]).contiguous() if gate.dim() == 1 else _operand(gate, x)


def _shift_gradient(dshift: Tensor, dy: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """What the kernel leaves out: dy itself, or its sum over tokens where the kernel sums dy * (1 + scale) instead."""
    if shift is not None and shift.dim() == 3:
        return dy.clone()
    if shift is not None and scale is not None and scale.dim() == 3:
        return dy.sum(1, dtype=torch.float32)
    return dshift


def gate_residual(residual, gate, branch, flag=None):
    dtype = promoted(residual, gate, branch)
    layout, single = channels_last_format(residual), is_single(gate)
    branch = tokens(branch.to(dtype), single, layout)
    y = _ops.gate_residual(tokens(residual.to(dtype), single, layout), _operand(gate, branch), branch, flag)
    return untokens(y, residual.shape, layout)


def gate_residual_bwd(dy, gate, branch, need_dgate, need_dbranch, flag=None):
    layout, single = channels_last_format(branch), is_single(gate)
    flat, dy = tokens(branch.to(dy.dtype), single, layout), tokens(dy, single, layout)
    dgate, dbranch = _ops.gate_residual_bwd(dy, _operand(gate, flat), flat, need_dgate, need_dbranch, flag)
    return (
        gate_gradient(dgate, gate) if need_dgate else None,
        untokens(dbranch, branch.shape, layout).to(branch.dtype) if need_dbranch else None,
    )


def gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps, flag=None):
    branch, residual = branch.contiguous(), residual.contiguous()
    shift, scale = _operand(shift, branch), _operand(scale, branch)
    return _ops.row_norm(residual, branch, _row(gate, branch), shift, scale, None, None, eps, False, flag)


def gate_residual_layer_norm_modulate_bwd(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale, flag=None):
    dx_new, dy, branch = (None if t is None else t.contiguous() for t in (dx_new, dy, branch))
    dresidual, dbranch, dgate, dshift, dscale, _, _ = _ops.row_norm_bwd(
        dx_new, dy, x_new, mean, rstd, branch, _row(gate, branch), _operand(shift, branch), _operand(scale, branch),
        None, None, False, flag,
    )  # fmt: skip
    if is_single(gate):
        dgate = dgate.sum(dtype=torch.float32).view(1)
    dshift = _shift_gradient(dshift, dy, shift, scale)
    return dresidual, gate_gradient(dgate, gate), dbranch, like(dshift, shift), like(dscale, scale)


def conv_takes(x: Tensor, weight: Tensor, padding: list[int]) -> bool:
    """Whether the tensor-core convolution takes this call: half precision, 3x3 same or 1x1, channels by 8."""
    K, C, *size = weight.shape
    same = size in ([3, 3], [1, 1]) and list(padding) == [size[0] // 2] * 2
    return same and x.dtype == weight.dtype and x.dtype in DTYPES[1:] and C % 8 == 0 and K % 8 == 0 and x.dim() == 4


def _nhwc(t: Tensor | None) -> Tensor | None:
    """A channels-last tensor in memory order that starts at 16 bytes; anything else is copied."""
    if t is None:
        return None
    t = t.permute(0, 2, 3, 1).contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def why_not_own(
    op: str, h: Tensor, weight: Tensor, gate: Tensor | None, residual: Tensor | None, padding
) -> str | None:
    """Why the own GEMM of an op does not take a call, else None."""
    if op == "linear_gate_residual":
        return "the linears are the library's"
    if not zero.may_judge(weight):
        return "the weight is not a plain tensor"
    if not conv_takes(h, weight, padding):
        return "the kernel takes bf16 or fp16, 3x3 with padding 1 or 1x1, channels divisible by 8"
    if channels_last_format(h) is None and channels_last_format(weight) is None:
        return "the own convolution is channels-last, neither the input nor the weight is"
    if residual is not None and (residual.dtype, *residual.shape) != (h.dtype, len(h), len(weight), *h.shape[2:]):
        return "the kernel adds a residual of the result's shape and dtype"
    return None


why_library = why_not_own


def conv(h, weight, bias, residual, padding, flag):
    """residual + conv(h) where `why_not_own` says None; a flag that is set leaves residual + bias."""
    return conv_residual(h, weight, bias, residual, flag=flag)[0]


def conv_dgrad(dy, weight, padding, flag):
    """The gradient of conv(h) by h, the convolution of dy with the mirrored taps; 0 where the flag is set."""
    return conv(dy.to(weight.dtype), weight.flip(2, 3).transpose(0, 1), None, None, padding, flag)


def conv_residual(h, weight, bias, residual, statistics=False, flag=None):
    """(residual + conv(h, weight, bias), partial statistics for `moments`), where `conv_takes`."""
    y, partial = _ops.conv_residual(
        _nhwc(h), _nhwc(weight), bias, _nhwc(residual), None, None, None, None, None, None, statistics, _bool(flag)
    )
    return y.permute(0, 3, 1, 2), partial


def group_norm_silu_conv_residual(
    x, mean, rstd, norm_weight, norm_bias, scale, shift, weight, bias, residual, statistics=False, flag=None
):
    """conv_residual of silu(norm(x)), which never reaches memory; mean and rstd are those of x."""
    y, partial = _ops.conv_residual(
        _nhwc(x), _nhwc(weight), bias, _nhwc(residual), mean, rstd, norm_weight, norm_bias, scale, shift, statistics,
        _bool(flag),
    )  # fmt: skip
    return y.permute(0, 3, 1, 2), partial


def moments(y, partial, num_groups, eps):
    """mean and rstd [N, G] of y from the partial statistics that its convolution wrote."""
    return _ops.conv_moments(partial, _nhwc(y), num_groups, eps)


def zero_flags(tensors: list[Tensor], any_of: bool = False) -> Tensor:
    """bool [len] on the device: which tensors are all +0 or -0; with any_of int32 [1], whether one of them is. One
    launch for every 64 tensors, no synchronisation."""
    flags = _ops.zero_flag([t if t.is_contiguous() else dense_view(t) for t in tensors])
    return (flags.any().view(1) if len(tensors) > 1 else flags).to(torch.int32) if any_of else flags


def is_zero(t: Tensor) -> bool:
    """Reads the answer back to the host."""
    return bool(zero_flags([t])[0])
