"""Memory formats: which one an op works in, how operands get there, and how results come back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WITH_MEMORY = (Tensor, nn.Parameter)  # subclasses need not have any
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_ROW = 1024  # elements of a row of `tokens` under a single gate: rows are what threads share (guess)


def channels_last_format(x: Tensor) -> torch.memory_format | None:
    """The channels-last format of x when it is laid out so and not also contiguous, else None (work in NC*S)."""
    if x.is_contiguous():
        return None
    layout = CHANNELS_LAST.get(x.dim())
    return layout if layout is not None and x.is_contiguous(memory_format=layout) else None


def conv_layout(h: Tensor, weight: Tensor) -> torch.memory_format | None:
    """That of conv(h), as eager chooses it: channels-last where h or the weight is."""
    return channels_last_format(h) or channels_last_format(weight)


def as_layout(x: Tensor, layout: torch.memory_format | None) -> Tensor:
    """x itself when it is already dense in `layout` (None: contiguous), else a copy that is."""
    return x.contiguous(memory_format=torch.contiguous_format if layout is None else layout)


def empty_like_dense(x: Tensor) -> Tensor:
    """What the ops return for x: same shape and dtype, in the format that `channels_last_format` names."""
    layout = channels_last_format(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format if layout is None else layout)


def add_residual(residual: Tensor | None, branch: Tensor) -> Tensor:
    """residual + branch in the memory format of that sum; in place on the fresh branch where that format is its own."""
    if residual is None:
        return branch
    if residual.dtype == branch.dtype and (residual.stride() == branch.stride() or 0 in residual.stride()):
        return branch.add_(residual)
    return residual + branch


def dense_view(t: Tensor) -> Tensor:
    """The same elements in memory order: dense in any order of dimensions costs nothing, anything else a copy."""
    if t.is_contiguous():
        return t
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    return t.permute(order).contiguous()


def alignment(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of the tensors start at 16 bytes: others GPU kernels move in narrower pieces, or by another code, which is
    compiled when the first of them comes."""
    return tuple([t is None or type(t) not in _WITH_MEMORY or t.data_ptr() % 16 == 0 for t in tensors])


# ---- operands of the norms and gates --------------------------------------------------------------------------------


def like(grad: Tensor, operand: Tensor | None) -> Tensor | None:
    """An fp32 gradient in the dtype of its operand; None where there is no operand."""
    if operand is None or grad.dtype == operand.dtype:
        return None if operand is None else grad
    return grad.to(operand.dtype)


def dense_rows(v: Tensor | None) -> Tensor | None:
    """An operand whose last dimension is dense: chunks of a larger tensor are taken as they are."""
    return v if v is None or v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


def is_single(gate: Tensor) -> bool:
    return gate.dim() == 1 and gate.numel() == 1


def tokens(t: Tensor, single: bool, layout: torch.memory_format | None) -> Tensor:
    """Dense [B, T, D]; with a single gate for everything, the elements of any dense tensor in memory order, in rows
    that threads can share."""
    t = as_layout(t, layout)
    if not single:
        return t
    row = _ROW if t.numel() % _ROW == 0 and t.numel() else t.numel()
    return (t if layout is None else t.movedim(1, -1)).reshape(1, -1 if t.numel() else 1, row)


def untokens(flat: Tensor, shape: torch.Size, layout: torch.memory_format | None) -> Tensor:
    """The result of a kernel on `tokens`, in the shape and layout of the tensor they were made of."""
    if layout is None:
        return flat.view(shape)
    return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def gate_gradient(dgate: Tensor, gate: Tensor) -> Tensor:
    """[B, D] from the kernel; a [D] gate is shared by the samples."""
    if gate.dim() == 1 and gate.numel() > 1:
        dgate = dgate.sum(0)
    return dgate.to(gate.dtype).view(gate.shape)
