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

from . import zero
from ._layout import channels_last_format
from .backends import available as _backends
from .reference import channel_view, dropout_keep
from .steps.conv import CONV, CONV_BWD, conv_grads, unit_geometry
from .steps.norm_conv import NORM_CONV, NORM_CONV_BWD, hidden

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


def _own_conv(P, zero_skip: int, h: Tensor, weight: Tensor, residual: Tensor | None, padding: list[int]) -> bool:
    """Whether the op tests its weight on the device and the backend's own convolution, which reads the flag, runs."""
    return zero_skip == zero.DEVICE and P.why_library("conv_residual", h, weight, None, residual, padding) is None


def planned(P) -> bool:
    """Whether P chooses among backends: its planned steps then stand for the compositions here (`_gpu.py`)."""
    return P.NAME == "planned"


def bare_residual(
    residual: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    dim: int,
    dtype: torch.dtype,
    empty: Callable[[], Tensor] | None,
    owned: bool = False,
) -> Tensor:
    """residual + gate * bias, what is left of a branch that is zero; always a fresh tensor, or the residual itself
    where it is `owned`: fresh, and nobody else's.

    bias, in the layer's dtype, runs along dimension `dim` (1 for a convolution, -1 for a linear); gate broadcasts
    against the output; `dtype` is that of gate * layer; empty() allocates the output where there is no residual.
    """
    if residual is not None:
        if residual.dtype != dtype:
            residual = residual.to(torch.promote_types(residual.dtype, dtype))
        dense = residual.is_contiguous() or channels_last_format(residual) is not None
        if dense and (gate is None or bias is None):
            P = _backends.select("add_bias", residual)
            add = P.add_bias_ if owned and P.NAME == "cpu" else P.add_bias
            return add(residual, bias, dim)
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
    if _own_conv(P, zero_skip, h, weight, residual, padding):
        zero.count("conv_residual", False)
        flag = P.zero_flags([weight], any_of=True)
        return P.conv(h, weight, bias, residual, padding, flag), flag
    skipped = _conv_or_skip("conv_residual", h, weight, bias, residual, padding, zero_skip)
    if skipped is not None:
        return skipped
    if planned(P):
        return P.CONV(P, h, weight, bias, residual, tuple(padding), zero_skip)
    return CONV(P, h, weight, bias, residual, unit_geometry(padding)), _verdict(h, EXECUTED)


def _dense_conv_grads(P, dy, h, weight, skipped, zero_skip, has_bias, padding, mask):
    """conv_grads, the one of h by the backend's own kernel where that reads the flag."""
    if planned(P):
        flag, sides = skipped if zero_skip == zero.DEVICE else None, (mask[1], mask[2] and has_bias)
        dh = P.DGRAD(P, dy, h, weight, flag, tuple(padding)) if mask[0] else None
        return dh, *(P.WGRAD(P, dy, h, weight, has_bias, tuple(padding), sides) if any(sides) else (None, None))
    if not (mask[0] and _own_conv(P, zero_skip, h, weight, None, padding)):
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
    if _own_conv(P, zero_skip, x, weight, residual, padding):
        zero.count("group_norm_silu_conv_residual", False)
        flag = P.zero_flags([weight], any_of=True)
        h, mean, rstd = hidden(
            P, x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p, weight.dtype, flag=flag
        )
        return P.conv(h, weight, bias, residual, padding, flag), mean, rstd, flag
    skipped = _conv_or_skip("group_norm_silu_conv_residual", x, weight, bias, residual, padding, zero_skip)
    if skipped is not None:
        y, verdict = skipped
        moments = x.new_zeros(2, x.shape[0], num_groups, dtype=torch.promote_types(x.dtype, torch.float32))
        return y, moments[0].clone(), moments[1].clone(), verdict
    norm = (x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p)
    if planned(P):
        return P.NORM_CONV(P, *norm, weight, bias, residual, tuple(padding), zero_skip)
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
    if zero_skip == zero.DEVICE or planned(P):
        h = x.to(weight.dtype)  # its shape is all that the gradient of h takes of it
        if mask[1]:
            h, _, _ = hidden(P, x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p, weight.dtype)
        reads = zero_skip == zero.DEVICE and (planned(P) or _own_conv(P, zero_skip, h, weight, None, padding))
        flag = {"flag": skipped} if reads else {}
        dh, dweight, dbias = _dense_conv_grads(P, dy, h, weight, skipped, zero_skip, has_bias, padding, mask)
    else:
        norm = (x, mean, rstd, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, dropout_p)
        dh, dweight, dbias = NORM_CONV_BWD(P, dy, *norm, weight, has_bias, padding, mask)
    if not mask[0]:
        return None, None, None, None, None, dweight, dbias
    dz = dropout_keep(dh, keep, dropout_p).to(x.dtype)
    grads = P.group_norm_silu_bwd(dz, x, mean, rstd, norm_weight, norm_bias, scale, shift, num_groups, True, **flag)
    return *grads, dweight, dbias
