"""Linear layers as a planned step (`_plan.py`): torch's GEMM, oneDNN's, and oneDNN's with packed weights.

torch sends float32 to MKL, which runs at half of oneDNN's rate on AMD processors. oneDNN adds up a whole dot product in
one chain; long ones are cut into pieces, so that errors stay within twice MKL's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan.measure import describe_rows, describe_weight
from ..plan.planned import PlannedOp
from . import packed as _packed
from .packed import LONGEST, ONEDNN

_copies = _packed._copies
_mkldnn_enabled = torch._C._get_mkldnn_enabled
_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default if ONEDNN else None
_pointwise_binary: Any = torch.ops.mkldnn._linear_pointwise.binary if ONEDNN else None
# Products below which oneDNN's call costs more than its arithmetic saves.
_FEW_PRODUCTS = 1 << 20
# oneDNN's names of the activations as post-ops.
_POST_OPS: dict[str, tuple] = {
    "gelu_tanh": ("gelu", [], "tanh"),
    "gelu": ("gelu", [], "none"),
    "silu": ("swish", [], ""),
}
_NO_POST_OP: tuple = ("none", [], "")


def _activated(P, y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else P.activation(y, activation)


def _library(P, x, weight, bias, activation):
    return _activated(P, F.linear(x, weight, bias), activation)


def _why_not_onednn(P, x, weight, bias, activation):
    if x.device.type != "cpu" or not (ONEDNN and _mkldnn_enabled()):
        return "oneDNN is off or does not take this device"
    if x.dtype != torch.float32:
        return "the library uses oneDNN itself"
    return "x is empty" if x.numel() == 0 else None


def _chain(x: Tensor, weights, bounds, bias: Tensor | None) -> Tensor:
    """The sum over pieces of the dot products."""
    y: Any = None
    for weight, (start, stop) in zip(weights, bounds, strict=True):
        piece = x[..., start:stop]
        # Pieces of a transposed operand (a weight gradient's tokens) are dense as they are, those of rows are copied.
        piece = piece.contiguous() if piece.stride(-1) == 1 else piece
        if y is None:
            y = _pointwise(piece, weight, bias, *_NO_POST_OP)
        else:
            y = _pointwise_binary(piece, y, weight, None, "add")
    return y


def _onednn(P, x, weight, bias, activation):
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its stride
    length, longest = x.shape[-1], LONGEST if x.stride(-1) == 1 else LONGEST // 4
    if length <= longest:
        return _pointwise(x, weight, bias, *_NO_POST_OP if activation is None else _POST_OPS[activation])
    bounds = _packed.bounds(length, longest)
    weights = [weight[:, a:b] for a, b in bounds]
    weights = [w.contiguous() if w.stride(-1) == 1 else w for w in weights]
    return _activated(P, _chain(x, weights, bounds, bias), activation)


def _why_not_packed(P, x, weight, bias, activation):
    copy = _packed._current(weight)
    if copy is None or not copy.pieces:
        return "the weight is not frozen, or not packed"
    if not _mkldnn_enabled():
        return "oneDNN is off"
    return "x is empty" if x.numel() == 0 else None


def _packed_weight(P, x, weight, bias, activation):
    pieces = _packed.find(weight).pieces
    bias = None if bias is None else bias.contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    if len(pieces) == 1:
        return _pointwise(x, pieces[0], bias, *_NO_POST_OP if activation is None else _POST_OPS[activation])
    return _activated(P, _chain(x, pieces, _packed.bounds(x.shape[-1], LONGEST), bias), activation)


def _describe(P, x, weight, bias, activation):
    parts = [f"{P.NAME}: {describe_rows(x)} * {describe_weight(weight)}"]
    parts += [what for what, there in (("bias", bias is not None), (activation, activation is not None)) if there]
    return ", ".join([*parts, *(["frozen"] if _packed.is_frozen(weight) else [])])


def _rule(P, x, weight, bias, activation):
    if _packed.is_frozen(weight):
        return "packed"
    return "oneDNN" if x.numel() * weight.shape[0] > _FEW_PRODUCTS else "library"


# act(x @ weight.T + bias) as (P, x, weight, bias, activation).
LINEAR = PlannedOp(
    "linear",
    _library,
    signature=lambda P, x, weight, bias, activation: (
        P, x.shape, x.stride(), x.dtype, x.is_cpu or x.device, weight.shape, weight.stride(), bias is None,
        activation, len(_copies) and _packed.is_frozen(weight), _mkldnn_enabled(),
    ),
    describe=_describe,
    work=lambda P, x, weight, bias, activation: 2 * x.numel() * weight.shape[0],
    lead=1,
    rule=_rule,
)  # fmt: skip
LINEAR.add("oneDNN", _onednn, _why_not_onednn)
LINEAR.add("packed", _packed_weight, _why_not_packed)
