"""act(x @ weight.T + bias) as a planned step: torch's GEMM, oneDNN's, and oneDNN's with packed weights.

torch sends float32 to MKL, which runs at half of oneDNN's rate on AMD processors. oneDNN adds up a whole dot product in
one chain; long ones are cut into pieces, so that errors stay within twice MKL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout import add_residual
from ..backends.base import Backend, ConvGrads
from ..plan.describe import describe_rows, describe_weight
from ..plan.planned import PlannedOp
from ..reference import modulation
from . import packed
from .flag import NEVER
from .packed import LONGEST, ONEDNN

_copies = packed.copies
_mkldnn_enabled = torch._C._get_mkldnn_enabled
_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default if ONEDNN else None
_pointwise_binary: Any = torch.ops.mkldnn._linear_pointwise.binary if ONEDNN else None
# Products below which oneDNN's call costs more than its arithmetic saves (measured: python benchmarks/run.py --group
# dense).
FEW_PRODUCTS = 1 << 20
_FEW_ROWS = 64
# oneDNN's names of the activations as post-ops.
_POST_OPS: dict[str | None, tuple] = {
    None: ("none", [], ""),
    "gelu_tanh": ("gelu", [], "tanh"),
    "gelu": ("gelu", [], "none"),
    "silu": ("swish", [], ""),
}


class LinearCall(NamedTuple):
    """act(x @ weight.T + bias): x [..., K], weight [O, K]."""

    backend: Backend
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str | None

    @property
    def device(self) -> torch.device:
        return self.x.device

    def signature(self) -> tuple:
        backend, x, weight, bias, activation = self
        return (
            backend,
            x.shape,
            x.stride(),
            x.dtype,
            x.is_cpu or x.device,
            weight.shape,
            weight.stride(),
            bias is None,
            activation,
            len(_copies) and packed.is_frozen(weight),
            _mkldnn_enabled(),
        )

    def describe(self) -> str:
        backend, x, weight, bias, activation = self
        parts = [f"{backend.name}: {describe_rows(x)} * {describe_weight(weight)}"]
        if bias is not None:
            parts.append("bias")
        if activation is not None:
            parts.append(activation)
        if packed.is_frozen(weight):
            parts.append("frozen")
        return ", ".join(parts)

    def work(self) -> int:
        return 2 * self.x.numel() * self.weight.shape[0]


def _activated(call: LinearCall, y: Tensor) -> Tensor:
    return y if call.activation is None else call.backend.activation(y, call.activation)


def _library(call: LinearCall) -> Tensor:
    return _activated(call, F.linear(call.x, call.weight, call.bias))


def _why_not_onednn(call: LinearCall) -> str | None:
    x = call.x
    if not x.is_cpu or not (ONEDNN and _mkldnn_enabled()):
        return "oneDNN is off or does not take this device"
    if x.dtype != torch.float32:
        return "the library uses oneDNN itself"
    return "x is empty" if x.numel() == 0 else None


def _in_pieces(x: Tensor, weights: list[Tensor], bounds: list[tuple[int, int]], bias: Tensor | None) -> Tensor:
    """The dot products piece by piece, added up."""
    y: Tensor | None = None
    for weight, (start, stop) in zip(weights, bounds, strict=True):
        piece = x[..., start:stop]
        # Pieces of a transposed operand (a weight gradient's tokens) are dense as they are, those of rows are copied.
        piece = piece.contiguous() if piece.stride(-1) == 1 else piece
        if y is None:
            y = _pointwise(piece, weight, bias, *_POST_OPS[None])
        else:
            y = _pointwise_binary(piece, y, weight, None, "add")
    assert y is not None
    return y


def _onednn(call: LinearCall) -> Tensor:
    _, x, weight, bias, activation = call
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its stride
    # A transposed x takes shorter pieces (measured: python -m pytest tests/plan/test_ways.py -k linear).
    length, longest = x.shape[-1], LONGEST if x.stride(-1) == 1 else LONGEST // 4
    if length <= longest:
        return _pointwise(x, weight, bias, *_POST_OPS[activation])
    bounds = packed.bounds(length, longest)
    weights = [weight[:, a:b] for a, b in bounds]
    weights = [w.contiguous() if w.stride(-1) == 1 else w for w in weights]
    return _activated(call, _in_pieces(x, weights, bounds, bias))


def _why_not_packed(call: LinearCall) -> str | None:
    copy = packed.current(call.weight)
    if copy is None or not copy.pieces:
        return "the weight is not frozen, or not packed"
    if not _mkldnn_enabled():
        return "oneDNN is off"
    return "x is empty" if call.x.numel() == 0 else None


def _with_packed_weight(call: LinearCall) -> Tensor:
    _, x, weight, bias, activation = call
    copy = packed.find(weight)
    if copy is None or not copy.pieces:  # another thread has unfrozen the weight
        return _library(call)
    bias = None if bias is None else bias.contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    if len(copy.pieces) == 1:
        return _pointwise(x, copy.pieces[0], bias, *_POST_OPS[activation])
    return _activated(call, _in_pieces(x, copy.pieces, packed.bounds(x.shape[-1], LONGEST), bias))


def _rule(call: LinearCall) -> str:
    if packed.is_frozen(call.weight):
        return "packed"
    x = call.x
    # In pieces, or of few rows, oneDNN's is behind MKL's where MKL uses AVX-512 (measured: ZEROBLOCK_PLAN=fixed python
    # benchmarks/run.py --group models --filter dit).
    whole = x.shape[-1] <= LONGEST and x.numel() >= _FEW_ROWS * x.shape[-1]
    return "oneDNN" if whole and x.numel() * call.weight.shape[0] > FEW_PRODUCTS else "library"


LINEAR = PlannedOp(
    "linear",
    _library,
    signature=LinearCall.signature,
    describe=LinearCall.describe,
    work=LinearCall.work,
    rule=_rule,
)
LINEAR.add("oneDNN", _onednn, _why_not_onednn)
LINEAR.add("packed", _with_packed_weight, _why_not_packed)


def linear_grads(
    backend: Backend, dy: Tensor, h: Tensor, weight: Tensor, has_bias: bool, mask: Sequence[bool]
) -> ConvGrads:
    """(dh, dweight, dbias) of linear(h) for [..., K] inputs, each only where mask asks; all of one dtype."""
    flat = dy.reshape(-1, weight.shape[0])
    dh = backend.linear(flat, weight.t(), None).view(h.shape) if mask[0] else None
    dweight = backend.linear(flat.t(), h.reshape(-1, weight.shape[1]).t(), None) if mask[1] else None
    return dh, dweight, flat.sum(0) if mask[2] and has_bias else None


class LinearGateCall(NamedTuple):
    """(residual + gate * linear(act(h)), branch, skipped); branch, the linear's output, where it is to be saved, else
    empty: h [B, T, K], weight [D, K]."""

    backend: Backend
    h: Tensor
    weight: Tensor
    bias: Tensor | None
    gate: Tensor | None
    residual: Tensor | None
    activation: str | None
    zero_skip: int
    save_branch: bool

    @property
    def device(self) -> torch.device:
        return self.h.device

    def tested(self) -> list[Tensor]:
        """The tensors of which one that is zero makes the branch zero; a gate in training is not looked at."""
        return [self.weight] if self.gate is None or self.save_branch else [self.weight, self.gate]

    def unflagged(self) -> LinearGateCall:
        return LinearGateCall(*self[:7], NEVER, self.save_branch)


def library_linear_gate(call: LinearGateCall) -> tuple[Tensor, Tensor]:
    """(y, branch) by the backend's linear, then its gate."""
    backend, h, weight, bias, gate, residual, activation, _, save_branch = call
    a = h if activation is None else backend.activation(h, activation)
    branch = backend.linear(a.to(weight.dtype), weight, bias)
    none = branch.new_empty(0)
    if gate is None:
        return add_residual(residual, branch).contiguous(), none
    if residual is None:
        y = modulation(gate) * branch
    else:
        y = backend.gate_residual(residual, gate, branch)
    return y, branch if save_branch else none
