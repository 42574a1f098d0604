"""Of tokens [B, T, D]: gated residuals, alone and with the norm that follows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks, ops, zero
from .. import reference as ref
from . import operands
from .general import NORMS, Gated, Modulated, check_gated, residual_norm
from .rounding import eager_gated, eager_norm
from .tokens import layer_norm_modulate


def gate_residual(
    residual: Tensor,
    gate: Tensor | None,
    branch: Tensor,
    *,
    gate_table: Tensor | None = None,
    index: Tensor | None = None,
    gate_activation: str | None = None,
    branch_norm: str | None = None,
    branch_weight: Tensor | None = None,
    branch_eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = residual + act(gate + gate_table) * norm_b(branch), rounded once.

    Args:
        residual, branch: of one shape, any floating dtype; a batch of 1 is expanded.
        gate: [1]; for residual [B, T, D] also [D], [B, D] (broadcast over T) or [B, F, D] where F divides T: row f
            serves the T / F tokens from f T / F on. B may be 1. None: 1, with a table the table alone.
        gate_table: [D] or None, added to every row of gate in fp32.
        index: [T] or [B, T], int32 or int64: gate is then rows [K, D] or [B, K, D], of which token t takes row
            index[b, t]. In [0, K): else ValueError on a CPU, and the nearest row on a GPU.
        gate_activation: None or "tanh".
        branch_norm: None or "rms": branch / sqrt(mean(branch^2) + branch_eps), of tokens [B, T, D].
        branch_weight: [D] or None, multiplied with the (normalised) branch.
        branch_eps: >= 0, added to the mean square.
        out_dtype: of y; None: the promoted dtype of residual, gate and branch.

    Returns y; tokens are contiguous, also of a transposed residual. Saved for backward: gate and branch.
    Raises TypeError (kind, dtype), ValueError (shape, value, device).
    Source: facebookresearch/DiT `DiTBlock`; ReZero, Bachlechner et al. 2021; tanh and norm: Lumina-Image 2.0, Z-Image.
    """
    op = "gate_residual"
    taken = None
    plain = gate_table is index is gate_activation is branch_norm is branch_weight is out_dtype is None
    if plain and gate is not None:
        if is_compiling():
            mixed = _checks.mixed(residual, gate, branch)
        else:
            mixed = _checks.floating(op, 3, residual=residual, gate=gate, branch=branch)
        if mixed and operands.needs_fp64(residual, gate, branch):
            residual = residual.double()
        taken = operands.gated(op, residual, gate, branch)
    if taken is None:
        gated = Gated(branch, gate, gate_table, gate_activation, branch_norm, branch_weight, branch_eps, out_dtype)
        return _gate_residual(op, residual, gated, index)
    residual, gate, branch = taken
    if zero.transforms_active():
        return ref.gate_residual(residual, gate, branch)
    return ops.gate_residual(residual, gate, branch)


def _gate_residual(op: str, residual: Tensor, gated: Gated, index: Tensor | None) -> Tensor:
    mixed, size = check_gated(op, residual, gated), residual.shape
    if len(size) == 3 or len(size) == 0 or size != gated.branch.shape:
        return residual_norm(op, residual, gated, None, index, mixed)[0]
    flat = (1, -1 if residual.numel() else 0, size[-1])
    gated = gated._replace(branch=gated.branch.reshape(flat))
    return residual_norm(op, residual.reshape(flat), gated, None, index, mixed)[0].view(size)


def residual_norm_modulate(
    residual: Tensor,
    branch: Tensor,
    *,
    gate: Tensor | None = None,
    gate_table: Tensor | None = None,
    gate_activation: str | None = None,
    branch_norm: str | None = None,
    branch_weight: Tensor | None = None,
    branch_eps: float = 1e-6,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    y_dtype: torch.dtype | None = None,
    rounding: str = "once",
) -> tuple[Tensor, Tensor]:
    """x_new = residual + act(gate) * norm_b(branch) and y = norm(x_new) * (1 + scale) + shift, in one pass: the seam
    between two branches of a transformer block.

    Args:
        residual, branch: [B, T, D] of any floating dtype; a batch of 1 is expanded.
        gate, gate_table, gate_activation, branch_norm, branch_weight, branch_eps: as for gate_residual.
        norm: "layer" or "rms", of x_new.
        weight, bias: [D] or None, of that norm.
        shift, scale, shift_table, scale_table: as for layer_norm_modulate, each optional.
        index: as for gate_residual; of all operands of two or three dimensions.
        eps: >= 0, added to the variance or the mean square.
        out_dtype: of x_new; None: the promoted dtype of residual, gate and branch. y is computed from x_new as stored.
        y_dtype: of y; None: that of x_new.
        rounding: "once", or "eager": PyTorch's operators one after another, with their roundings.

    Returns (x_new, y), contiguous. Saved for backward: x_new, branch, mean, rstd, and the branch's rstd.
    Raises TypeError (kind, dtype), ValueError (shape, value, device).
    Source: Wan 2.1 `WanTransformerBlock`; Lumina-Image 2.0 `Lumina2TransformerBlock` (tanh gate, norm of the branch).

    >>> x, y = residual_norm_modulate(torch.randn(2, 16, 64), torch.randn(2, 16, 64), gate=torch.randn(2, 64))
    """
    op = "residual_norm_modulate"
    _checks.choice(op, "norm", norm, tuple(NORMS))
    _checks.choice(op, "rounding", rounding, ("once", "eager"))
    gated = Gated(branch, gate, gate_table, gate_activation, branch_norm, branch_weight, branch_eps, out_dtype)
    modulated = Modulated(NORMS[norm], weight, bias, shift, scale, shift_table, scale_table, eps, y_dtype)
    mixed = check_gated(op, residual, gated, modulated)
    plain = gate_table is gate_activation is branch_norm is branch_weight is weight is bias is shift_table is None
    if plain and scale_table is index is out_dtype is y_dtype is None and norm == "layer" and rounding == "once":
        if _has_one_row_each(residual, branch, gate, shift, scale):
            _checks.eps_value(op, eps)
            assert gate is not None and shift is not None and scale is not None
            return gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps=eps)
    if rounding == "eager":
        x_new = eager_gated(op, residual, gated, index)
        return x_new, eager_norm(op, x_new, modulated, index)
    return residual_norm(op, residual, gated, modulated, index, mixed)


def _has_one_row_each(residual: Tensor, branch: Tensor, *operands: Tensor | None) -> bool:
    """Whether all operands are given, for each sample or for each token."""
    size = residual.shape
    if len(size) != 3 or branch.shape != size:
        return False
    return all(v is not None and (v.shape == (size[0], size[2]) or v.shape == size) for v in operands)


def gate_residual_layer_norm_modulate(
    residual: Tensor,
    gate: Tensor,
    branch: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    gate_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x_new = residual + gate * branch and layer_norm(x_new) * (1 + scale) + shift, in one pass: the plain form of
    residual_norm_modulate.

    Args:
        residual, branch: [B, T, D], brought to one dtype; a batch of 1 is expanded.
        gate: as for gate_residual.
        shift, scale: as for layer_norm_modulate.
        eps: >= 0, added to the variance.
        gate_table, shift_table, scale_table, index: as for residual_norm_modulate.

    Returns (x_new, modulated), contiguous. Saved for backward: x_new, branch, mean, rstd.
    Raises TypeError (kind, dtype), ValueError (shape, eps, device).
    Source: the seam between attention and MLP in facebookresearch/DiT `DiTBlock`.
    """
    op = "gate_residual_layer_norm_modulate"
    if is_compiling():
        mixed = _checks.mixed(residual, gate, branch, shift, scale)
    else:
        mixed = _checks.floating(op, 5, residual=residual, gate=gate, branch=branch, shift=shift, scale=scale)
        _checks.tokens(op, "residual", residual)
        _checks.eps_value(op, eps)
    with_gate = with_norm = None
    if gate_table is shift_table is scale_table is index is None:
        with_gate = operands.gated(op, residual, gate, branch)
        with_norm = None if with_gate is None else operands.modulated(op, with_gate[2], shift, scale)
    if with_gate is None or with_norm is None:
        gated = Gated(branch, gate, gate_table)
        modulated = Modulated(NORMS["layer"], None, None, shift, scale, shift_table, scale_table, eps)
        mixed = check_gated(op, residual, gated, modulated)
        return residual_norm(op, residual, gated, modulated, index, mixed)
    residual, gate, branch = with_gate
    x, shift_rows, scale_rows = with_norm
    if x is not branch or mixed and operands.needs_fp64(residual, shift, scale):
        x_new = gate_residual(residual, gate, branch)  # of a batch of 1, or narrower than what modulates it
        return x_new, layer_norm_modulate(x_new, shift, scale, eps=eps)
    if zero.transforms_active():
        return ref.gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps=eps)
    if not residual.dtype == branch.dtype == gate.dtype:
        dtype = ref.promoted(residual, gate, branch)
        residual, branch = residual.to(dtype), branch.to(dtype)
    assert shift_rows is not None and scale_rows is not None
    return ops.gate_residual_layer_norm_modulate(residual, gate, branch, shift_rows, scale_rows, eps)[:2]
