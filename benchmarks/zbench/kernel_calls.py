"""What the kernels of `kernel_rows.py` are called with: functions of a shape, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BF16 = torch.bfloat16
Call = Callable[[tuple[int, ...]], Any]


def new(*size: int, of: torch.dtype = BF16) -> Tensor:
    return torch.empty(size, dtype=of, device="meta")


def f32(*size: int) -> Tensor:
    return new(*size, of=torch.float32)


def image(shape: tuple[int, ...], last: bool) -> Tensor:
    return new(*shape).to(memory_format=torch.channels_last if last else torch.contiguous_format)


def group_norm(last: bool, backward: bool) -> Call:
    def call(shape: tuple[int, ...]) -> Any:
        from zeroblock.kernels import group_norm_silu, group_norm_silu_bwd

        x, (N, C) = image(shape, last), shape[:2]
        v, film, stat = new(C), new(N, 2 * C)[:, :C], f32(N, 32)
        if backward:
            return group_norm_silu_bwd.backward(x, x, stat, stat, v, v, film, film, 32, True, last)
        return group_norm_silu.forward(x, 32, v, v, 1e-5, film, film, True, last)

    return call


def channel_norm(backward: bool) -> Call:
    def call(shape: tuple[int, ...]) -> Any:
        from zeroblock.kernels import channel_rms_norm_silu as op

        x, v, rstd = image(shape, True), new(shape[1]), f32(shape[0], *shape[2:])
        if backward:
            return op.backward(x, x, rstd, v, None, None, None, True, True)
        return op.forward(x, v, None, 1e-12, False, None, None, True, True)

    return call


def rows(name: str, backward: bool) -> Call:
    def call(shape: tuple[int, ...]) -> Any:
        from zeroblock.kernels import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate

        x, v, stat = new(*shape), new(shape[0], shape[2]), f32(*shape[:2])
        if name == "norm":
            if backward:
                return layer_norm_modulate.backward(x, x, stat, stat, v, v, None, None, False)
            return layer_norm_modulate.forward(x, v, v, None, None, 1e-6, False)
        if name == "gate":
            return gate_residual.backward(x, v, x, True, True) if backward else gate_residual.forward(x, v, x, BF16)
        op = gate_residual_layer_norm_modulate
        return op.backward(x, x, x, stat, stat, v, x, v, v) if backward else op.forward(x, v, x, v, v, 1e-6)

    return call


def residual_norm(backward: bool) -> Call:
    def call(shape: tuple[int, ...]) -> Any:
        from zeroblock.kernels import residual_norm_modulate, residual_norm_modulate_bwd
        from zeroblock.kernels._modulation import Branch, Norm, Rows

        x, stat, D = new(*shape), f32(*shape[:2]), shape[2]
        v, weight = Rows(f32(shape[0], D), f32(D)), new(D)
        branch = Branch(x, v, True, True, weight, 1e-6, BF16)
        norm = Norm(False, weight, weight, v, v, 1e-6, BF16)
        if not backward:
            return residual_norm_modulate.forward(x, branch, norm, None)
        needed = [True] * len(residual_norm_modulate_bwd.Grads._fields)
        return residual_norm_modulate_bwd.backward(x, x, x, stat, stat, stat, branch, norm, None, BF16, needed)

    return call


def conv(size: int, fold: bool = False) -> Call:
    def call(shape: tuple[int, ...]) -> Any:
        from zeroblock.kernels import _gemm, conv_residual

        C, flag = shape[1], new(1, of=torch.bool)
        x, weight, plan = image(shape, True), new(C, C, size, size), (_gemm.HALF[0], 1)
        folded = {"fold": f32(shape[0], 2, C), "silu": True} if fold else {}
        return conv_residual.run(x, weight, new(C), x, [size // 2] * 2, flag, plan=plan, **folded)

    return call


def linear(shape: tuple[int, ...]) -> Any:
    from zeroblock.kernels import _gemm, linear_gate_residual

    (B, T, D), plan = shape, (_gemm.HALF[0], 1)
    h, weight, row = new(B, T, 4 * D), new(D, 4 * D), new(B, D)
    flag = new(1, of=torch.bool)
    return linear_gate_residual.linear_gate_residual(h, weight, new(D), row, new(*shape), flag, plan=plan)


def flag(shape: tuple[int, ...]) -> Any:
    from zeroblock.kernels import zero_flag

    return zero_flag.zero_flag([new(*shape[1:])])
