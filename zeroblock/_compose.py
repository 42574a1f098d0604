"""What the ops compute on a backend: primitives (`_cpu`, `_plain`) composed with the library's convolutions and GEMMs.

Every function takes the primitives module first and returns what the registered op returns. A skipped op reports it
in its last result, an int32 tensor on the device of the op: 0 executed, 1 the tail weight was zero, 2 the gate was
zero. `zero_skip` is one of zero.NEVER, HOST, DEVICE. Under DEVICE that result is the flag which the kernels of the op
read, the host never learns it: library calls run, and backward is the dense one, whose kernels read the flag too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _backends, zero
from ._conv import CONV, CONV_BWD, add_residual, conv_grads, unit_geometry
from ._layout import channels_last_format
from ._norm_conv import NORM_CONV, NORM_CONV_BWD, hidden
from .reference import channel_view, dropout_keep, modulation

EXECUTED, ZERO_WEIGHT, ZERO_GATE = 0, 1, 2


def _verdict(like: Tensor, value: int) -> Tensor:
    return torch.full((1,), value, dtype=torch.int32, device=like.device)


def _weight_is_zero(op: str, zero_skip: int, weight: Tensor) -> bool:
    skipped = zero_skip == zero.HOST and zero.is_exactly_zero(weight)
    zero.count(op, skipped)
    return skipped


def _host_verdict(skipped: Tensor, zero_skip: int) -> int:
    """Forward's verdict where the host took it; a flag on the device is not read back."""
    return int(skipped) if zero_skip == zero.HOST else EXECUTED


def _own_conv(P, zero_skip: int, h: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """Whether the op tests its weight on the device and the backend's own convolution, which reads the flag, runs."""
    return zero_skip == zero.DEVICE and P.why_library("conv_residual", h, weight, None, residual) is None


def bare_residual(
    residual: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    dim: int,
    dtype: torch.dtype,
    empty: Callable[[], Tensor] | None,
) -> Tensor:
    """residual + gate * bias, what is left of a branch that is zero; always a fresh tensor.

    bias, in the layer's dtype, runs along dimension `dim` (1 for a convolution, -1 for a linear); gate broadcasts
    against the output; `dtype` is that of gate * layer; empty() allocates the output where there is no residual.
    """
    if residual is not None:
        if residual.dtype != dtype:
            residual = residual.to(torch.promote_types(residual.dtype, dtype))
        dense = residual.is_contiguous() or channels_last_format(residual) is not None
        if dense and (gate is None or bias is None):
            return _backends.select("add_bias", residual).add_bias(residual, bias, dim)
        branch = residual.new_empty(residual.shape, dtype=dtype)
    else:
        assert empty is not None
        branch = empty()
    if bias is None:
        branch.zero_()
    else:
        bias = bias + 0.0  # zero products are +0: a bias of -0 comes out of the layer as +0
        step = bias if dim == -1 else channel_view(bias, branch.dim())
        branch.copy_(step if gate is None else gate * step)
    # The memory format of a sum with a non-dense residual is that of the branch.
    return branch if residual is None else residual + branch


def _zeros(t: Tensor) -> Tensor:
    """A zero gradient of t, in the format the ops return."""
    return torch.zeros_like(t, memory_format=channels_last_format(t) or torch.contiguous_format)


# ---- convolutions ---------------------------------------------------------------------------------------------------


def _conv_or_skip(op, h, weight, bias, residual, padding, zero_skip):
    if _weight_is_zero(op, zero_skip, weight):
        ones = [1] * len(padding)
        size = conv_size((h.shape[0], *h.shape[2:]), weight, padding, ones, ones)
        empty = lambda: empty_conv_output(h, weight, size, weight.dtype)  # noqa: E731
        y = bare_residual(residual, bias, None, 1, weight.dtype, empty)
        return y, _verdict(h, ZERO_WEIGHT)
    return None


def conv_size(
    batch_and_spatial: Sequence[int],
    weight: Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """The shape of a convolution's output; the input's channels do not matter."""
    batch, *inner = batch_and_spatial
    spatial = zip(inner, weight.shape[2:], padding, stride, dilation, strict=True)
    return batch, weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in spatial)


def empty_conv_output(h: Tensor, weight: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor like conv(h): channels-last where h or the weight is."""
    layout = channels_last_format(h) or channels_last_format(weight) or torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=h.device, memory_format=layout)


def conv_residual(P, h, weight, bias, residual, padding, zero_skip):
    if _own_conv(P, zero_skip, h, weight, residual):
        zero.count("conv_residual", False)
        flag = P.zero_flags([weight])
        return P.conv_residual(h, weight, bias, residual, padding, flag), flag
    skipped = _conv_or_skip("conv_residual", h, weight, bias, residual, padding, zero_skip)
    if skipped is not None:
        return skipped
    return CONV(P, h, weight, bias, residual, unit_geometry(padding)), _verdict(h, EXECUTED)


def _dense_conv_grads(P, dy, h, weight, skipped, zero_skip, has_bias, padding, mask):
    """conv_grads, the one of h by the backend's own kernel where that reads the flag."""
    if not (mask[0] and _own_conv(P, zero_skip, h, weight, None)):
        return CONV_BWD(P, dy, h, weight, has_bias, padding, mask)
    _, dweight, dbias = CONV_BWD(P, dy, h, weight, has_bias, padding, [False, *mask[1:]])
    return P.conv_dgrad(dy, weight, padding, skipped), dweight, dbias


def conv_residual_bwd(P, dy, h, weight, skipped, zero_skip, padding, has_bias, mask):
    dy = dy.to(weight.dtype)
    if not _host_verdict(skipped, zero_skip):
        return _dense_conv_grads(P, dy, h, weight, skipped, zero_skip, has_bias, padding, mask)
    _, dweight, dbias = conv_grads(dy, h, weight, has_bias, padding, [False, mask[1], mask[2]])  # eager's, exactly
    return _zeros(h) if mask[0] else None, dweight, dbias


def group_norm_silu_conv_residual(
    P,
    x,
    num_groups,
    norm_weight,
    norm_bias,
    eps,
    scale,
    shift,
    keep,
    dropout_p,
    weight,
    bias,
    residual,
    padding,
    zero_skip,
):
    if _own_conv(P, zero_skip, x, weight, residual):
        zero.count("group_norm_silu_conv_residual", False)
        flag = P.zero_flags([weight])
        h, mean, rstd = hidden(
            P, x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p, weight.dtype, flag=flag
        )
        return P.conv_residual(h, weight, bias, residual, padding, flag), mean, rstd, flag
    skipped = _conv_or_skip("group_norm_silu_conv_residual", x, weight, bias, residual, padding, zero_skip)
    if skipped is not None:
        y, verdict = skipped
        moments = x.new_zeros(2, x.shape[0], num_groups, dtype=torch.promote_types(x.dtype, torch.float32))
        return y, moments[0].clone(), moments[1].clone(), verdict
    norm = (x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p)
    return *NORM_CONV(P, *norm, weight, bias, residual, unit_geometry(padding)), _verdict(x, EXECUTED)


def group_norm_silu_conv_residual_bwd(
    P, dy, x, mean, rstd, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p, weight, skipped,
    zero_skip, padding, has_bias, mask,
):  # fmt: skip
    """(dx, dnorm_weight, dnorm_bias, dscale, dshift, dweight, dbias); mask: dx and the norm's, dweight, dbias."""
    dy = dy.to(weight.dtype)
    if _host_verdict(skipped, zero_skip):
        h = None
        if mask[1]:
            h, _, _ = hidden(P, x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p, weight.dtype)
        _, dweight, dbias = conv_grads(dy, x if h is None else h, weight, has_bias, padding, [False, mask[1], mask[2]])
        upstream = (x, norm_weight, norm_bias, scale, shift) if mask[0] else (None,) * 5
        return *((None if t is None else _zeros(t)) for t in upstream), dweight, dbias
    flag = {}
    if zero_skip == zero.DEVICE:
        h, _, _ = hidden(P, x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p, weight.dtype)
        flag = {"flag": skipped} if _own_conv(P, zero_skip, h, weight, None) else {}
        dh, dweight, dbias = _dense_conv_grads(P, dy, h, weight, skipped, zero_skip, has_bias, padding, mask)
    else:
        norm = (x, mean, rstd, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p)
        dh, dweight, dbias = NORM_CONV_BWD(P, dy, *norm, weight, has_bias, padding, mask)
    if not mask[0]:
        return None, None, None, None, None, dweight, dbias
    dz = dropout_keep(dh, keep, dropout_p).to(x.dtype)
    grads = P.group_norm_silu_bwd(dz, x, mean, rstd, norm_weight, norm_bias, scale, shift, num_groups, True, **flag)
    return *grads, dweight, dbias


# ---- linears --------------------------------------------------------------------------------------------------------


def linear_grads(P, dy: Tensor, h: Tensor, weight: Tensor, has_bias: bool, mask: list[bool]):
    """(dh, dweight, dbias) of linear(h) for [..., K] inputs, each only where mask asks; all of one dtype."""
    flat = dy.reshape(-1, weight.shape[0])
    dh = P.linear(flat, weight.t(), None).view(h.shape) if mask[0] else None
    dweight = P.linear(flat.t(), h.reshape(-1, weight.shape[1]).t(), None) if mask[1] else None
    return dh, dweight, flat.sum(0) if mask[2] and has_bias else None


def layer_norm_modulate_linear(P, x, shift, scale, weight, bias, eps):
    h, mean, rstd = P.layer_norm_modulate(x, shift, scale, None, None, eps, False)
    return P.linear(h.to(weight.dtype), weight, bias), mean, rstd


def layer_norm_modulate_linear_bwd(P, dy, x, mean, rstd, shift, scale, weight, eps, has_bias, mask):
    """(dx, dshift, dscale, dweight, dbias); mask: dx and the modulation's, dweight, dbias."""
    h = x
    if mask[1]:
        h = P.layer_norm_modulate(x, shift, scale, None, None, eps, False)[0].to(weight.dtype)
    dh, dweight, dbias = linear_grads(P, dy.to(weight.dtype), h, weight, has_bias, mask)
    if not mask[0]:
        return None, None, None, dweight, dbias
    dx, dshift, dscale, _, _ = P.layer_norm_modulate_bwd(dh, x, mean, rstd, shift, scale, None, None, False)
    return dx, dshift, dscale, dweight, dbias


def linear_gate_residual(P, h, weight, bias, gate, residual, activation, zero_skip, save_branch):
    """(y, branch, skipped); branch is kept for dgate when save_branch, else empty."""
    if zero_skip == zero.DEVICE and P.why_library("linear_gate_residual", h, weight, gate, residual) is None:
        zero.count("linear_gate_residual", False)
        flag = P.zero_flags([weight] if gate is None or save_branch else [weight, gate], any_of=True)
        a = h if activation is None else P.activation(h, activation, flag=flag)
        y, kept = P.linear_gate_residual(a.to(weight.dtype), weight, bias, gate, residual, flag, save_branch)
        return y, y.new_empty(0, dtype=weight.dtype) if kept is None else kept, flag
    host = zero_skip == zero.HOST
    zero_gate = host and gate is not None and not save_branch and zero.is_exactly_zero(gate)
    zero_weight = host and not zero_gate and zero.is_exactly_zero(weight)
    zero.count("linear_gate_residual", zero_gate or zero_weight)
    if zero_gate or zero_weight:
        size = (*h.shape[:-1], weight.shape[0])
        branch = h.new_zeros(size if save_branch else 0, dtype=weight.dtype)
        bias = None if zero_gate else bias
        if bias is not None and save_branch:
            branch.copy_(bias)
        gate = None if gate is None else modulation(gate)
        dtype = weight.dtype if gate is None else torch.promote_types(weight.dtype, gate.dtype)
        y = bare_residual(residual, bias, gate, -1, dtype, lambda: h.new_empty(size, dtype=dtype))
        return y.contiguous(), branch, _verdict(h, ZERO_GATE if zero_gate else ZERO_WEIGHT)
    a = h if activation is None else P.activation(h, activation)
    branch = P.linear(a.to(weight.dtype), weight, bias)
    none = branch.new_empty(0)
    if gate is None:
        return add_residual(residual, branch).contiguous(), none, _verdict(h, EXECUTED)
    if residual is None:
        y = modulation(gate) * branch
    else:
        y = P.gate_residual(residual, gate, branch)
    return y, branch if save_branch else none, _verdict(h, EXECUTED)


def linear_gate_residual_bwd(P, dy, h, weight, gate, branch, skipped, zero_skip, activation, has_bias, mask):
    """(dh, dweight, dbias, dgate); mask in that order."""
    verdict = _host_verdict(skipped, zero_skip)
    dgate, dbranch = None, dy
    if gate is not None:
        need_dbranch = verdict != ZERO_GATE and (mask[1] or mask[2] or (mask[0] and not verdict))
        dgate, dbranch = P.gate_residual_bwd(dy, gate, branch if mask[3] else dy, mask[3], need_dbranch)
    if verdict == ZERO_GATE:
        dh, dweight = (_zeros(t) if m else None for t, m in ((h, mask[0]), (weight, mask[1])))
        return dh, dweight, weight.new_zeros(weight.shape[0]) if mask[2] and has_bias else None, dgate
    dbranch = None if dbranch is None else dbranch.to(weight.dtype)
    dh = None
    if mask[0]:
        dh = _zeros(h) if verdict else linear_grads(P, dbranch, h, weight, False, [True, False, False])[0]
    a = h
    if activation is not None and mask[0] and not verdict:  # one read of h gives both
        dh, a = P.activation_bwd(dh.to(h.dtype), h, activation, mask[1])
    elif activation is not None and mask[1]:
        a = P.activation(h, activation)
    if not (mask[1] or mask[2]):
        return dh, None, None, dgate
    _, dweight, dbias = linear_grads(
        P, dbranch, a.to(weight.dtype) if mask[1] else h, weight, has_bias, [False, mask[1], mask[2]]
    )
    return dh, dweight, dbias, dgate
