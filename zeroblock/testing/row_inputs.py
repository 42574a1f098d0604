"""Inputs of the ops on tokens [B, T, D], for `cases.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .draw import Draw

Inputs = dict[str, Tensor | None]
Size = Sequence[int]


def norm_operands(draw: Draw, N: int, C: int, affine: str, film: bool) -> list[Tensor | None]:
    """[weight, bias, scale, shift]; affine: one of AFFINE"""
    weight = draw.vector(C, 1.0) if affine in ("both", "weight") else None
    bias = draw.vector(C) if affine in ("both", "bias") else None
    return [weight, bias, *(draw.chunks(N, C, 2) if film else (None, None))]


def layer_norm_modulate(
    draw: Draw,
    B: int,
    T: int,
    D: int,
    kind: str = "bd",
    affine: str = "neither",
    mean: float = 0.5,
    std: float = 2.0,
) -> Inputs:
    shift, scale = draw.modulation(kind, B, T, D)
    weight, bias, _, _ = norm_operands(draw, B, D, affine, False)
    x = draw.tokens(B, T, D, mean=mean, std=std)
    return {"x": x, "shift": shift, "scale": scale, "weight": weight, "bias": bias}


def rms_norm_modulate(
    draw: Draw,
    B: int,
    T: int,
    D: int,
    kind: str = "bd",
    affine: str = "neither",
    mean: float = 0.5,
    std: float = 2.0,
) -> Inputs:
    inputs = layer_norm_modulate(draw, B, T, D, kind, affine, mean, std)
    del inputs["bias"]
    return inputs


def gate_residual(draw: Draw, size: Size, gate: str = "one") -> Inputs:
    tensor = draw.tokens if len(size) == 3 else draw.tensor
    gates = draw.vector(1) if gate == "one" else draw.gate(gate, *size)
    return {"residual": tensor(*size), "gate": gates, "branch": tensor(*size)}


def gate_residual_layer_norm_modulate(draw: Draw, B: int, T: int, D: int, gate: str = "bd", kind: str = "bd") -> Inputs:
    shift, scale = draw.modulation(kind, B, T, D)
    return {**gate_residual(draw, (B, T, D), gate), "shift": shift, "scale": scale}


def _linear(draw: Draw, K: int, out: int, bias: bool) -> Inputs:
    return {"weight": draw.normal(out, K, std=K**-0.5), "bias": draw.vector(out) if bias else None}


def layer_norm_modulate_linear(
    draw: Draw, B: int, T: int, D: int, out: int, kind: str = "bd", bias: bool = True
) -> Inputs:
    shift, scale = draw.modulation(kind, B, T, D)
    return {"x": draw.tokens(B, T, D, 0.5, 2.0), "shift": shift, "scale": scale, **_linear(draw, D, out, bias)}


def linear_gate_residual(
    draw: Draw, B: int, T: int, K: int, out: int, gate: str | None = "bd", bias: bool = True, residual: bool = True
) -> Inputs:
    h = draw.tokens(B, T, K, std=2.0)
    gates = None if gate is None else draw.gate(gate, B, T, out)
    layer = _linear(draw, K, out, bias)
    return {"h": h, **layer, "gate": gates, "residual": draw.tokens(B, T, out) if residual else None}


def operand(draw: Draw, kind: str | None, B: int, T: int, D: int, K: int = 3) -> Tensor | None:
    """A shift, scale or gate; kind: "d", "bd", "btd", "bfd" (K frames), "kd", "bkd" (K rows to choose from) or None."""
    if kind is None:
        return None
    if kind in ("bfd", "bkd"):
        return draw.tokens(B, K, D)
    return draw.chunks(K, D, 1)[0] if kind == "kd" else draw.gate(kind, B, T, D)


def draw_index(draw: Draw, B: int, T: int, K: int) -> Tensor:
    """Row K - 2 is chosen by no token, and the samples differ."""
    index = torch.randint(0, K, (B, T), generator=draw.generator)
    return torch.where(index == K - 2, K - 1, index).to(draw.device)


def residual_norm_modulate(
    draw: Draw,
    B: int,
    T: int,
    D: int,
    gate: str | None = "bd",
    kind: str | None = "bd",
    tables: bool = False,
    branch_weight: bool = False,
    affine: str = "neither",
    K: int = 3,
) -> Inputs:
    weight, bias, _, _ = norm_operands(draw, B, D, affine, False)
    inputs = {"residual": draw.tokens(B, T, D), "branch": draw.tokens(B, T, D), "gate": operand(draw, gate, B, T, D, K)}
    inputs["shift"], inputs["scale"] = (operand(draw, kind, B, T, D, K) for _ in range(2))
    inputs["branch_weight"] = draw.vector(D, 1.0) if branch_weight else None
    for name in ("gate", "shift", "scale"):
        inputs[f"{name}_table"] = draw.vector(D) if tables and inputs[name] is not None else None
    indexed = any(k is not None and "k" in k for k in (gate, kind))
    inputs["index"] = draw_index(draw, B, T, K) if indexed else None
    return {**inputs, "weight": weight, "bias": bias}


_TANH_RMS = {"gate_activation": "tanh", "branch_norm": "rms", "norm": "rms"}
# (variant, sizes, options)
RESIDUAL_NORMS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("tables", {"B": 3, "T": 11, "D": 40, "tables": True}, {}),
    ("affine-ungated", {"B": 2, "T": 9, "D": 37, "gate": None, "kind": None, "affine": "both"}, {}),
    ("frames", {"B": 2, "T": 12, "D": 33, "gate": "bfd", "kind": "bfd", "tables": True}, {}),
    ("index", {"B": 3, "T": 23, "D": 48, "gate": "bkd", "kind": "bkd", "K": 5, "tables": True}, {}),
    ("index-of-all", {"B": 2, "T": 17, "D": 40, "gate": "kd", "kind": "kd", "affine": "weight"}, {"norm": "rms"}),
    ("per-token-tables", {"B": 2, "T": 9, "D": 72, "gate": "btd", "kind": "btd", "tables": True}, {}),
    ("tanh-rms", {"B": 2, "T": 13, "D": 56, "kind": "d", "branch_weight": True, "affine": "weight"}, _TANH_RMS),
    ("tanh-rms-index", {"B": 2, "T": 19, "D": 41, "gate": "bkd", "kind": "bkd", "branch_weight": True}, _TANH_RMS),
    ("large", {"B": 2, "T": 300, "D": 256, "gate": "bkd", "kind": "bkd", "K": 40, "tables": True}, {}),
)
