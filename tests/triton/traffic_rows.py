"""The cases of residual_norm_modulate for `traffic_cases.py`, and what all cases are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zeroblock.kernels import residual_norm_modulate, residual_norm_modulate_bwd
from zeroblock.kernels._modulation import Branch, Norm, Rows

BF16, F32 = torch.bfloat16, torch.float32
Case = Callable[[], tuple[list[Tensor], Callable[[], object]]]  # -> (inputs, call)


def new(*size: int, dtype: torch.dtype = BF16, std: float = 1.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(len(size))).mul_(std).to(dtype)


def residual_norm(rows: str, backward: bool, B: int = 2, T: int = 256, D: int = 1152, K: int = 4) -> Case:
    """Gate, shift and scale in fp32, each with a table; "rms": gate and scale without, and a norm of the branch."""

    def case():
        residual, branch, dx, dy = (new(B, T, D) for _ in range(4))
        size = {"sample": (B, 6 * D), "rms": (B, 6 * D), "token": (B, T, 6 * D), "indexed": (B, K, 6 * D)}[rows]
        packed, tables = new(*size, dtype=F32), new(6, D, dtype=F32)
        gate, shift, scale = (Rows(v, t) for v, t in zip(packed.chunk(6, dim=-1)[:3], tables[:3], strict=True))
        rms, weights = rows == "rms", [new(D) for _ in range(2)]
        if rms:
            gate, shift, scale = Rows(gate.rows), Rows(), Rows(scale.rows)
        index = (torch.arange(T) * K // T).int().repeat(B, 1) if rows == "indexed" else None
        taken = Branch(branch, gate, rms, rms, weights[0] if rms else None, 1e-6, BF16)
        norm = Norm(rms, weights[1] if rms else None, None, shift, scale, 1e-6, BF16)
        operands = [v for of in (gate, shift, scale) for v in of] + [taken.weight, norm.weight]
        if not backward:
            inputs = [residual, branch, index, *operands]
            return [t for t in inputs if t is not None], lambda: residual_norm_modulate.forward(
                residual, taken, norm, index
            )
        mean, rstd, branch_rstd = (
            None if rms else torch.zeros(B, T),
            torch.ones(B, T),
            torch.ones(B, T) if rms else None,
        )
        inputs = [dx, dy, residual, branch, mean, rstd, branch_rstd, index, *operands]
        unread = (shift.rows, shift.table)  # gate and scale are all that its gradients depend on
        arguments = (dx, dy, residual, mean, rstd, branch_rstd, taken, norm, index, BF16, [True] * 11)
        return [
            t for t in inputs if t is not None and all(t is not u for u in unread)
        ], lambda: residual_norm_modulate_bwd.backward(*arguments)

    return case
