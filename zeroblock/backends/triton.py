"""The primitives on the Triton kernels: settles layouts and dtypes, then calls the launchers of `zeroblock.kernels`.

Same names and signatures as `_plain.py`, for CUDA and ROCm tensors, or, in an interpreting process, CPU tensors. Import
this module only when triton is installed (see `_backends.py`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .. import zero
from .._layout import as_layout, channels_last_format
from ..kernels import _dtypes, _gemm
from ..kernels import activation as _activation
from ..kernels import add_bias as _add_bias
from ..kernels import conv_residual as _conv
from ..kernels import gate_residual as _gate_residual
from ..kernels import gate_residual_layer_norm_modulate as _gate_norm
from ..kernels import group_norm_silu as _group_norm
from ..kernels import group_norm_silu_bwd as _group_norm_bwd
from ..kernels import group_norm_silu_conv_residual as _norm_conv
from ..kernels import layer_norm_modulate as _layer_norm
from ..kernels import linear_gate_residual as _linear
from ..kernels.zero_flag import zero_flag as _zero_flag
from ..reference import promoted
from . import reference as _plain

NAME = "triton"
# The second and third dimension of a grid go to 65535: samples, and blocks of 4096 elements under a single gate.
_MOST_SAMPLES, _MOST_GATED = 65535, 65535 * 4096
INTERPRETS: bool = not isinstance(_activation._forward, triton.JITFunction)
MISSING: str | None = None
device = "cpu" if INTERPRETS else "cuda"  # where the tensors that the kernels take live


def why_not(op: str, x: Tensor) -> str | None:
    """None when these kernels take a call of `op` with leading tensor x, else the reason."""
    if op == "is_zero":
        return None
    if x.shape[0] > _MOST_SAMPLES and x.dim() > 1:
        return f"{x.shape[0]} samples are more than the {_MOST_SAMPLES} of a grid"
    if op.startswith("gate_residual") and x.numel() > _MOST_GATED:
        return f"{x.numel()} elements are more than the {_MOST_GATED} of a grid"
    if "layer_norm" in op or "rms_norm" in op:
        D = x.shape[-1]
        if D > _layer_norm.MAX_D:
            return f"rows of {D} elements are longer than the {_layer_norm.MAX_D} that a program holds"
    return None


def _rows(v: Tensor | None) -> Tensor | None:
    """An operand whose last dimension is dense: chunks of a larger tensor are taken as they are."""
    return v if v is None or v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


# ---- norms ----------------------------------------------------------------------------------------------------------


def group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu, flag=None, *, split=False):
    layout = channels_last_format(x)
    weight, bias, scale, shift = (_rows(v) for v in (weight, bias, scale, shift))
    x = as_layout(x, layout)
    return _group_norm.forward(
        x, num_groups, weight, bias, eps, scale, shift, silu, layout is not None, flag, split=split
    )


def group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, flag=None, *, split=False):
    layout = channels_last_format(x)
    x, dy = as_layout(x, layout), as_layout(dy.to(x.dtype), layout)
    weight, bias, scale, shift = (_rows(v) for v in (weight, bias, scale, shift))
    return _group_norm_bwd.backward(
        dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu, layout is not None, flag, split=split
    )


# Numbers that a thread holds, by op: the launcher's own choice, then what a plan may choose as well (`per_thread`).
PER_THREAD: dict[str, tuple[int, ...]] = {
    "layer_norm_modulate": _layer_norm.FORWARD_PER_THREAD, "layer_norm_modulate_bwd": _layer_norm.BACKWARD_PER_THREAD,
    "gate_residual": _gate_residual.PER_THREAD, "gate_residual_bwd": _gate_residual.PER_THREAD,
    "gate_residual_layer_norm_modulate": _layer_norm.FORWARD_PER_THREAD,
    "gate_residual_layer_norm_modulate_bwd": _layer_norm.BACKWARD_PER_THREAD,
}  # fmt: skip


def why_not_tile(op: str, x: Tensor) -> str | None:
    """Why a call of a norm or gate has one choice of `per_thread`, else None."""
    return _layer_norm.why_not_tile(x.shape[-1]) if "layer_norm" in op else None


def layer_norm_modulate(x, shift, scale, weight, bias, eps, rms, **tile):
    shift, scale, weight, bias = (_rows(v) for v in (shift, scale, weight, bias))
    return _layer_norm.forward(x.contiguous(), shift, scale, weight, bias, eps, rms, **tile)


def _per_token_shift_grad(dy: Tensor, shift: Tensor | None, dshift: Tensor | None) -> Tensor | None:
    """The gradient of a per-token shift is dy, as a tensor of its own."""
    if shift is None or shift.dim() == 2:
        return dshift
    return dy.to(shift.dtype, copy=True, memory_format=torch.contiguous_format)


def layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, weight, bias, rms, **tile):
    x, dy = x.contiguous(), dy.to(x.dtype).contiguous()
    scale, weight, bias = (_rows(v) for v in (scale, weight, bias))
    dx, dshift, *grads = _layer_norm.backward(dy, x, mean, rstd, shift, scale, weight, bias, rms, **tile)
    return dx, _per_token_shift_grad(dy, shift, dshift), *grads


# ---- gates ----------------------------------------------------------------------------------------------------------


def _gate_layout(gate: Tensor, x: Tensor) -> torch.memory_format | None:
    """A single gate takes the elements of x in any dense order, other gates rows of tokens."""
    return channels_last_format(x) if gate.dim() == 1 and gate.numel() == 1 else None


def gate_residual(residual, gate, branch, flag=None, bias=None, **tile):
    dtype = promoted(residual, gate, branch)
    if dtype == torch.float64:
        return _plain.gate_residual(residual, gate, branch)
    layout = _gate_layout(gate, residual)
    residual, branch = as_layout(residual, layout), as_layout(branch, layout)
    return _gate_residual.forward(residual, _rows(gate), branch, dtype, flag, _rows(bias), **tile)


def gate_residual_bwd(dy, gate, branch, need_dgate, need_dbranch, **tile):
    layout = _gate_layout(gate, branch)
    branch = as_layout(branch, layout)
    return _gate_residual.backward(as_layout(dy, layout), _rows(gate), branch, need_dgate, need_dbranch, **tile)


def _gate_rows(gate: Tensor, x: Tensor) -> Tensor:
    """The combined kernel takes a gate per sample or token: one that all samples share is a row of stride 0, in fp32,
    so that the samples' gradients are added up before they are rounded."""
    if gate.dim() > 1:
        return gate if gate.stride(-1) == 1 else gate.contiguous()
    return gate.float().expand(x.shape[-1]).contiguous().expand(x.shape[0], -1)


def _gate_gradient(dgate: Tensor, gate: Tensor) -> Tensor:
    if gate.dim() > 1:
        return dgate
    return (dgate.sum(0) if gate.numel() > 1 else dgate.sum()).to(gate.dtype).view(gate.shape)


def gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps, **tile):
    branch, residual = branch.contiguous(), residual.contiguous()
    return _gate_norm.forward(residual, _gate_rows(gate, branch), branch, _rows(shift), _rows(scale), eps, **tile)


def gate_residual_layer_norm_modulate_bwd(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale, **tile):
    dy = dy.contiguous()
    dx_new = None if dx_new is None else dx_new.contiguous()
    dresidual, dgate, dbranch, dshift, dscale = _gate_norm.backward(
        dx_new, dy, x_new, mean, rstd, _gate_rows(gate, branch), branch.contiguous(), shift, _rows(scale), **tile
    )
    return dresidual, _gate_gradient(dgate, gate), dbranch, _per_token_shift_grad(dy, shift, dshift), dscale


# ---- what is left of a zero branch, activations, the library's GEMM -------------------------------------------------


def add_bias(x, bias, dim):
    """x + bias along `dim` (1 or -1), x dense in one of the two layouts; a bias of None adds 0."""
    innermost = dim == -1 or channels_last_format(x) is not None
    columns = x.shape[dim] if innermost else math.prod(x.shape[2:])
    return _add_bias.add_bias(x, _rows(bias), columns, innermost)


def linear(x, weight, bias, activation=None):
    """act(x @ weight.T + bias)"""
    y = F.linear(x, weight, bias)
    return y if activation is None else _activation.forward(y, activation, None)


def activation(x, name, flag=None):
    return _activation.forward(x.contiguous(), name, flag)


def activation_bwd(dy, x, name, need_y):
    return _activation.backward(dy.contiguous(), x.contiguous(), name, need_y)


# ---- own GEMMs, which read a flag on the device ---------------------------------------------------------------------


# What a plan may choose among, by name; compiled ahead of time in CI (COMPILE_CASES of the kernels).
GEMMS = {f"{c.BM}x{c.BN}x{c.BK}": c for c in (*_gemm.HALF, *_gemm.FULL)}
FOLDS = [name for name, c in GEMMS.items() if any(c in _gemm.folding_configs(d) for d in _dtypes.DTYPES)]


def _launch_plan(config: str | None, x: Tensor, weight: Tensor, rows: int) -> tuple | None:
    """(configuration, splits): the reduction is split under the smallest tiles alone. None: the kernel's own rule."""
    if config is None:
        return None
    found, shipped = GEMMS[config], _gemm.configs(x.dtype)
    if found != shipped[-1]:
        return found, 1
    return _gemm.choose(rows, weight.shape[0], weight.shape[1:].numel(), (found,), x.device)


def has_gemm(config: str, dtype: torch.dtype) -> bool:
    return GEMMS[config] in _gemm.configs(dtype)


def gemm_by_size(x: Tensor, weight: Tensor, rows: int) -> str:
    """The name of the configuration that the launchers take for rows x weight before anything is measured."""
    config, _ = _gemm.choose(rows, weight.shape[0], weight.shape[1:].numel(), _gemm.configs(x.dtype), x.device)
    return f"{config.BM}x{config.BN}x{config.BK}"


def why_not_own(
    op: str, h: Tensor, weight: Tensor, gate: Tensor | None, residual: Tensor | None, padding
) -> str | None:
    """Why the own GEMM of an op does not take a call, else None."""
    if not zero.may_judge(weight) or (gate is not None and not zero.may_judge(gate)):
        return "the weight is not a plain tensor"
    if op == "linear_gate_residual":
        return _linear.why_not(h, weight, gate, residual)
    reason = _conv.why_not(h, weight, residual)
    if reason is None and channels_last_format(h) is None and channels_last_format(weight) is None:
        reason = "the own convolution is channels-last, neither the input nor the weight is"
    return reason


why_library = why_not_own


def conv(h, weight, bias, residual, padding, flag, config=None):
    """residual + conv(h), stride 1; a flag that is set leaves residual + bias."""
    plan = _launch_plan(config, h, weight, math.prod(_conv.output_size(h, weight, padding)) // weight.shape[0])
    return _conv.conv_residual(h, weight, bias, residual, padding, flag, plan)


def conv_dgrad(dy, weight, padding, flag, config=None):
    """The gradient of conv(h) by h, 0 where the flag is set."""
    plan = None
    if config is not None:
        sizes = (n + kernel - 1 - 2 * p for n, kernel, p in zip(dy.shape[2:], weight.shape[2:], padding, strict=True))
        plan = _launch_plan(config, dy, weight.transpose(0, 1), dy.shape[0] * math.prod(sizes))
    return _conv.conv_dgrad(dy, weight, padding, flag, plan)


WGRADS = [name for name, c in GEMMS.items() if any(c in _conv.wgrad_configs(d) for d in _dtypes.DTYPES)]


def conv_wgrad(dy, h, weight, padding, config=None):
    return _conv.conv_wgrad(dy, h, weight.shape, padding, None if config is None else GEMMS[config])


def why_not_folded(x: Tensor, weight: Tensor, residual: Tensor | None, keep: Tensor | None) -> str | None:
    return _norm_conv.why_not(x, weight, residual, keep)


def folded_norm_conv(
    x, num_groups, norm_weight, norm_bias, eps, scale, shift, weight, bias, residual, padding, flag, config
):
    """(y, mean, rstd) of a norm that the convolution's loader applies."""
    return _norm_conv.group_norm_silu_conv_residual(
        x, num_groups, norm_weight, norm_bias, eps, scale, shift, weight, bias, residual, padding, flag,
        plan=(GEMMS[config], 1),
    )  # fmt: skip


def group_moments(x, num_groups, eps, flag=None):
    """mean and rstd [N, G] of a channels-last x, read once."""
    pixels, partial = x.shape[2:].numel(), _norm_conv.tile_moments(x, flag)
    return _norm_conv.statistics(partial, _norm_conv.TILE_PIXELS, pixels, num_groups, None, None, eps, flag=flag)[:2]


def linear_gate_residual(h, weight, bias, gate, residual, flag, save_branch, config=None):
    plan = _launch_plan(config, h, weight, h.numel() // max(1, h.shape[-1]))
    return _linear.linear_gate_residual(h, weight, bias, gate, residual, flag, save_branch, plan)


# ---- the zero test --------------------------------------------------------------------------------------------------


def _dense(t: Tensor) -> Tensor:
    """The same elements, dense in some order of dimensions: a copy only where they are not."""
    if t.is_contiguous():
        return t
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    return t.permute(order).contiguous()


def zero_flags(tensors: list[Tensor], any_of: bool = False) -> Tensor:
    """int32 [len(tensors)] on their device: 1 where a tensor is exactly zero; with any_of [1], whether one of them is.
    Nothing is read back."""
    return _zero_flag([_dense(t) for t in tensors], any_of)


def is_zero(t: Tensor) -> bool:
    """Reads the answer back to the host."""
    return bool(zero_flags([t]))
