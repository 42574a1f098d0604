"""Modulations of today's models for the group memory_bound: rows per token, per frame and by index, tables, and what
stands between two branches of a transformer block."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import zeroblock as zb
from zeroblock.testing import eager_ops

from .op import Op, Shape, normal

Pair = tuple[Tensor, Tensor]
FRAMES = 4


def _index(x: Tensor) -> Tensor:
    """Row 0 for the tokens of a clean first frame, row 1 for the rest."""
    batch, tokens, _ = x.shape
    return (torch.arange(tokens, device=x.device) >= tokens // 4).long().expand(batch, tokens)


def _modulated_seam(op: Callable, indexed: bool) -> Callable:
    """Rows [B, R, 3 D] with a table. Indexed: two of them to choose from, as Wan 2.2 has them with a clean first frame;
    else of each token, or of a frame's tokens."""

    def call(residual: Tensor, branch: Tensor, rows: Tensor, tables: Tensor) -> Pair:
        gate, shift, scale = rows.chunk(3, dim=2)
        modulation = {"shift": shift, "scale": scale, "shift_table": tables[1], "scale_table": tables[2]}
        index = _index(residual) if indexed else None
        return op(residual, branch, gate=gate, gate_table=tables[0], index=index, eps=1e-6, **modulation)

    return call


def _tanh_seam(op: Callable) -> Callable:
    """The gate through tanh, RMS norms of the branch and of the sum: as Lumina 2 and Z-Image have them."""
    options = {"gate_activation": "tanh", "branch_norm": "rms", "norm": "rms"}

    def call(residual: Tensor, branch: Tensor, modulation: Tensor, weights: Tensor) -> Pair:
        gate, scale = modulation.chunk(2, dim=1)
        return op(residual, branch, gate=gate, scale=scale, branch_weight=weights[0], weight=weights[1], **options)

    return call


def _affine_seam(op: Callable) -> Callable:
    """A plain sum, then an affine norm: before Wan's cross-attention."""

    def call(residual: Tensor, branch: Tensor, weights: Tensor) -> Pair:
        return op(residual, branch, weight=weights[0], bias=weights[1], eps=1e-6)

    return call


def _own_norm(x: Tensor, rows: Tensor, tables: Tensor) -> Tensor:
    shift, scale = rows.chunk(2, dim=2)
    return zb.layer_norm_modulate(x, shift, scale, shift_table=tables[0], scale_table=tables[1], index=_index(x))


def _eager_norm(x: Tensor, rows: Tensor, tables: Tensor) -> Tensor:
    samples = torch.arange(len(x), device=x.device)[:, None]
    shift, scale = (rows[samples, _index(x)] + tables.flatten()).chunk(2, dim=2)
    return F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift


def _own_two(x: Tensor, modulation: Tensor) -> Pair:
    """LTX-2's: one norm, modulated for two attentions."""
    shift, scale, shift2, scale2 = modulation.chunk(4, dim=1)
    y, other = zb.layer_norm_modulate(x, shift, scale, second=(shift2, scale2))
    return y, other


def _eager_two(x: Tensor, modulation: Tensor) -> Pair:
    shift, scale, shift2, scale2 = modulation[:, None].chunk(4, dim=2)
    y = F.layer_norm(x, x.shape[2:], eps=1e-6)
    return y * (1 + scale) + shift, y * (1 + scale2) + shift2


def _own_gate(residual: Tensor, branch: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    return zb.gate_residual(residual, rows, branch, gate_table=table)


def _eager_gate(residual: Tensor, branch: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    return residual + branch * (rows + table)


def _own_tanh(residual: Tensor, branch: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return zb.gate_residual(residual, gate, branch, gate_activation="tanh", branch_norm="rms", branch_weight=weight)


def _eager_tanh(residual: Tensor, branch: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return residual + gate[:, None].tanh() * F.rms_norm(branch, branch.shape[2:], weight, 1e-6)


def _tokens(count: int, shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    return [normal(shape, dtype) for _ in range(count)]


def _rows(count: int, rows: int | None, shape: Shape, dtype: torch.dtype) -> Pair:
    """Rows [B, R, count D], one of each token where R is None, and their tables."""
    batch, tokens, width = shape
    size = (batch, tokens if rows is None else rows, count * width)
    return normal(size, dtype, std=0.1), normal((count, width), dtype, std=0.1)


def _seam_inputs(rows: int | None, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return *_tokens(2, shape, dtype), *_rows(3, rows, shape, dtype)


def _tanh_seam_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, weights = normal((shape[0], 2 * shape[2]), dtype, std=0.1), normal((2, shape[2]), dtype, 1.0, 0.1)
    return *_tokens(2, shape, dtype), rows, weights


def _affine_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return *_tokens(2, shape, dtype), normal((2, shape[2]), dtype, 1.0, 0.1)


def _norm_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return *_tokens(1, shape, dtype), *_rows(2, 2, shape, dtype)


def _two_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return *_tokens(1, shape, dtype), normal((shape[0], 4 * shape[2]), dtype, std=0.1)


def _gate_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, table = _rows(1, None, shape, dtype)
    return *_tokens(2, shape, dtype), rows, table[0]


def _tanh_inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    gate = normal((shape[0], shape[2]), dtype, std=0.1)
    return *_tokens(2, shape, dtype), gate, normal(shape[2:], dtype, 1.0, 0.1)


def _both(make: Callable[..., Callable], *args: bool) -> tuple[Callable, Callable]:
    return make(eager_ops.residual_norm_modulate, *args), make(zb.residual_norm_modulate, *args)


SEAM = {"inference": 4, "training": 10}
SEAMS = {
    "layer_norm_modulate_index": Op(_eager_norm, _own_norm, _norm_inputs, {"inference": 2, "training": 5}),
    "layer_norm_modulate_two": Op(_eager_two, _own_two, _two_inputs, {"inference": 3, "training": 7}),
    "gate_residual_tokens": Op(_eager_gate, _own_gate, _gate_inputs, {"inference": 4, "training": 9}),
    "gate_residual_tanh": Op(_eager_tanh, _own_tanh, _tanh_inputs, {"inference": 3, "training": 6}),
    "residual_norm_modulate_index": Op(*_both(_modulated_seam, True), partial(_seam_inputs, 2), SEAM),
    "residual_norm_modulate_frames": Op(*_both(_modulated_seam, False), partial(_seam_inputs, FRAMES), SEAM),
    "residual_norm_modulate_tokens": Op(
        *_both(_modulated_seam, False), partial(_seam_inputs, None), {"inference": 7, "training": 18}
    ),
    "residual_norm_modulate_tanh": Op(*_both(_tanh_seam), _tanh_seam_inputs, SEAM),
    "residual_norm_modulate_affine": Op(*_both(_affine_seam), _affine_inputs, SEAM),
}
