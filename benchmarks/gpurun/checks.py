"""The calls that a run judges: a case of an op in a dtype and layout, and how its kernels are chosen.

`correct.py` judges them on the device, `cache.py` records on meta tensors what they start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from zeroblock.backends import available
from zeroblock.plan import planned
from zeroblock.plan.planned import STEPS, PlannedOp
from zeroblock.testing.cases import CASES, DTYPES, Case
from zeroblock.testing.draw import Draw
from zeroblock.testing.parity import evaluate, floating, leaves, output_grads

MEASURED, WAY = "measured", "way "  # of Check.chosen, beside the names of backends

# Shapes that take other paths than small ones: a cluster of blocks for a group, two passes over it, programs of several
# steps, rows of several tiles, gates of several column tiles.
_BOTH, _FILM = ("dense", "nhwc"), {"film": True, "mean": 0.5}
_UNET = {"N": 2, "C": 320, "S": (64, 64)}
_FRAMES = {"num_groups": 32, "per_frame": True}
_BY_NAME = {str(case): case for case in CASES}


def _wider(name: str, variant: str, **sizes: int) -> Case:
    """The case of that name at another size."""
    case = _BY_NAME[name]
    return dataclasses.replace(case, variant=variant, sizes={**case.sizes, **sizes}, layouts=("dense",))


LARGE = (
    Case("group_norm_silu", "cluster", {**_UNET, **_FILM}, {"num_groups": 32}, _BOTH),
    Case("group_norm_silu", "two-passes", {"N": 1, "C": 128, "S": (512, 512)}, {"num_groups": 32}, _BOTH),
    Case("group_norm_silu", "wide-groups", {"N": 2, "C": 2560, "S": (8, 8), **_FILM}, {"num_groups": 32}, _BOTH),
    Case("group_norm_silu", "frames", {"N": 1, "C": 512, "S": (4, 60, 104)}, _FRAMES, _BOTH),
    Case("channel_rms_norm_silu", "video", {"N": 1, "C": 96, "S": (4, 120, 208)}, {}, _BOTH),
    Case("layer_norm_modulate", "several-steps", {"B": 4, "T": 4096, "D": 1152}, {}, ("dense",)),
    Case("rms_norm_modulate", "several-tiles", {"B": 2, "T": 64, "D": 5120}, {}, ("dense",)),
    Case("gate_residual", "several-columns", {"size": (2, 4096, 3072), "gate": "bd"}, {}, ("dense",)),
    Case("gate_residual_layer_norm_modulate", "several-steps", {"B": 4, "T": 2048, "D": 1152}, {}, ("dense",)),
    _wider("residual_norm_modulate-index", "index-several-steps", B=2, T=4096, D=1536),
    _wider("residual_norm_modulate-tanh-rms", "tanh-rms-several-tiles", B=2, T=64, D=5120),
    Case("linear_gate_residual", "projection", {"B": 2, "T": 1024, "K": 4608, "out": 1152}, {}, ("dense",)),
    Case("conv_residual", "unet", {**_UNET, "out": 320}, {}, ("nhwc",)),
    Case("group_norm_silu_conv_residual", "unet", {**_UNET, "out": 320, "film": True}, {"num_groups": 32}, ("nhwc",)),
)
_POINT = {"N": 2, "C": 16, "S": (9, 7), "K": 1, "out": 8, "padding": 0}
POINTS = (
    Case("conv_residual", "point", _POINT, {"padding": 0}, ("nhwc",)),
    Case("group_norm_silu_conv_residual", "point", _POINT, {"padding": 0, "num_groups": 4}, ("nhwc",)),
)
# Options that make other kernels of an op.
OTHERS = [
    _BY_NAME[name]
    for name in ("group_norm_silu-frames-film", "residual_norm_modulate-index", "residual_norm_modulate-tanh-rms")
]
QUICK_LARGE = (
    Case("group_norm_silu", "cluster", {"N": 1, "C": 8, "S": (6, 5), **_FILM}, {"num_groups": 2}, ("dense",)),
    Case("layer_norm_modulate", "several-steps", {"B": 1, "T": 9, "D": 24}, {}, ("dense",)),
)


class Check(NamedTuple):
    case: Case
    layout: str
    dtype: torch.dtype
    chosen: str  # a backend for all; MEASURED; WAY and the name of a way, taken wherever a step has it

    @property
    def name(self) -> str:
        return f"{self.chosen}/{self.case}/{self.layout}/{str(self.dtype)[6:]}"


def backends(device: str) -> tuple[str, ...]:
    """Whose kernels are judged on this type of device."""
    return ("triton", "cuda") if device == "cuda" else ("cpu",)


def _ranked() -> Iterator[tuple[int, Case]]:
    """Each case with its place among those of its op."""
    seen: dict[str, int] = {}
    for case in CASES:
        seen[case.op] = seen.get(case.op, -1) + 1
        yield seen[case.op], case


def by_place(quick: bool) -> list[Case]:
    """The first case of each op before all second ones."""
    return [case for place, case in sorted(_ranked(), key=lambda found: found[0]) if not quick or place == 0]


def firsts() -> list[tuple[Case, str]]:
    """One case of each op, of some of them more, in a layout that every backend's own kernels take."""
    cases = [*(case for place, case in _ranked() if place == 0), *POINTS, *OTHERS]
    return [(case, "nhwc" if "conv" in case.op else "dense") for case in cases]


def parity(device: str, quick: bool) -> Iterator[Check]:
    """Every op, backend, dtype and layout."""
    for case in by_place(quick):
        for layout in case.layouts[:1] if quick else case.layouts:
            for dtype in DTYPES:
                yield from (Check(case, layout, dtype, backend) for backend in backends(device))


def large(device: str, quick: bool) -> Iterator[Check]:
    for case in QUICK_LARGE if quick else LARGE:
        for layout in case.layouts:
            for dtype in (torch.bfloat16, torch.float32):
                yield from (Check(case, layout, dtype, backend) for backend in backends(device))


def measured() -> Iterator[Check]:
    """As users run it: each step as measured at its first call."""
    for case, layout in firsts():
        yield from (Check(case, layout, dtype, MEASURED) for dtype in (torch.bfloat16, torch.float32))


def steps(device: str) -> list[PlannedOp]:
    """Those that may be taken on this type of device: a GPU's are made when a call first needs them."""
    if device != "cpu":
        importlib.import_module("zeroblock.backends.gpu")
    return list(STEPS.values())


def ways(device: str) -> Iterator[Check]:
    """Each way that a plan may choose on this type of device, in each op that has it."""
    names = sorted({name for step in steps(device) for name in step.candidates} - {"library"})
    if device != "cpu":
        names = [name for name in names if name.startswith((*backends(device), "library "))]
    for name in names:
        for case, layout in firsts():
            for dtype in (torch.bfloat16, torch.float32):
                yield Check(case, layout, dtype, WAY + name)


def call(check: Check, device: str) -> None:
    """Forward and backward once, on the values that `assert_parity` draws first; on "meta" without values."""
    draw = Draw(check.dtype, check.layout, device="cpu" if device == "meta" else device)
    drawn = check.case.inputs(draw)
    grads = output_grads(check.case, drawn, draw)
    if device == "meta":
        drawn = {name: t if t is None else as_meta(t) for name, t in drawn.items()}
        grads = [as_meta(g) for g in grads]
    evaluate(check.case.run, leaves(drawn, check.dtype, floating(drawn)), grads)


def as_meta(t: torch.Tensor) -> torch.Tensor:
    """A tensor without memory that lies as t does: its place in 16 bytes, too, since kernels depend on that."""
    offset = t.data_ptr() % 16 // t.element_size()
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return torch.empty(offset + span, dtype=t.dtype, device="meta").as_strided(t.shape, t.stride(), offset)


@contextlib.contextmanager
def chosen(check: Check, device: str) -> Iterator[set[str]]:
    """Runs the block with the check's choice, on tensors of this device. The set: steps that took the way asked for."""
    took: set[str] = set()
    with contextlib.ExitStack() as stack:
        if check.chosen == MEASURED:
            stack.enter_context(planned.use("measure"))
            for step in steps(device):
                stack.enter_context(_attribute(step, "worth", 0))
        elif check.chosen.startswith(WAY):
            stack.enter_context(planned.use("fixed"))
            for step in steps(device):
                stack.enter_context(_prefer(step, check.chosen.removeprefix(WAY), took))
        else:
            stack.enter_context(available.use_backend(check.chosen))
        yield took


@contextlib.contextmanager
def _attribute(step: PlannedOp, name: str, value: object) -> Iterator[None]:
    before = getattr(step, name)
    setattr(step, name, value)
    try:
        yield
    finally:
        setattr(step, name, before)


@contextlib.contextmanager
def _prefer(step: PlannedOp, way: str, took: set[str]) -> Iterator[None]:
    """The step's rule is the way, where it has it and it takes the call."""

    def rule(*args: object) -> str:
        if way in step.candidates and step.candidates[way].usable(*args):
            took.add(step.name)
            return way
        return "library"

    plain = {name: dataclasses.replace(c, rule=None) for name, c in step.candidates.items()}
    with _attribute(step, "rule", rule), _attribute(step, "candidates", plain):
        yield
