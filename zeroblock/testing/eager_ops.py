"""Every op as its users write it in plain PyTorch: the tests' eager twin, the benchmarks' baseline.

Nothing here imports the rest of zeroblock, so that an error in it cannot hide itself. Arguments are those of the public
function of the same name (zeroblock/functional/); a dropout mask is given as `keep` (bool, x's shape) and not drawn.
`zeroblock.reference` is no twin: it computes in fp32 and rounds once, where these round after every operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def _channels(v: Tensor, x: Tensor) -> Tensor:
    """[N, C] to broadcast against x [N, C, *S]."""
    return v.reshape(*v.shape, *(1,) * (x.dim() - 2))


def _rows(v: Tensor) -> Tensor:
    """[B, D] to broadcast over the tokens; [B, T, D], [D] and [1] as they are."""
    return v.unsqueeze(1) if v.dim() == 2 else v


def _modulated(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    x = x if scale is None else x * (1 + _rows(scale))
    return x if shift is None else x + _rows(shift)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
) -> Tensor:
    if weight is None and bias is not None:
        weight = bias.new_ones(bias.shape)  # without it torch before 2.14 gives no bias gradient
    y = F.group_norm(x, num_groups, weight, bias, eps)
    y = y if scale is None else y * (1 + _channels(scale, x))
    y = y if shift is None else y + _channels(shift, x)
    return y if activation is None else F.silu(y)


def conv_residual(h: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, padding: int = 1) -> Tensor:
    y = CONVS[h.dim() - 2](h, weight, bias, padding=padding)
    return y if residual is None else residual + y


def group_norm_silu_conv_residual(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    keep: Tensor | None,
    padding: int = 1,
    dropout_p: float = 0.0,
) -> Tensor:
    h = group_norm_silu(x, num_groups, norm_weight, norm_bias, scale, shift)
    h = h if keep is None else h * (keep.to(h.dtype) / (1 - dropout_p))
    return conv_residual(h, weight, bias, residual, padding)


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    return _modulated(F.layer_norm(x, x.shape[-1:], weight, bias, eps), shift, scale)


def rms_norm_modulate(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    return _modulated(F.rms_norm(x, x.shape[-1:], weight, eps), shift, scale)


def gate_residual(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return residual + _rows(gate) * branch


def gate_residual_layer_norm_modulate(
    residual: Tensor,
    gate: Tensor,
    branch: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    x_new = gate_residual(residual, gate, branch)
    return x_new, layer_norm_modulate(x_new, shift, scale, eps=eps)


def layer_norm_modulate_linear(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float = 1e-6
) -> Tensor:
    return F.linear(layer_norm_modulate(x, shift, scale, eps=eps), weight, bias)


def linear_gate_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str | None = None,
) -> Tensor:
    y = F.linear(h if activation is None else ACTIVATIONS[activation](h), weight, bias)
    y = y if gate is None else _rows(gate) * y
    return y if residual is None else residual + y


def residual_norm_modulate(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    gate_table: Tensor | None = None,
    branch_weight: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    index: Tensor | None = None,
    gate_activation: str | None = None,
    branch_norm: str | None = None,
    branch_eps: float = 1e-6,
    norm: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    def per_token(rows: Tensor | None, table: Tensor | None) -> Tensor | None:
        if rows is None:
            return table
        if index is not None and rows.dim() == 3:
            samples = torch.arange(len(residual), device=residual.device)[:, None]
            rows = rows.expand(len(residual), -1, -1)[samples, index.long()]
        elif index is not None and rows.dim() == 2:
            rows = rows[index.long()]
        elif rows.dim() == 3:
            rows = rows.repeat_interleave(residual.shape[1] // rows.shape[1], 1)
        else:
            rows = _rows(rows)
        return rows if table is None else rows + table

    size = residual.shape[-1:]
    if branch_norm == "rms":
        branch = F.rms_norm(branch, size, branch_weight, branch_eps)
    elif branch_weight is not None:
        branch = branch * branch_weight
    factor = per_token(gate, gate_table)
    if factor is not None:
        branch = (factor.tanh() if gate_activation == "tanh" else factor) * branch
    x_new = residual + branch
    x_new = x_new if out_dtype is None else x_new.to(out_dtype)
    y = F.rms_norm(x_new, size, weight, eps) if norm == "rms" else F.layer_norm(x_new, size, weight, bias, eps)
    y = _modulated(y, per_token(shift, shift_table), per_token(scale, scale_table))
    return x_new, y if y_dtype is None else y.to(y_dtype)
