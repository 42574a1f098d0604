"""What the primitives of several backends share: operands brought into a kernel's layout, results brought back."""

from __future__ import annotations

import torch
from torch import Tensor

from ._layout import as_layout

ROW = 1024


def like(grad: Tensor, operand: Tensor | None) -> Tensor | None:
    """An fp32 gradient in the dtype of its operand; None where there is no operand."""
    if operand is None or grad.dtype == operand.dtype:
        return None if operand is None else grad
    return grad.to(operand.dtype)


def is_single(gate: Tensor) -> bool:
    return gate.dim() == 1 and gate.numel() == 1


def tokens(t: Tensor, single: bool, layout: torch.memory_format | None) -> Tensor:
    """Dense [B, T, D]; with a single gate for everything, the elements of any dense tensor in memory order, in rows
    that threads can share."""
    t = as_layout(t, layout)
    if not single:
        return t
    row = ROW if t.numel() % ROW == 0 and t.numel() else t.numel()
    return (t if layout is None else t.movedim(1, -1)).reshape(1, -1 if t.numel() else 1, row)


def untokens(flat: Tensor, shape: torch.Size, layout: torch.memory_format | None) -> Tensor:
    if layout is None:
        return flat.view(shape)
    return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def gate_gradient(dgate: Tensor, gate: Tensor) -> Tensor:
    """[B, D] from the kernel; a [D] gate is shared by the samples."""
    if gate.dim() == 1 and gate.numel() > 1:
        dgate = dgate.sum(0)
    return dgate.to(gate.dtype).view(gate.shape)


def dense_view(t: Tensor) -> Tensor:
    """The same elements in memory order: dense in any dimension order costs nothing, anything else a copy."""
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    return t.permute(order).contiguous()
