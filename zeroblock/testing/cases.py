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
from . import eager_ops, images, row_inputs
from .draw import Draw, Inputs

AFFINE = ("both", "weight", "bias", "neither")  # which parameters a norm has

# ---- ops ------------------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """How to make the inputs of an op, zeroblock's function of them, and the composition that users write."""

    inputs: Callable[..., Inputs]
    run: Callable[..., Any]
    eager: Callable[..., Any]


_OPS = {
    "group_norm_silu": Op(images.group_norm_silu, functional.group_norm_silu, eager_ops.group_norm_silu),
    "channel_rms_norm_silu": Op(
        images.channel_rms_norm_silu, functional.channel_rms_norm_silu, eager_ops.channel_rms_norm_silu
    ),
    "group_norm_silu_conv_residual": Op(
        images.group_norm_silu_conv_residual,
        functional.group_norm_silu_conv_residual,
        eager_ops.group_norm_silu_conv_residual,
    ),
    "conv_residual": Op(images.conv_residual, functional.conv_residual, eager_ops.conv_residual),
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
    frames = groups(4, per_frame=True)
    yield _images(norm, "frames-film", frames, N=2, C=12, S=(3, 5, 7), film=True)
    yield _images(norm, "frames-of-one", frames, N=1, C=8, S=(5, 4, 6), affine="weight")
    yield _images(norm, "one-frame", frames, N=2, C=8, S=(1, 7, 6))
    yield _images(norm, "one-pixel", groups(8), N=4, C=64, S=(1, 1), film=True)
    yield _images(norm, "group-per-channel", groups(18), N=2, C=18, S=(9, 10))
    yield _images(norm, "one-group-1152", groups(1), N=2, C=1152, S=(3, 3), film=True)
    yield Case(norm, "large", {"N": 2, "C": 96, "S": (40, 44), "film": True}, groups(32), IMAGES, large=True)

    channels, inside = "channel_rms_norm_silu", {"eps_mode": "inside", "eps": 1e-6}
    yield _images(channels, "affine", N=2, C=24, S=(5, 7))
    yield _images(channels, "weight-3d", N=2, C=48, S=(3, 5, 4), affine="weight")
    yield _images(channels, "film-inside", inside, N=3, C=20, S=(2, 3, 11), affine="neither", film=True)
    yield _images(channels, "film-prime", {"activation": None}, N=2, C=37, S=(13, 11), film=True)
    yield _images(channels, "bias-1d", {"eps": 0.5}, N=2, C=16, S=(37,), affine="bias")
    yield _images(channels, "one-pixel", N=4, C=64, S=(1, 1), film=True)
    yield _images(channels, "one-channel", {"eps": 1.51}, N=2, C=1, S=(9, 6))
    yield Case(channels, "large", {"N": 2, "C": 96, "S": (3, 24, 26), "film": True}, {}, IMAGES, large=True)

    fused = "group_norm_silu_conv_residual"
    dropped = groups(4, dropout_p=0.3)
    yield _images(fused, "film", groups(16), N=3, C=32, S=(9, 8), film=True)
    yield _images(fused, "dropout", dropped, N=2, C=16, S=(7, 6), keep=True)
    yield _images(
        fused, "1x1-bare", groups(3, padding=0), N=2, C=9, S=(5, 7), K=1, padding=0, bias=False, residual=False
    )
    yield _images(fused, "no-affine-1d", groups(4), N=2, C=16, S=(17,), affine="neither")
    yield _images(fused, "film-3d", groups(4), N=2, C=16, S=(4, 5, 3), film=True)
    first_frame = {"padding": ((2, 0), 1, 1), "padding_mode": ("replicate", "zeros", "zeros")}
    yield _images(fused, "first-frame", groups(4, **first_frame), N=2, C=16, S=(4, 5, 3), film=True)
    yield Case(
        fused, "large", {"N": 2, "C": 32, "S": (32, 32), "out": 32, "film": True}, groups(32), IMAGES, large=True
    )

    yield _images("conv_residual", "3x3", N=3, C=16, S=(9, 7))
    yield _images("conv_residual", "3x3-no-bias", N=2, C=8, S=(5, 6), bias=False)
    yield _images("conv_residual", "1x1-no-bias", {"padding": 0}, N=2, C=7, S=(5, 6), K=1, padding=0, bias=False)
    yield _images("conv_residual", "1d", N=2, C=16, S=(19,))
    yield _images("conv_residual", "3d-bare", N=2, C=8, S=(4, 5, 3), bias=False, residual=False)
    causal = {"padding": ((2, 0), (1, 1), 1)}
    yield _images("conv_residual", "causal", causal, N=2, C=8, S=(4, 5, 3))
    yield _images("conv_residual", "causal-repeated", {**causal, "padding_mode": "replicate"}, N=1, C=8, S=(2, 5, 6))
    yield _images("conv_residual", "one-frame", {**causal, **first_frame}, N=2, C=8, S=(1, 5, 3), bias=False)
    yield _images("conv_residual", "repeated", {"padding_mode": "replicate"}, N=2, C=8, S=(6, 5), residual=False)
    yield _images("conv_residual", "one-side", {"padding": ((2, 0),)}, N=2, C=8, S=(9,))
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
