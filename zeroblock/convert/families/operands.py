"""The operands of blocks by description: where the block has them, and how the ops take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops.residual_norm_modulate import NO_NORM
from ...reference import modulation
from .description import Row


def submodule(block: nn.Module, path: str) -> Any:
    """block.get_submodule(path), at a tenth of its price; None where there is none."""
    if "." not in path:
        return block._modules.get(path)
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


def parameter(module: Any, name: str) -> Tensor | None:
    """getattr(module, name, None) of a parameter; an attribute of that name hides it."""
    if module is None:
        return None
    fields = module.__dict__
    parameters = fields.get("_parameters")
    if parameters is not None and name in parameters and name not in fields:
        found: Tensor | None = parameters[name]
        return found
    return getattr(module, name, None)


def weight_of(norm: Any) -> Tensor | None:
    name = type(norm).__name__
    if name == "StableAudio3RMSNorm":
        return norm.gamma
    weight: Any = parameter(norm, "weight")
    return weight + 1.0 if name == "Krea2RMSNorm" else weight


def keeps_dtype(norm: Any) -> bool:
    """Whether an RMS norm's result has the dtype of its input, whatever that of its weight is."""
    return type(norm).__name__ in ("Krea2RMSNorm", "StableAudio3RMSNorm")


def named_rows(name: str, row: Row | None) -> dict[str, Any]:
    return {} if row is None else {name: row.rows, f"{name}_table": row.table}


# What ops.residual_norm_modulate is given beside the residual: without a branch, without a norm.
NOTHING_ADDED = (None, None, None, False, False, None, 0.0)
WITHOUT_NORM = (NO_NORM, *(None,) * 7, 0.0)


def operand(row: Row | None) -> tuple[Tensor | None, Tensor | None]:
    """(rows, table) of an operand; a table without rows is a row for everything."""
    if row is None:
        return None, None
    return (row.table, None) if row.rows is None else row


def added(branch: Tensor, gate: Gate) -> tuple[Any, ...]:
    """The branch and its gate as the op takes them."""
    if gate.norm is None:
        return branch, *operand(gate.row), gate.tanh, False, None, 0.0
    return branch, *operand(gate.row), gate.tanh, True, weight_of(gate.norm), gate.norm.eps


def named_gate(gate: Gate) -> dict[str, Any]:
    """As functional takes it."""
    given: dict[str, Any] = {"gate": None}
    if gate.row is not None:
        given = named_rows("gate", gate.row) | {"gate_activation": "tanh" if gate.tanh else None}
    if gate.norm is not None:
        given |= {"branch_norm": "rms", "branch_weight": weight_of(gate.norm), "branch_eps": gate.norm.eps}
    return given
