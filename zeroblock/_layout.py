"""Memory formats: which one an op works in, how operands get there, and how results come back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WITH_MEMORY = (Tensor, nn.Parameter)  # subclasses need not have any
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_ROW = 1024  # elements of a row of `tokens` under a single gate: rows are what threads share (guess)


def channels_last_format(x: Tensor) -> torch.memory_format | None:
    """The channels-last format of x where torch's kernels would take it for that, else None (work in NC*S). x need not
    be dense: a slice of a channels-last tensor counts."""
    layout = CHANNELS_LAST.get(x.dim())
    if layout is None or (x.is_contiguous() and x.stride(1) > 1):
        return None
    if 1 not in x.shape and x.is_contiguous(memory_format=layout):
        return layout
    return layout if _has_strides_of_channels_last(x) else None


def _has_strides_of_channels_last(x: Tensor) -> bool:
    """As c10/core/MemoryFormat.h has it, which reads the strides of dimensions of one element too: that is how an image
    of one channel or one pixel is told to be channels-last."""
    size, stride = x.shape, x.stride()
    if stride[1] == 0:
        return False
    least = 0
    for d in (1, *range(len(size) - 1, 1, -1), 0):
        if size[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * max(1, size[d])
    return True


def pointwise_format(x: Tensor) -> torch.memory_format | None:
    """`channels_last_format` of what a pointwise function of x returns: torch calls a size that is both contiguous."""
    if x.is_contiguous():
        return None
    layout = channels_last_format(x)
    if layout is None or 1 not in x.shape:
        return layout
    return None if x.shape[1] == 1 or x.shape[2:].numel() == 1 else layout


def as_layout(x: Tensor, layout: torch.memory_format | None) -> Tensor:
    """x itself when it is already dense in `layout` (None: contiguous), else a copy that is."""
    if layout is None:
        return x.contiguous()
    x = x.contiguous(memory_format=layout)
    # Kernels go by the stride of the channels, which torch does not look at where there is one channel only.
    return x if x.stride(1) == 1 else x.as_strided(x.shape, _strides(x.shape, layout))


def in_layout(y: Tensor, layout: torch.memory_format | None) -> Tensor:
    """`as_layout` for a result: torch's kernels take it for what it is, also where its size is that of both formats."""
    y = as_layout(y, layout)
    return y if channels_last_format(y) is layout else y.as_strided(y.shape, _strides(y.shape, layout))


def _strides(size: torch.Size, layout: torch.memory_format | None) -> tuple[int, ...]:
    order = range(len(size) - 1, -1, -1) if layout is None else (1, *range(len(size) - 1, 1, -1), 0)
    found, step = [0] * len(size), 1
    for d in order:
        found[d] = step
        step *= max(1, size[d])
    return tuple(found)


def layout_after(x: Tensor, *weights: Tensor) -> torch.memory_format | None:
    """That of x after convolutions in two dimensions with these weights, and pointwise functions."""
    if x.shape[2:].numel() == 1:
        return None
    for t in (x, *weights):
        layout = channels_last_format(t)
        if layout is not None:
            return layout
    return None


def is_dense(x: Tensor) -> bool:
    """Contiguous or channels-last in memory, dimensions of one element aside."""
    if x.is_contiguous():
        return True
    layout = CHANNELS_LAST.get(x.dim())
    return layout is not None and x.is_contiguous(memory_format=layout)


def is_settled(x: Tensor) -> bool:
    """Whether x + branch has the strides of x in whatever format the branch is: x is contiguous or channels-last, and
    no dimension of one element leaves open which."""
    if x.is_contiguous():
        return x.dim() not in CHANNELS_LAST or x.stride(1) > 1
    layout = channels_last_format(x)
    return layout is not None and x.is_contiguous(memory_format=layout)


def as_norm_input(x: Tensor) -> tuple[Tensor, bool]:
    """(x dense, and in the strides of silu(norm(x)); whether that is channels-last)"""
    if x.is_contiguous():
        return x if x.stride(1) > 1 else in_layout(x, None), False
    layout = pointwise_format(x)
    return as_layout(x, layout), layout is not None


def empty_like_dense(x: Tensor) -> Tensor:
    """What the ops return for x: same shape and dtype, in the format that `pointwise_format` names."""
    layout = pointwise_format(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format if layout is None else layout)


def as_frames(x: Tensor) -> Tensor:
    """The frames of [N, C, T, H, W], [N * T, C, H, W]: a view where x is channels-last."""
    return x.movedim(2, 1).flatten(0, 1)


def of_each_frame(v: Tensor | None, frames: int) -> Tensor | None:
    """[N, C] for each of the frames, [N * frames, C]."""
    return v if v is None else v[:, None].expand(-1, frames, -1).flatten(0, 1)


def over_frames(grad: Tensor | None, x: Tensor) -> Tensor | None:
    """The gradient [N, C] of what each of the frames of x has had, from theirs."""
    if grad is None:
        return None
    N, C, T = x.shape[:3]
    return grad.reshape(N, T, C).sum(1, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)


def of_frames(y: Tensor, x: Tensor) -> Tensor:
    """A result for the frames of x as one of x, in its format."""
    y, layout = y.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2), pointwise_format(x)
    # The view has the strides of its size, also of dimensions of one element.
    return y.contiguous().view(x.shape) if layout is None else in_layout(y, layout)


def add_residual(residual: Tensor | None, branch: Tensor) -> Tensor:
    """residual + branch in the memory format of that sum; in place on the fresh branch where that format is its own."""
    if residual is None:
        return branch
    if residual.dtype == branch.dtype:
        strides = residual.stride()
        if (strides[1] > 1 or is_settled(branch)) if strides == branch.stride() else _is_embedding(strides):
            return branch.add_(residual)
    return residual + branch


def in_layout_with(residual: Tensor | None, branch: Tensor, layout: torch.memory_format | None) -> Tensor:
    """`add_residual` of a branch that is to be in `layout` and is not yet: in one pass where the sum is so too."""
    if residual is None:
        return in_layout(branch, layout)
    strides = _strides(branch.shape, layout)
    if residual.dtype != branch.dtype or residual.stride() != strides:
        return add_residual(residual, in_layout(branch, layout))
    return torch.add(
        residual, branch, out=torch.empty_strided(branch.shape, strides, dtype=branch.dtype, device=branch.device)
    )


def alike(residual: Tensor, branch: Tensor) -> bool:
    """Whether the sum may be written into a tensor like the branch, part by part."""
    return residual.dtype == branch.dtype and residual.stride() == branch.stride()


def _is_embedding(strides: tuple[int, ...]) -> bool:
    """Strides of [N, C] expanded to images, which leave the memory format of a sum to the other operand."""
    return len(strides) > 2 and not any(strides[2:]) and (strides[0] == 0 or strides[0] >= strides[1])


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
