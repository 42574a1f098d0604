"""Cases of the ops: inputs of some sizes and layouts, the call of zeroblock's function, the same in eager PyTorch.

Tests take cases from CASES or make their own with other sizes; `parity.py` judges them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .. import functional
from .._dtypes import KERNELS as DTYPES  # noqa: F401  (of the cases)
from . import eager_ops, row_inputs
from .draw import Draw
from .row_inputs import Inputs, norm_operands

Size = Sequence[int]
AFFINE = ("both", "weight", "bias", "neither")  # which parameters a norm has

# ---- inputs ---------------------------------------------------------------------------------------------------------


def _group_norm_silu(
    draw: Draw, N: int, C: int, S: Size, affine: str = "both", film: bool = False, mean: float = 0.5, std: float = 2.0
) -> Inputs:
    weight, bias, scale, shift = norm_operands(draw, N, C, affine, film)
    x = draw.tensor(N, C, *S, mean=mean, std=std)
    return {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift}


def _tail(draw: Draw, N: int, C: int, S: Size, K: int, out: int, padding: int, bias: bool, residual: bool) -> Inputs:
    """weight, bias and residual of a convolution with a kernel K wide in every dimension."""
    size = [n + 2 * padding - K + 1 for n in S]
    return {
        "weight": draw.normal(out, C, *[K] * len(S), std=(C * K ** len(S)) ** -0.5),
        "bias": draw.vector(out) if bias else None,
        "residual": draw.tensor(N, out, *size) if residual else None,
    }


def _group_norm_silu_conv_residual(
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


def _conv_residual(
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


# ---- ops ------------------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """How to make the inputs of an op, zeroblock's function of them, and the composition that users write."""

    inputs: Callable[..., Inputs]
    run: Callable[..., Any]
    eager: Callable[..., Any]


_OPS = {
    "group_norm_silu": Op(_group_norm_silu, functional.group_norm_silu, eager_ops.group_norm_silu),
    "group_norm_silu_conv_residual": Op(
        _group_norm_silu_conv_residual,
        functional.group_norm_silu_conv_residual,
        eager_ops.group_norm_silu_conv_residual,
    ),
    "conv_residual": Op(_conv_residual, functional.conv_residual, eager_ops.conv_residual),
    "layer_norm_modulate": Op(
        row_inputs.layer_norm_modulate, functional.layer_norm_modulate, eager_ops.layer_norm_modulate
    ),
    "rms_norm_modulate": Op(row_inputs.rms_norm_modulate, functional.rms_norm_modulate, eager_ops.rms_norm_modulate),
    "gate_residual": Op(row_inputs.gate_residual, functional.gate_residual, eager_ops.gate_residual),
    "gate_residual_layer_norm_modulate": Op(
        row_inputs.gate_residual_layer_norm_modulate,
        functional.gate_residual_layer_norm_modulate,
        eager_ops.gate_residual_layer_norm_modulate,
    ),
    "layer_norm_modulate_linear": Op(
        row_inputs.layer_norm_modulate_linear,
        functional.layer_norm_modulate_linear,
        eager_ops.layer_norm_modulate_linear,
    ),
    "residual_norm_modulate": Op(
        row_inputs.residual_norm_modulate, functional.residual_norm_modulate, eager_ops.residual_norm_modulate
    ),
    "linear_gate_residual": Op(
        row_inputs.linear_gate_residual, functional.linear_gate_residual, eager_ops.linear_gate_residual
    ),
}


# ---- cases ----------------------------------------------------------------------------------------------------------

IMAGES = ("dense", "nhwc", "strided")
TOKENS = ("dense", "strided")


@dataclass(frozen=True)
class Case:
    """One call of an op; str() is its id, "op-variant"."""

    op: str  # a key of _OPS
    variant: str  # what is special about it, in a few words
    sizes: dict[str, Any]  # arguments of the op's input builder
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the call that are not tensors
    layouts: Sequence[str] = TOKENS  # of draw.py, worth testing here
    large: bool = False  # enough work for several threads

    def inputs(self, draw: Draw) -> Inputs:
        """{argument: tensor or None}"""
        return _OPS[self.op].inputs(draw, **self.sizes)

    def run(self, **inputs: Tensor | None) -> Any:
        """The result of zeroblock's function."""
        return _OPS[self.op].run(**inputs, **self.options)

    def eager(self, **inputs: Tensor | None) -> Any:
        """The result in plain PyTorch."""
        return _OPS[self.op].eager(**inputs, **self.options)

    def __str__(self) -> str:
        return f"{self.op}-{self.variant}"


def _images(op: str, variant: str, options: dict | None = None, layouts: Sequence[str] = IMAGES, **sizes: Any) -> Case:
    if len(sizes["S"]) not in (2, 3):
        layouts = [layout for layout in layouts if layout != "nhwc"]
    return Case(op, variant, sizes, options or {}, layouts)


def _cases() -> Iterable[Case]:
    def groups(num_groups: int, **options: Any) -> dict[str, Any]:
        return {"num_groups": num_groups, **options}

    norm = "group_norm_silu"
    yield _images(norm, "affine", groups(32), N=3, C=64, S=(5, 7))
    yield _images(norm, "film", groups(32), N=3, C=64, S=(16, 16), film=True)
    yield _images(norm, "film-no-affine", groups(3), N=2, C=12, S=(3, 5, 4), affine="neither", film=True)
    for affine in ("weight", "bias"):
        yield _images(norm, f"film-{affine}-alone", groups(3), N=2, C=12, S=(5, 7), affine=affine, film=True)
        yield Case("layer_norm_modulate", f"{affine}-alone", {"B": 2, "T": 9, "D": 40, "affine": affine})
    yield _images(norm, "film-prime", groups(7, activation=None), N=3, C=21, S=(13, 11), film=True)
    yield _images(norm, "plain-1d", groups(4, activation=None, eps=1e-3), N=2, C=20, S=(37,), affine="neither")
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
    yield _images(fused, "no-affine-1d", groups(4), N=2, C=16, S=(17,), affine="neither")
    yield _images(fused, "film-3d", groups(4), N=2, C=16, S=(4, 5, 3), film=True)
    yield Case(
        fused, "large", {"N": 2, "C": 32, "S": (32, 32), "out": 32, "film": True}, groups(32), IMAGES, large=True
    )

    yield _images("conv_residual", "3x3", N=3, C=16, S=(9, 7))
    yield _images("conv_residual", "3x3-no-bias", N=2, C=8, S=(5, 6), bias=False)
    yield _images("conv_residual", "1x1-no-bias", {"padding": 0}, N=2, C=7, S=(5, 6), K=1, padding=0, bias=False)
    yield _images("conv_residual", "1d", N=2, C=16, S=(19,))
    yield _images("conv_residual", "3d-bare", N=2, C=8, S=(4, 5, 3), bias=False, residual=False)
    yield Case("conv_residual", "large", {"N": 2, "C": 32, "S": (32, 32), "out": 32}, {}, IMAGES, large=True)

    for op in ("layer_norm_modulate", "rms_norm_modulate"):
        yield Case(op, "chunks", {"B": 3, "T": 17, "D": 48})
        yield Case(op, "affine-prime", {"B": 3, "T": 11, "D": 37, "affine": "both"}, {"eps": 1e-3})
        yield Case(op, "per-token", {"B": 2, "T": 13, "D": 72, "kind": "btd"})
        yield Case(op, "mixed", {"B": 2, "T": 6, "D": 33, "kind": "mixed", "affine": "both"})
        yield Case(op, "scale-only", {"B": 2, "T": 5, "D": 1152, "kind": "scale"})
        yield Case(op, "shift-only", {"B": 4, "T": 1, "D": 19, "kind": "shift"})
        yield Case(op, "no-modulation", {"B": 2, "T": 9, "D": 64, "kind": "none", "affine": "both"})
        yield Case(op, "large", {"B": 3, "T": 257, "D": 384, "affine": "both"}, large=True)

    for gate in ("one", "d", "bd", "btd"):
        yield Case("gate_residual", gate, {"size": (3, 17, 37), "gate": gate})
        sizes = {"B": 3, "T": 17, "D": 50, "gate": gate, "kind": "btd" if gate == "d" else "bd"}
        yield Case("gate_residual_layer_norm_modulate", f"gate-{gate}", sizes)
        sizes = {"B": 3, "T": 130, "D": 256, "gate": gate}
        yield Case("gate_residual_layer_norm_modulate", f"gate-{gate}-large", sizes, large=True)
        yield Case("gate_residual", f"{gate}-large", {"size": (3, 130, 256), "gate": gate}, large=True)
    yield Case("gate_residual", "one-2d", {"size": (7, 30)}, layouts=TOKENS)
    yield Case("gate_residual", "one-4d", {"size": (2, 6, 9, 7)}, layouts=IMAGES)

    for variant, sizes, options in row_inputs.RESIDUAL_NORMS:
        yield Case("residual_norm_modulate", variant, sizes, options, large="large" in variant)

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
