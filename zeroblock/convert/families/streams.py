"""What blocks by description compute with: a stream of tokens, its norms and modulations, and the branches that are
added to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import functional
from ...blocks.broadcast import add_gated, cannot_be_saved
from ...blocks.decision import bypassable
from ...blocks.layers import is_plain_norm
from ...reference import modulation
from .adaln import is_plain, norm_kind
from .description import Row


def submodule(block: nn.Module, path: str) -> Any:
    """block.get_submodule(path), at a tenth of its price; None where there is none."""
    found: Any = block
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


# Layer norms of blocks that call torch's function.
_functions: dict[tuple[int, float], nn.LayerNorm] = {}


def norm_of(block: nn.Module, norm: str | float | None, x: Tensor) -> Any:
    """The norm of a description; None: there is none (Identity)."""
    if not isinstance(norm, float):
        found = None if norm is None else submodule(block, norm)
        return None if type(found) is nn.Identity else found
    key = x.shape[-1], norm
    if key not in _functions:
        _functions[key] = nn.LayerNorm(x.shape[-1], norm, elementwise_affine=False)
    return _functions[key]


def row_of(value: Any) -> Row:
    """A vector of the modulation, [B, 1, D] as [B, D]"""
    rows, table = value if isinstance(value, Row) else (value, None)
    rows = rows.squeeze(1) if rows is not None and rows.dim() == 3 and rows.shape[1] == 1 else rows
    return Row(rows, table)


def whole_row(row: Row, index: Tensor | None, fp32: bool = False) -> Tensor:
    """The vector as eager computes it, to be broadcast over tokens."""
    rows, table = (t.float() if fp32 and t is not None else t for t in row)
    v: Any = table if rows is None else rows if table is None else rows + table
    if index is None or v.dim() == 1:
        return modulation(v)
    if v.dim() == 2:
        return v[index]
    samples = torch.arange(v.shape[0], device=v.device)[:, None]
    return v[samples, index.expand(v.shape[0], -1)]


class Gate(NamedTuple):
    """What a branch is multiplied with, and its norm, before it is added."""

    row: Row | None = None
    tanh: bool = False
    norm: Any = None

    def is_plain(self) -> bool:
        return self.row is not None and self.row.table is None and not self.tanh and self.norm is None

    def value(self, index: Tensor | None, fp32: bool = False) -> Tensor | None:
        if self.row is None:
            return None
        v = whole_row(self.row, index, fp32)
        return v.tanh() if self.tanh else v


class Stream:
    """x, and the branch that is still to be added to it: with the norm that comes next, where there is one.

    fp32: the norms and gates are computed in float32, whatever x is, and rounded to its dtype.
    index: which row serves which token.
    """

    __slots__ = ("fp32", "index", "waiting", "x")

    def __init__(self, x: Tensor, fp32: bool = False, index: Tensor | None = None):
        self.x, self.fp32, self.index = x, fp32, index
        self.waiting: tuple[Tensor, Gate] | None = None

    def add(self, branch: Tensor, gate: Gate) -> None:
        """x + gate * branch, from now on; nothing waits."""
        self.waiting = branch, gate

    def settled(self) -> Tensor:
        """x with all that was added."""
        if self.waiting is not None:
            self.x = self._sum(*self.waiting)
            self.waiting = None
        return self.x

    def normed(self, norm: Any, shift: Row | None, scale: Row | None) -> Tensor:
        """norm(x) * (1 + scale) + shift, in one pass with what waits to be added."""
        fits = norm is not None and self._fits(norm, shift, scale)
        if self.waiting is None or not fits or not self._fits_branch(*self.waiting):
            return self._modulated(
                self.settled(), norm, shift, scale, fits and (shift is not None or scale is not None)
            )
        branch, gate = self.waiting
        self.waiting = None
        x, row = self.x, gate.row
        if self._is_usual(norm, gate, shift, scale) and x.dtype == branch.dtype == row.rows.dtype:  # type: ignore[union-attr]
            self.x, h = functional.gate_residual_layer_norm_modulate(
                x,
                row.rows,  # type: ignore[union-attr, arg-type]
                branch,
                shift.rows,  # type: ignore[union-attr, arg-type]
                scale.rows,  # type: ignore[union-attr, arg-type]
                eps=norm.eps,
            )
            return h
        self.x, h = functional.residual_norm_modulate(
            x,
            branch,
            **_gate(gate),
            norm=norm_kind(norm),  # type: ignore[arg-type]
            weight=_weight(norm),
            bias=getattr(norm, "bias", None),
            **_rows("shift", shift),
            **_rows("scale", scale),
            index=self._index(row, shift, scale),
            eps=norm.eps,
            out_dtype=x.dtype if self.fp32 else None,
        )
        return h

    def _is_usual(self, norm: Any, gate: Gate, shift: Row | None, scale: Row | None) -> bool:
        """There is an op for a plain layer norm and rows without tables."""
        if self.index is not None or not gate.is_plain() or not is_plain_norm(norm):
            return False
        return shift is not None and scale is not None and shift.table is None and scale.table is None

    def _index(self, *rows: Row | None) -> Tensor | None:
        """The index, where there are rows of which it chooses."""
        if self.index is None or not any(r is not None and r.rows is not None and r.rows.dim() > 1 for r in rows):
            return None
        return self.index

    def _modulated(self, x: Tensor, norm: Any, shift: Row | None, scale: Row | None, fits: bool) -> Tensor:
        if fits:
            more: dict[str, Any] = {}
            if shift is not None and shift.table is not None or scale is not None and scale.table is not None:
                more = {"shift_table": shift and shift.table, "scale_table": scale and scale.table}
            if self.index is not None:
                more["index"] = self._index(shift, scale)
            rows = shift and shift.rows, scale and scale.rows
            if norm_kind(norm) == "rms":
                return functional.rms_norm_modulate(x, *rows, eps=norm.eps, weight=_weight(norm), **more)
            return functional.layer_norm_modulate(x, *rows, eps=norm.eps, weight=norm.weight, bias=norm.bias, **more)
        h = x.float() if self.fp32 else x
        h = h if norm is None else norm(h)
        h = h if scale is None else h * (1 + whole_row(scale, self.index, self.fp32))
        h = h if shift is None else h + whole_row(shift, self.index, self.fp32)
        return h.type_as(x) if self.fp32 else h

    def _sum(self, branch: Tensor, gate: Gate) -> Tensor:
        x, fp32 = self.x, self.fp32
        if self._fits_branch(branch, gate):
            if gate.is_plain() and self.index is None and (not fp32 or gate.row.rows.dtype == x.dtype):  # type: ignore[union-attr]
                return add_gated(x, gate.row.rows, branch)  # type: ignore[union-attr, arg-type]
            if gate.row is None and gate.norm is None:
                return x + branch
            index, dtype = self._index(gate.row), x.dtype if fp32 else None
            given = _gate(gate)
            return functional.gate_residual(x, given.pop("gate"), branch, **given, index=index, out_dtype=dtype)
        y = branch.float() if fp32 and (gate.row is not None or gate.norm is not None) else branch
        y = y if gate.norm is None else gate.norm(y)
        value = gate.value(self.index, fp32)
        y = y if value is None else value * y
        return (x.float() + y).type_as(x) if fp32 and value is not None else x + y.to(x.dtype) if fp32 else x + y

    def _fits(self, norm: Any, *rows: Row | None) -> bool:
        """Whether the ops take the norm and its modulation, and give the dtype that eager does."""
        x, kind = self.x, norm_kind(norm)
        if kind is None or not self._fits_rows(x, *rows) or cannot_be_saved(x) or not bypassable((norm,)):
            return False
        if x.is_cuda and x.dtype != torch.float32 and torch.is_autocast_enabled("cuda") and not self.fp32:
            return False  # there autocast makes a norm's result float32
        weight = getattr(norm, "weight", None)
        # The result of an RMS norm has the dtype of the weight.
        same = self.fp32 or kind == "layer" or weight is None or weight.dtype == x.dtype or _keeps_dtype(norm)
        return same and is_plain(weight, getattr(norm, "bias", None))

    def _fits_branch(self, branch: Tensor, gate: Gate) -> bool:
        x = self.x
        if branch.shape != x.shape or not self._fits_rows(x, gate.row) or not is_plain(branch):
            return False
        if gate.norm is not None and (norm_kind(gate.norm) != "rms" or not bypassable((gate.norm,))):
            return False
        same = self.fp32 or torch.promote_types(branch.dtype, x.dtype) == x.dtype
        return same and not cannot_be_saved(branch) and is_plain(getattr(gate.norm, "weight", None))

    def _fits_rows(self, x: Tensor, *rows: Row | None) -> bool:
        """Whether the rows are those of x's samples and tokens; eager broadcasts others."""
        if x.dim() != 3 or not is_plain(x):
            return False
        B, T, D = x.shape
        for row in rows:
            for v in row or ():
                if v is None:
                    continue
                if (
                    not is_plain(v)
                    or v.shape[-1] != D
                    or not self.fp32
                    and torch.promote_types(v.dtype, x.dtype) != x.dtype
                ):
                    return False
                if v.dim() > 1 and self.index is None and (v.shape[0] != B or v.dim() == 3 and v.shape[1] != T):
                    return False
        return True


def _weight(norm: Any) -> Tensor | None:
    name = type(norm).__name__
    if name == "StableAudio3RMSNorm":
        return norm.gamma
    weight: Any = getattr(norm, "weight", None)
    return weight + 1.0 if name == "Krea2RMSNorm" else weight


def _keeps_dtype(norm: Any) -> bool:
    """Whether an RMS norm's result has the dtype of its input, whatever that of its weight is."""
    return type(norm).__name__ in ("Krea2RMSNorm", "StableAudio3RMSNorm")


def _rows(name: str, row: Row | None) -> dict[str, Any]:
    return {} if row is None else {name: row.rows, f"{name}_table": row.table}


def _gate(gate: Gate) -> dict[str, Any]:
    """As the ops take it."""
    given: dict[str, Any] = {"gate": None}
    if gate.row is not None:
        given = _rows("gate", gate.row) | {"gate_activation": "tanh" if gate.tanh else None}
    if gate.norm is not None:
        given |= {"branch_norm": "rms", "branch_weight": _weight(gate.norm), "branch_eps": gate.norm.eps}
    return given
