"""Operands of every form in the forms of the op residual_norm_modulate: views of what the user has, through which
autograd brings gradients back to the user's shape.

Frames are samples: beside rows [B, F, D] tokens [B, T, D] are viewed as [B F, T / F, D], rows as [B F, D]. With one
table of rows for all samples the batch is one long sample.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_compiling

from .. import _checks, zero
from ..backends.base import MaybeTensor
from .operands import with_batch

Named = dict[str, MaybeTensor]  # by the names of arguments


class Forms(NamedTuple):
    tokens: list[Tensor]  # residual, branch: of one shape
    rows: list[MaybeTensor]  # [D], [B, D], [B, T, D] or, with an index, [B, K, D]
    index: MaybeTensor  # type: ignore[assignment]  # int32 [B, T], contiguous
    size: torch.Size  # of the tokens in the user's form


def settled(op: str, tokens: list[Tensor], rows: Named, index: MaybeTensor) -> Forms:
    """All for one batch; a batch of 1 expands as in eager."""
    size = tokens[0].shape
    B, T, D = size
    if len(tokens) == 1 or tokens[1].shape == size:
        if index is not None:
            if (forms := _as_they_are(op, tokens, rows, index)) is not None:
                return forms
        else:
            for v in rows.values():
                if v is not None and v.shape != (B, D) and v.shape != size and v.shape != (D,):
                    break
            else:
                return Forms(tokens, list(rows.values()), None, size)
    at = 3 if index is not None else 2  # dimensions of an operand that has a batch
    batches = [t.shape[0] for t in tokens] + [v.shape[0] for v in rows.values() if v is not None and v.dim() >= at]
    if index is not None:
        _checks.index(op, index, with_batch(tokens[0], max(batches)))
        batches += [index.shape[0]] if index.dim() == 2 else []
    batch = next((n for n in batches if n != 1), 1)
    tokens = [with_batch(t, batch) for t in tokens]
    size = tokens[0].shape
    for t in tokens[1:]:
        _checks.same_shape(op, "branch", t, "residual", size)
    check = _checks.rows if index is None else _checks.indexed_rows
    for name, v in rows.items():
        if v is not None:
            check(op, name, v, size)
    given = [_one_row(v, index is not None) for v in rows.values()]
    if index is not None:
        return _indexed(op, tokens, given, index)
    frames = [v.shape[1] for v in given if v is not None and v.dim() == 3 and v.shape[1] not in (1, T)]
    F = math.lcm(*frames)
    if F == 1:
        return Forms(tokens, [_with_tokens(v, *size) for v in given], None, size)
    flat = [t.reshape(batch * F, T // F, t.shape[2]) for t in tokens]
    return Forms(flat, [_by_frame(v, batch, F, T) for v in given], None, size)


def _as_they_are(op: str, tokens: list[Tensor], rows: Named, index: Tensor) -> Forms | None:
    """Where every operand is one row, or rows [B, K, D], and the index is [B, T]: the usual forms need no views."""
    size = tokens[0].shape
    B, T, D = size
    K = 0
    for v in rows.values():
        if v is None:
            continue
        shape = v.shape
        if len(shape) == 3 and shape[0] == B and shape[2] == D and shape[1] > 0:
            K = min(K, shape[1]) if K else shape[1]
        elif shape != (D,):
            return None
    if K == 0 or not isinstance(index, Tensor) or index.shape != (B, T):
        return None
    _checks.index(op, index, tokens[0])
    in_range(op, index, K)
    index = index if index.dtype is torch.int32 else index.to(torch.int32)
    return Forms(tokens, list(rows.values()), index.contiguous(), size)


def _one_row(v: MaybeTensor, indexed: bool) -> MaybeTensor:
    """[D] of an operand that is one row for everything."""
    one = v is not None and v.dim() > 1 and not indexed and v.numel() == v.shape[-1]
    return v.reshape(-1) if one else v  # type: ignore[union-attr]


def _with_tokens(v: MaybeTensor, B: int, T: int, D: int) -> MaybeTensor:
    if v is None or v.dim() == 1:
        return v
    if v.dim() == 2:
        return v.expand(B, D)
    return v.squeeze(1).expand(B, D) if v.shape[1] == 1 else v.expand(B, T, D)


def _by_frame(v: MaybeTensor, B: int, F: int, T: int) -> MaybeTensor:
    """The rows of an operand for samples that are frames."""
    if v is None or v.dim() == 1:
        return v
    if v.shape[0] == B and v.dim() == 3 and v.shape[1] == F:
        return v.flatten(0, 1)
    v = v[:, None] if v.dim() == 2 else v
    D = v.shape[2]
    if v.shape[1] == T:
        return v.expand(B, T, D).reshape(B * F, T // F, D)
    own = v.shape[1]
    return v.expand(B, own, D)[:, :, None].expand(B, own, F // own, D).reshape(B * F, D)


def _indexed(op: str, tokens: list[Tensor], rows: list[MaybeTensor], index: Tensor) -> Forms:
    B, T, D = tokens[0].shape
    chosen = [v for v in rows if v is not None and v.dim() > 1]
    if not chosen:
        return Forms(tokens, rows, None, tokens[0].shape)
    in_range(op, index, min(v.shape[-2] for v in chosen))
    index = index if index.dtype is torch.int32 else index.to(torch.int32)
    if all(v.dim() == 2 or v.shape[0] == 1 for v in chosen):  # of all samples: their gradients are summed in one go
        one = tokens if B == 1 else [t.reshape(1, B * T, D) for t in tokens]
        forms = [v if v is None or v.dim() == 1 else v.reshape(1, *v.shape[-2:]) for v in rows]
        return Forms(one, forms, index.expand(B, T).reshape(1, B * T).contiguous(), tokens[0].shape)
    forms = [
        v if v is None or v.dim() == 1 or (v.dim() == 3 and v.shape[0] == B) else v.expand(B, *v.shape[-2:])
        for v in rows
    ]
    index = index if index.shape == (B, T) else index.expand(B, T)
    return Forms(tokens, forms, index.contiguous(), tokens[0].shape)


def _of_samples(v: Tensor, B: int) -> Tensor:
    return v if v.dim() == 3 and v.shape[0] == B else v.expand(B, *v.shape[-2:])


def in_range(op: str, index: Tensor, rows: int) -> None:
    """On a CPU; on a GPU nothing is read back, and the kernels take the nearest row that there is."""
    if not index.is_cpu or index.numel() == 0 or is_compiling() or _len_torch_dispatch_stack():
        return
    if zero.transforms_active():
        return
    low, high = (int(n) for n in index.aminmax())
    if low < 0 or high >= rows:
        raise _checks.fail(op, "index", f"be in [0, {rows})", low if low < 0 else high)
