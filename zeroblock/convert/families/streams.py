"""What blocks by description compute with: a stream of tokens, its norms and modulations, and the branches that are
added to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ... import functional, ops, zero
from ...blocks.broadcast import add_gated, cannot_be_saved
from ...blocks.decision import bypassable
from ...blocks.layers import is_plain_norm
from ...functional.general import NORMS
from ...ops.residual_norm_modulate import RMS
from ...plan.mode import rounds_as_eager
from .adaln import is_plain, norm_kind
from .description import Row
from .operands import (
    NOTHING_ADDED,
    WITHOUT_NORM,
    Gate,
    added,
    keeps_dtype,
    named_gate,
    named_rows,
    operand,
    parameter,
    weight_of,
    whole_row,
)


class Stream:
    """x, and the branch that is still to be added to it: with the norm that comes next, where there is one.

    fp32: the norms and gates are computed in float32, whatever x is, and rounded to its dtype.
    index: which row serves which token.
    """

    __slots__ = ("_direct", "_dtype", "_rows", "_size", "_x", "fp32", "index", "waiting", "x")

    def __init__(self, x: Tensor, fp32: bool = False, index: Tensor | None = None):
        self.x, self.fp32, self.index = x, fp32, index
        self.waiting: tuple[Tensor, Gate] | None = None
        # What was found to fit: x, its size and dtype, and the rows beside it, by their ids. Each is looked at once.
        self._x: Tensor | None = None
        self._size: torch.Size | None = None
        self._dtype: torch.dtype | None = None
        self._rows: dict[int, tuple[Row, bool]] = {}
        self._direct = False  # whether the ops take what fits as it is

    def add(self, branch: Tensor, gate: Gate) -> None:
        """x + gate * branch, from now on; nothing waits."""
        self.waiting = branch, gate

    def settled(self) -> Tensor:
        """x with all that was added."""
        if self.waiting is not None:
            self.x = self._sum(*self.waiting)
            self.waiting = None
        return self.x

    def fuses(self, norm: Any, shift: Row | None, scale: Row | None) -> bool:
        """Whether `normed` is one pass."""
        if self.waiting is None or norm is None:
            return False
        return self._fits(norm, shift, scale) and self._fits_branch(*self.waiting)

    def normed(self, norm: Any, shift: Row | None, scale: Row | None) -> Tensor:
        """norm(x) * (1 + scale) + shift, in one pass with what waits to be added."""
        fits = norm is not None and self._fits(norm, shift, scale)
        if self.waiting is None or not fits or not self._fits_branch(*self.waiting):
            # A compiler fuses a norm without modulation with what surrounds it.
            ours = fits and (shift is not None or scale is not None or not is_compiling())
            return self._modulated(self.settled(), norm, shift, scale, ours)
        branch, gate = self.waiting
        self.waiting = None
        row: Any = gate.row
        x = self.x
        results: tuple[Tensor | None, ...]
        weight, bias = weight_of(norm), parameter(norm, "bias")
        index = self._index(row, shift, scale)
        if index is None and self._is_settled(branch, weight, bias, parameter(gate.norm, "weight")):
            if self._is_usual(norm, gate, shift, scale) and x.dtype is branch.dtype is row.rows.dtype:
                first, second = operand(shift)[0], operand(scale)[0]
                assert first is not None and second is not None
                results = ops.gate_residual_layer_norm_modulate(x, row.rows, branch, first, second, norm.eps)
            else:
                kind, dtype = NORMS[norm_kind(norm)], x.dtype  # type: ignore[index]
                modulation = (kind, weight, bias, *operand(shift), *operand(scale), None, norm.eps, dtype, dtype)
                results = ops.residual_norm_modulate(x, *added(branch, gate), *modulation)
            self.x, h = results[:2]  # type: ignore[assignment]
            return h  # type: ignore[return-value]
        self.x, h = functional.residual_norm_modulate(
            x,
            branch,
            **named_gate(gate),
            norm=norm_kind(norm),  # type: ignore[arg-type]
            weight=weight,
            bias=bias,
            **named_rows("shift", shift),
            **named_rows("scale", scale),
            index=index,
            eps=norm.eps,
            out_dtype=x.dtype if self.fp32 else None,
        )
        return h

    def _is_settled(self, *others: Tensor | None) -> bool:
        """Whether operands that fit have the forms of the ops, so that functional need not look at them again."""
        if self._direct:
            for t in others:
                if t is not None and t.dtype is torch.float64:
                    return False
        return self._direct

    def _is_usual(self, norm: Any, gate: Gate, shift: Row | None, scale: Row | None) -> bool:
        """There is an op for a plain layer norm and rows of each sample or token, without tables."""
        if not gate.is_plain() or not is_plain_norm(norm) or shift is None or scale is None:
            return False
        return _have_rows(gate.row, shift, scale)

    def _index(self, *rows: Row | None) -> Tensor | None:
        """The index, where there are rows of which it chooses."""
        if self.index is None or not any(r is not None and r.rows is not None and r.rows.dim() > 1 for r in rows):
            return None
        return self.index

    def _modulated(self, x: Tensor, norm: Any, shift: Row | None, scale: Row | None, fits: bool) -> Tensor:
        if fits:
            weight, bias, index = weight_of(norm), parameter(norm, "bias"), self._index(shift, scale)
            kind = NORMS[norm_kind(norm)]  # type: ignore[index]
            # What was added since may have made x larger: functional broadcasts.
            if index is None and self.fits_rows(shift, scale) and self._is_settled(weight, bias):
                if _have_rows(shift, scale):
                    rows = shift and shift.rows, scale and scale.rows
                    if kind == RMS:
                        return ops.rms_norm_modulate(x, *rows, weight, norm.eps)[0]
                    return ops.layer_norm_modulate(x, *rows, weight, bias, norm.eps)[0]
                modulation = (kind, weight, bias, *operand(shift), *operand(scale), None, norm.eps, x.dtype, x.dtype)
                return ops.residual_norm_modulate(x, *NOTHING_ADDED, *modulation)[1]  # type: ignore[return-value]
            more: dict[str, Any] = {}
            if shift is not None and shift.table is not None or scale is not None and scale.table is not None:
                more = {"shift_table": shift and shift.table, "scale_table": scale and scale.table}
            rows = shift and shift.rows, scale and scale.rows
            if kind == RMS:
                return functional.rms_norm_modulate(x, *rows, eps=norm.eps, weight=weight, index=index, **more)
            return functional.layer_norm_modulate(x, *rows, eps=norm.eps, weight=weight, bias=bias, index=index, **more)
        h = x.float() if self.fp32 else x
        h = h if norm is None else norm(h)
        h = h if scale is None else h * (1 + whole_row(scale, self.index, self.fp32))
        h = h if shift is None else h + whole_row(shift, self.index, self.fp32)
        return h.type_as(x) if self.fp32 else h

    def _sum(self, branch: Tensor, gate: Gate) -> Tensor:
        x, fp32 = self.x, self.fp32
        if self._fits_branch(branch, gate):
            if gate.row is None and gate.norm is None:
                return x + branch
            index = self._index(gate.row)
            if index is None and self._is_settled(branch, parameter(gate.norm, "weight")):
                rows: Any = None if gate.row is None else gate.row.rows
                if gate.is_plain() and rows.dim() > 1 and (not fp32 or rows.dtype is x.dtype is branch.dtype):
                    return ops.gate_residual(x, rows, branch)
                return ops.residual_norm_modulate(x, *added(branch, gate), *WITHOUT_NORM, x.dtype, x.dtype)[0]  # type: ignore[return-value]
            if gate.is_plain() and self.index is None and (not fp32 or gate.row.rows.dtype == x.dtype):  # type: ignore[union-attr]
                return add_gated(x, gate.row.rows, branch, tokens=True)  # type: ignore[union-attr, arg-type]
            given = named_gate(gate)
            dtype = x.dtype if fp32 else None
            return functional.gate_residual(x, given.pop("gate"), branch, **given, index=index, out_dtype=dtype)
        y = branch.float() if fp32 and (gate.row is not None or gate.norm is not None) else branch
        y = y if gate.norm is None else gate.norm(y)
        value = gate.value(self.index, fp32)
        y = y if value is None else value * y
        return (x.float() + y).type_as(x) if fp32 and value is not None else x + y.to(x.dtype) if fp32 else x + y

    def _fits(self, norm: Any, *rows: Row | None) -> bool:
        """Whether the ops take the norm and its modulation, and give the dtype that eager does."""
        x, kind = self.x, norm_kind(norm)
        if kind is None or not self.fits_rows(*rows) or cannot_be_saved(x) or not bypassable((norm,)):
            return False
        if x.is_cuda and x.dtype != torch.float32 and torch.is_autocast_enabled("cuda") and not self.fp32:
            return False  # there autocast makes a norm's result float32
        weight = parameter(norm, "weight")
        # The result of an RMS norm has the dtype of the weight.
        same = self.fp32 or kind == "layer" or weight is None or weight.dtype == x.dtype or keeps_dtype(norm)
        return same and is_plain(weight, parameter(norm, "bias"))

    def _fits_branch(self, branch: Tensor, gate: Gate) -> bool:
        x = self.x
        if branch.shape != x.shape or not self.fits_rows(gate.row) or not is_plain(branch):
            return False
        if gate.norm is not None and (norm_kind(gate.norm) != "rms" or not bypassable((gate.norm,))):
            return False
        same = self.fp32 or branch.dtype is x.dtype or torch.promote_types(branch.dtype, x.dtype) == x.dtype
        return same and not cannot_be_saved(branch) and is_plain(parameter(gate.norm, "weight"))

    def fits_rows(self, *rows: Row | None) -> bool:
        """Whether the rows are those of x's samples and tokens; eager broadcasts others."""
        x = self.x
        if x is not self._x:
            size, dtype = x.shape, x.dtype
            if len(size) != 3 or rounds_as_eager() or not is_plain(x):
                return False
            if size != self._size or dtype is not self._dtype:
                self._rows.clear()
                self._direct = dtype is not torch.float64 and not zero.transforms_active()
            self._x, self._size, self._dtype = x, size, dtype
        known = self._rows
        for row in rows:
            if row is None:
                continue
            if is_compiling():  # which knows no id()
                fits = self._fits_row(row)
            elif id(row) in known:
                fits = known[id(row)][1]
            else:
                fits = self._fits_row(row)
                known[id(row)] = row, fits  # with the row: its id is not given away
            if not fits:
                return False
        return True

    def _fits_row(self, row: Row) -> bool:
        dtype = self._dtype
        assert self._size is not None and dtype is not None
        B, T, D = self._size
        for v in row:
            if v is None:
                continue
            size = v.shape
            if not is_plain(v) or size[-1] != D:
                return False
            if v.dtype is not dtype:
                if not self.fp32 and torch.promote_types(v.dtype, dtype) != dtype:
                    return False
                self._direct = self._direct and v.dtype is not torch.float64
            n = len(size)
            if n > 1 and self.index is None and (size[0] != B or n == 3 and size[1] != T or n > 3):
                return False
        return True


def _have_rows(*operands: Row | None) -> bool:
    """Whether each is absent, or rows of each sample or token without a table."""
    for row in operands:
        if row is not None and (row.table is not None or row.rows is None or row.rows.dim() < 2):
            return False
    return True
