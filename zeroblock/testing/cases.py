"""The registry of op cases: how to make inputs for each op, and eager, the composition users write.

A case is an op, the sizes that its input builder takes and the options of its call. Tests take cases from CASES or make
their own with other sizes; `parity.py` judges them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zeroblock

from .draw import Draw

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Inputs = dict[str, Tensor | None]

# ---- inputs ---------------------------------------------------------------------------------------------------------


def _norm_operands(draw: Draw, N: int, C: int, affine: bool, film: bool) -> list[Tensor | None]:
    """[weight, bias, scale, shift]"""
    weights = [draw.vector(C, 1.0), draw.vector(C)] if affine else [None, None]
    return [*weights, *(draw.chunks(N, C, 2) if film else (None, None))]


def _group_norm_silu(draw, N, C, S, affine=True, film=False, mean=0.5, std=2.0) -> Inputs:
    weight, bias, scale, shift = _norm_operands(draw, N, C, affine, film)
    return {
        "x": draw.tensor(N, C, *S, mean=mean, std=std), "weight": weight, "bias": bias, "scale": scale, "shift": shift
    }  # fmt: skip


def _tail(draw: Draw, N, C, S, K, out, padding, bias, residual) -> Inputs:
    """weight, bias and residual of a convolution with a kernel K wide in every dimension."""
    size = [n + 2 * padding - K + 1 for n in S]
    return {
        "weight": draw.normal(out, C, *[K] * len(S), std=(C * K ** len(S)) ** -0.5),
        "bias": draw.vector(out) if bias else None,
        "residual": draw.tensor(N, out, *size) if residual else None,
    }


def _group_norm_silu_conv_residual(
    draw, N, C, S, K=3, out=8, padding=1, affine=True, film=False, bias=True, residual=True, keep=False
) -> Inputs:
    norm_weight, norm_bias, scale, shift = _norm_operands(draw, N, C, affine, film)
    x = draw.tensor(N, C, *S, mean=0.5, std=2.0)
    norm = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "scale": scale, "shift": shift}
    mask = draw.normal(N, C, *S) > -0.5 if keep else None
    return {**norm, **_tail(draw, N, C, S, K, out, padding, bias, residual), "keep": mask}


def _conv_residual(draw, N, C, S, K=3, out=8, padding=1, bias=True, residual=True) -> Inputs:
    return {"h": draw.tensor(N, C, *S), **_tail(draw, N, C, S, K, out, padding, bias, residual)}


def _layer_norm_modulate(draw, B, T, D, kind="bd", affine=False, mean=0.5, std=2.0) -> Inputs:
    shift, scale = draw.modulation(kind, B, T, D)
    weight, bias, _, _ = _norm_operands(draw, B, D, affine, False)
    return {
        "x": draw.tokens(B, T, D, mean=mean, std=std), "shift": shift, "scale": scale, "weight": weight, "bias": bias
    }  # fmt: skip


def _rms_norm_modulate(draw, B, T, D, kind="bd", affine=False, mean=0.5, std=2.0) -> Inputs:
    inputs = _layer_norm_modulate(draw, B, T, D, kind, affine, mean, std)
    del inputs["bias"]
    return inputs


def _gate_residual(draw, size, gate="one") -> Inputs:
    tensor = draw.tokens if len(size) == 3 else draw.tensor
    gates = draw.vector(1) if gate == "one" else draw.gate(gate, *size)
    return {"residual": tensor(*size), "gate": gates, "branch": tensor(*size)}


def _gate_residual_layer_norm_modulate(draw, B, T, D, gate="bd", kind="bd") -> Inputs:
    shift, scale = draw.modulation(kind, B, T, D)
    return {**_gate_residual(draw, (B, T, D), gate), "shift": shift, "scale": scale}


def _linear(draw, K, out, bias) -> Inputs:
    return {"weight": draw.normal(out, K, std=K**-0.5), "bias": draw.vector(out) if bias else None}


def _layer_norm_modulate_linear(draw, B, T, D, out, kind="bd", bias=True) -> Inputs:
    shift, scale = draw.modulation(kind, B, T, D)
    return {"x": draw.tokens(B, T, D, 0.5, 2.0), "shift": shift, "scale": scale, **_linear(draw, D, out, bias)}


def _linear_gate_residual(draw, B, T, K, out, gate: str | None = "bd", bias=True, residual=True) -> Inputs:
    h = draw.tokens(B, T, K, std=2.0)
    gates = None if gate is None else draw.gate(gate, B, T, out)
    return {
        "h": h, **_linear(draw, K, out, bias), "gate": gates, "residual": draw.tokens(B, T, out) if residual else None
    }  # fmt: skip


# ---- eager ----------------------------------------------------------------------------------------------------------


def _rows(v: Tensor) -> Tensor:
    return v.unsqueeze(1) if v.dim() == 2 else v


def _modulated(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    x = x if scale is None else x * (1 + _rows(scale))
    return x if shift is None else x + _rows(shift)


def _eager_group_norm_silu(x, num_groups, weight, bias, scale, shift, eps=1e-5, activation="silu"):
    y = F.group_norm(x, num_groups, weight, bias, eps)
    ones = (1,) * (x.dim() - 2)
    y = y if scale is None else y * (1 + scale.reshape(*scale.shape, *ones))
    y = y if shift is None else y + shift.reshape(*shift.shape, *ones)
    return y if activation is None else F.silu(y)


def _eager_conv_residual(h, weight, bias, residual, padding=1):
    y = (F.conv1d, F.conv2d, F.conv3d)[h.dim() - 3](h, weight, bias, padding=padding)
    return y if residual is None else residual + y


def _eager_group_norm_silu_conv_residual(
    x, num_groups, norm_weight, norm_bias, weight, bias, residual, scale, shift, keep, padding=1, dropout_p=0.0
):
    h = _eager_group_norm_silu(x, num_groups, norm_weight, norm_bias, scale, shift)
    h = h if keep is None else h * (keep.to(h.dtype) / (1 - dropout_p))
    return _eager_conv_residual(h, weight, bias, residual, padding)


def _eager_layer_norm_modulate(x, shift, scale, weight=None, bias=None, eps=1e-6):
    return _modulated(F.layer_norm(x, x.shape[-1:], weight, bias, eps), shift, scale)


def _eager_rms_norm_modulate(x, shift, scale, weight, eps=1e-6):
    return _modulated(F.rms_norm(x, x.shape[-1:], weight, eps), shift, scale)


def _eager_gate_residual(residual, gate, branch):
    return residual + _rows(gate) * branch


def _eager_gate_residual_layer_norm_modulate(residual, gate, branch, shift, scale, eps=1e-6):
    x_new = _eager_gate_residual(residual, gate, branch)
    return x_new, _eager_layer_norm_modulate(x_new, shift, scale, eps=eps)


def _eager_layer_norm_modulate_linear(x, shift, scale, weight, bias, eps=1e-6):
    return F.linear(_eager_layer_norm_modulate(x, shift, scale, eps=eps), weight, bias)


def _eager_linear_gate_residual(h, weight, bias, gate, residual, activation=None):
    act = {None: lambda t: t, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
    y = F.linear(act[activation](h), weight, bias)
    y = y if gate is None else _rows(gate) * y
    return y if residual is None else residual + y


# ---- cases ----------------------------------------------------------------------------------------------------------

IMAGES = ("dense", "nhwc", "strided")
TOKENS = ("dense", "strided")


@dataclass(frozen=True)
class Case:
    """One op with the sizes that its input builder takes and the options of its call."""

    op: str
    variant: str
    sizes: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    layouts: Sequence[str] = TOKENS
    large: bool = False  # enough work for several threads

    def inputs(self, draw: Draw) -> Inputs:
        return globals()[f"_{self.op}"](draw, **self.sizes)

    def run(self, **inputs):
        return getattr(zeroblock, self.op)(**inputs, **self.options)

    def eager(self, **inputs):
        return globals()[f"_eager_{self.op}"](**inputs, **self.options)

    def __str__(self):
        return f"{self.op}-{self.variant}"


def _images(op: str, variant: str, options: dict | None = None, layouts: Sequence[str] = IMAGES, **sizes) -> Case:
    if len(sizes["S"]) not in (2, 3):
        layouts = [layout for layout in layouts if layout != "nhwc"]
    return Case(op, variant, sizes, options or {}, layouts)


def _cases() -> Iterable[Case]:
    norm, groups = "group_norm_silu", lambda g, **rest: {"num_groups": g, **rest}
    yield _images(norm, "affine", groups(32), N=3, C=64, S=(5, 7))
    yield _images(norm, "film", groups(32), N=3, C=64, S=(16, 16), film=True)
    yield _images(norm, "film-no-affine", groups(3), N=2, C=12, S=(3, 5, 4), affine=False, film=True)
    yield _images(norm, "film-prime", groups(7, activation=None), N=3, C=21, S=(13, 11), film=True)
    yield _images(norm, "plain-1d", groups(4, activation=None, eps=1e-3), N=2, C=20, S=(37,), affine=False)
    yield _images(norm, "one-pixel", groups(8), N=4, C=64, S=(1, 1), film=True)
    yield _images(norm, "group-per-channel", groups(18), N=2, C=18, S=(9, 10))
    yield _images(norm, "one-group-1152", groups(1), N=2, C=1152, S=(3, 3), film=True)
    yield Case(norm, "large", {"N": 2, "C": 96, "S": (40, 44), "film": True}, groups(32), IMAGES, large=True)

    fused = "group_norm_silu_conv_residual"
    dropped = groups(4, dropout_p=0.3)
    yield _images(fused, "film", groups(16), N=3, C=32, S=(9, 8), film=True)
    yield _images(fused, "dropout", dropped, N=2, C=16, S=(7, 6), keep=True)
    yield _images(
        fused, "1x1-bare", groups(3, padding=0), N=2, C=9, S=(5, 7), K=1, padding=0, bias=False, residual=False
    )
    yield _images(fused, "no-affine-1d", groups(4), N=2, C=16, S=(17,), affine=False)
    yield _images(fused, "film-3d", groups(4), N=2, C=16, S=(4, 5, 3), film=True)
    yield Case(
        fused, "large", {"N": 2, "C": 32, "S": (32, 32), "out": 32, "film": True}, groups(32), IMAGES, large=True
    )

    yield _images("conv_residual", "3x3", N=3, C=16, S=(9, 7))
    yield _images("conv_residual", "1x1-no-bias", {"padding": 0}, N=2, C=7, S=(5, 6), K=1, padding=0, bias=False)
    yield _images("conv_residual", "1d", N=2, C=16, S=(19,))
    yield _images("conv_residual", "3d-bare", N=2, C=8, S=(4, 5, 3), bias=False, residual=False)
    yield Case("conv_residual", "large", {"N": 2, "C": 32, "S": (32, 32), "out": 32}, {}, IMAGES, large=True)

    for op in ("layer_norm_modulate", "rms_norm_modulate"):
        yield Case(op, "chunks", {"B": 3, "T": 17, "D": 48})
        yield Case(op, "affine-prime", {"B": 3, "T": 11, "D": 37, "affine": True}, {"eps": 1e-3})
        yield Case(op, "per-token", {"B": 2, "T": 13, "D": 72, "kind": "btd"})
        yield Case(op, "mixed", {"B": 2, "T": 6, "D": 33, "kind": "mixed", "affine": True})
        yield Case(op, "scale-only", {"B": 2, "T": 5, "D": 1152, "kind": "scale"})
        yield Case(op, "shift-only", {"B": 4, "T": 1, "D": 19, "kind": "shift"})
        yield Case(op, "no-modulation", {"B": 2, "T": 9, "D": 64, "kind": "none", "affine": True})
        yield Case(op, "large", {"B": 3, "T": 257, "D": 384, "affine": True}, large=True)

    for gate in ("one", "d", "bd", "btd"):
        yield Case("gate_residual", gate, {"size": (3, 17, 37), "gate": gate})
        sizes = {"B": 3, "T": 17, "D": 50, "gate": gate, "kind": "btd" if gate == "d" else "bd"}
        yield Case("gate_residual_layer_norm_modulate", f"gate-{gate}", sizes)
        sizes = {"B": 3, "T": 130, "D": 256, "gate": gate}
        yield Case("gate_residual_layer_norm_modulate", f"gate-{gate}-large", sizes, large=True)
        yield Case("gate_residual", f"{gate}-large", {"size": (3, 130, 256), "gate": gate}, large=True)
    yield Case("gate_residual", "one-2d", {"size": (7, 30)}, layouts=TOKENS)
    yield Case("gate_residual", "one-4d", {"size": (2, 6, 9, 7)}, layouts=IMAGES)

    yield Case("layer_norm_modulate_linear", "chunks", {"B": 3, "T": 17, "D": 48, "out": 31})
    sizes = {"B": 2, "T": 9, "D": 33, "out": 40, "kind": "btd", "bias": False}
    yield Case("layer_norm_modulate_linear", "per-token-no-bias", sizes)
    yield Case("layer_norm_modulate_linear", "large", {"B": 2, "T": 256, "D": 256, "out": 320}, large=True)

    tail = "linear_gate_residual"
    yield Case(tail, "one-gelu", {"B": 3, "T": 17, "K": 40, "out": 24, "gate": "one"}, {"activation": "gelu"})
    yield Case(tail, "d-silu", {"B": 2, "T": 9, "K": 33, "out": 50, "gate": "d"}, {"activation": "silu"})
    yield Case(tail, "bd-gelu-tanh", {"B": 3, "T": 17, "K": 40, "out": 31}, {"activation": "gelu_tanh"})
    yield Case(tail, "btd", {"B": 2, "T": 7, "K": 29, "out": 48, "gate": "btd", "bias": False})
    yield Case(tail, "bd-no-residual", {"B": 2, "T": 7, "K": 29, "out": 48, "residual": False})
    yield Case(tail, "no-gate", {"B": 2, "T": 11, "K": 32, "out": 21, "gate": None}, {"activation": "silu"})
    yield Case(tail, "bare", {"B": 2, "T": 11, "K": 32, "out": 21, "gate": None, "bias": False, "residual": False})
    sizes = {"B": 2, "T": 256, "K": 320, "out": 256}
    yield Case(tail, "large", sizes, {"activation": "gelu_tanh"}, large=True)


CASES = tuple(_cases())
OPS = tuple(dict.fromkeys(case.op for case in CASES))
