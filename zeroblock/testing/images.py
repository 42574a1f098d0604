"""Inputs of the ops on images [N, C, *S], for `cases.py`."""

from __future__ import annotations

from .draw import Draw, Inputs, Size, norm_operands


def group_norm_silu(
    draw: Draw, N: int, C: int, S: Size, affine: str = "both", film: bool = False, mean: float = 0.5, std: float = 2.0
) -> Inputs:
    weight, bias, scale, shift = norm_operands(draw, N, C, affine, film)
    x = draw.tensor(N, C, *S, mean=mean, std=std)
    return {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift}


def channel_rms_norm_silu(
    draw: Draw, N: int, C: int, S: Size, affine: str = "both", film: bool = False, std: float = 2.0
) -> Inputs:
    weight, bias, scale, shift = norm_operands(draw, N, C, affine, film)
    return {"x": draw.tensor(N, C, *S, std=std), "weight": weight, "bias": bias, "scale": scale, "shift": shift}


def _tail(draw: Draw, N: int, C: int, S: Size, K: int, out: int, padding: int, bias: bool, residual: bool) -> Inputs:
    """weight, bias and residual of a convolution with a kernel K wide in every dimension."""
    size = [n + 2 * padding - K + 1 for n in S]
    return {
        "weight": draw.normal(out, C, *[K] * len(S), std=(C * K ** len(S)) ** -0.5),
        "bias": draw.vector(out) if bias else None,
        "residual": draw.tensor(N, out, *size) if residual else None,
    }


def group_norm_silu_conv_residual(
    draw: Draw,
    N: int,
    C: int,
    S: Size,
    K: int = 3,
    out: int = 8,
    padding: int = 1,
    affine: str = "both",
    film: bool = False,
    bias: bool = True,
    residual: bool = True,
    keep: bool = False,
) -> Inputs:
    norm_weight, norm_bias, scale, shift = norm_operands(draw, N, C, affine, film)
    x = draw.tensor(N, C, *S, mean=0.5, std=2.0)
    norm = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "scale": scale, "shift": shift}
    mask = draw.normal(N, C, *S) > -0.5 if keep else None
    return {**norm, **_tail(draw, N, C, S, K, out, padding, bias, residual), "keep": mask}


def conv_residual(
    draw: Draw,
    N: int,
    C: int,
    S: Size,
    K: int = 3,
    out: int = 8,
    padding: int = 1,
    bias: bool = True,
    residual: bool = True,
) -> Inputs:
    return {"h": draw.tensor(N, C, *S), **_tail(draw, N, C, S, K, out, padding, bias, residual)}
