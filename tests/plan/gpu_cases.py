"""GPU plans without a GPU: CPU tensors take the planned steps of backends/gpu, and backends can be stood in for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zeroblock as zb
from zeroblock.backends import available as _backends
from zeroblock.backends.eager import EAGER, Eager
from zeroblock.backends.flagged import FlaggedSteps
from zeroblock.backends.gpu import hinted, norms_gates
from zeroblock.backends.gpu.conv_grads import CONV_DGRAD, CONV_WGRAD, FLAGGED_DGRAD
from zeroblock.backends.gpu.convs import CONV_RESIDUAL, FLAGGED_CONV, FLAGGED_NORM_CONV, NORM_CONV_RESIDUAL
from zeroblock.backends.gpu.linear import FLAGGED_LINEAR, LINEAR_GATE_RESIDUAL
from zeroblock.plan import planned as _plan
from zeroblock.plan.planned import PlannedOp
from zeroblock.reference import is_zero, modulation

from .cases import FakeTimer

NORMS_GATES: list[PlannedOp] = [step for step in vars(norms_gates).values() if isinstance(step, PlannedOp)]
FLAGGED = [FLAGGED_CONV, FLAGGED_NORM_CONV, FLAGGED_DGRAD, FLAGGED_LINEAR]
STEPS = [*NORMS_GATES, CONV_RESIDUAL, NORM_CONV_RESIDUAL, CONV_DGRAD, CONV_WGRAD, LINEAR_GATE_RESIDUAL, *FLAGGED]


@contextlib.contextmanager
def planned_on_the_cpu() -> Iterator[pytest.MonkeyPatch]:
    """Every call in the block chooses as on a GPU, and is worth a measurement."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backends, "_forced", "gpu")
        for step in STEPS:
            patch.setattr(step, "worth", 0)
        yield patch


def always_flagged(patch: pytest.MonkeyPatch, is_flagged: bool = True) -> None:
    """Every hint says that the weight was last seen zero, or not, whatever it is; nothing is looked at."""
    patch.setattr(hinted, "plan_of", lambda weight: (is_flagged, None))


def prefer(patch: pytest.MonkeyPatch, name: str, backward: str | None = None) -> set[tuple[str, str]]:
    """The rule of every step becomes: the first way that is or begins with `name`, else the library's; of the steps of
    a backward the one with `backward`, where that is given. Returns what is then run, as (step, way)."""
    ran: set[tuple[str, str]] = set()

    def rule(step: PlannedOp, name: str):
        def way(*args):
            found = next((n for n in step.takers(*args) if n == name or n.startswith(name + " ")), "library")
            ran.add((step.name, found))
            return found

        return way

    for step in STEPS:
        of_backward = step.name.endswith(("bwd", "dgrad", "wgrad"))
        patch.setattr(step, "rule", rule(step, backward if of_backward and backward is not None else name))
    return ran


class StandIn(FlaggedSteps, Eager):
    """For the Triton or CUDA backend on CPU tensors: the library's arithmetic, flags read. `flags` are those that its
    convolutions and linears saw, `calls` the kernels called."""

    def __init__(self, name: str):
        self.name, self.flags, self.calls = name, [], []

    def kernel(self, name, *args, split=False, per_thread=None):
        """A norm, gate or activation."""
        self.calls.append(name)
        return getattr(EAGER, name)(*args)

    def why_not_own(self, op, h, weight, gate, residual, padding, config=None):
        if config is not None and config.endswith("x64") != (weight.dtype != torch.float32):
            return "no configuration"
        return None if self.name == "triton" or op != "linear_gate_residual" else "no linears"

    def why_not_folded(self, x, weight, residual, keep):
        return "not here"

    def why_not_norm_conv(self, x):
        return None

    def gemm_by_size(self, x, weight, rows):
        return "64x64x32" if x.dtype == torch.float32 else "64x64x64"

    def zero_flag(self, tensors):
        self.calls.append("zero_flag")
        return is_zero(*tensors).to(torch.int32).max().view(1)

    def add_bias(self, x, bias, dim, residual=None):
        y = x + (0 if bias is None else bias[:, None, None])
        return y if residual is None else y + residual

    def _own(self, y: Tensor, alone: Tensor, flag: Tensor | None) -> Tensor:
        self.flags.append(flag if flag is None else int(flag))
        return alone if self.flags[-1] else y

    def own_conv(self, h, weight, bias, residual, padding, flag, config=None):
        self.calls.append("conv")
        y = F.conv2d(h, weight, bias, padding=padding)
        residual = 0 if residual is None else residual
        alone = torch.zeros_like(y) if bias is None else torch.zeros_like(y) + bias[:, None, None]
        return self._own(y + residual, alone + residual, flag)

    def own_conv_dgrad(self, dy, weight, padding, flag, config=None):
        dh = F.conv_transpose2d(dy, weight, padding=padding)
        return self._own(dh, torch.zeros_like(dh), flag)

    def own_conv_wgrad(self, dy, h, weight, padding, config=None):
        return torch.nn.grad.conv2d_weight(h, weight.shape, dy, padding=padding)

    def own_linear_gate(self, call, flag, config=None):
        backend, h, weight, bias, gate, residual, activation, _, save_branch = call
        h = h if activation is None else backend.activation(h, activation, flag)
        branch = F.linear(h, weight, bias)
        gated = [t if gate is None else modulation(gate) * t for t in (branch, torch.zeros_like(branch) + bias)]
        residual = 0 if residual is None else residual
        y = self._own(*(residual + t for t in gated), flag)
        return y, branch if save_branch else y.new_empty(0)

    def group_moments(self, x, groups, eps, flag=None):
        return EAGER.group_norm_silu(x, groups, None, None, eps, None, None, False)[1:]

    def norm_conv(self, x, mean, rstd, norm, weight, bias, residual, flag=None):
        groups, norm_weight, norm_bias, eps, scale, shift, _, _ = norm
        h = EAGER.group_norm_silu(x, groups, norm_weight, norm_bias, eps, scale, shift, True)[0]
        return self.own_conv(h, weight, bias, residual, weight.shape[2] // 2, flag)


@contextlib.contextmanager
def stand_ins() -> Iterator[dict[str, StandIn]]:
    """`planned_on_the_cpu` with stand-ins for both GPU backends."""
    backends = {name: StandIn(name) for name in ("triton", "cuda")}
    with planned_on_the_cpu() as patch:
        for name, backend in backends.items():
            patch.setitem(_backends._loaded, name, backend)
        for step in NORMS_GATES:
            for candidate in [c for c in step.candidates.values() if c.name != "library"]:
                run = functools.partial(backends[candidate.name.split()[0]].kernel, step.name)
                patch.setitem(step.candidates, candidate.name, dataclasses.replace(candidate, run=run))
        yield backends


@pytest.fixture(name="backends")
def backends_fixture() -> Iterator[dict[str, StandIn]]:
    with stand_ins() as found:
        yield found


def inputs(op: str, dtype: torch.dtype = torch.float32, kernel: int = 3, grad: bool = False) -> dict[str, Tensor]:
    """Operands of a public function, small; with `grad` as leaves."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator).to(dtype)  # noqa: E731
    image, tokens, row = (2, 8, 6, 5), (2, 7, 8), (2, 8)
    nhwc = lambda *size: draw(*size).to(memory_format=torch.channels_last)  # noqa: E731
    modulated = {"shift": draw(*row), "scale": draw(*row)}
    gated = {"residual": draw(*tokens), "gate": draw(*row), "branch": draw(*tokens)}
    tail = {"weight": nhwc(8, 8, kernel, kernel), "bias": draw(8), "residual": nhwc(*image)}
    found = {
        "group_norm_silu": {"x": nhwc(*image), "weight": draw(8), "bias": draw(8), **modulated},
        "channel_rms_norm_silu": {"x": nhwc(*image), "weight": draw(8), "bias": draw(8), **modulated},
        "layer_norm_modulate": {"x": draw(*tokens), **modulated},
        "rms_norm_modulate": {"x": draw(*tokens), **modulated, "weight": draw(8)},
        "layer_norm_modulate_linear": {"x": draw(*tokens), **modulated, "weight": draw(5, 8), "bias": draw(5)},
        "gate_residual": gated,
        "gate_residual_layer_norm_modulate": {**gated, **modulated},
        "conv_residual": {"h": nhwc(*image), **tail},
        "group_norm_silu_conv_residual": {"x": nhwc(*image), "norm_weight": draw(8), "norm_bias": draw(8), **tail},
        "linear_gate_residual": {
            "h": draw(*tokens),
            "weight": draw(8, 8),
            "bias": draw(8),
            "gate": draw(*row),
            "residual": draw(*tokens),
        },
    }[op]
    return {name: t.requires_grad_(grad) for name, t in found.items()}


OPS = (
    "group_norm_silu",
    "channel_rms_norm_silu",
    "layer_norm_modulate",
    "rms_norm_modulate",
    "layer_norm_modulate_linear",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "conv_residual",
    "group_norm_silu_conv_residual",
    "linear_gate_residual",
)
# Without triton the GEMMs of OPS[7:] have no ways of their own to choose among.
TRITON = pytest.mark.skipif(not LINEAR_GATE_RESIDUAL.candidates.keys() - {"library"}, reason="triton is not installed")
_TAILS = [pytest.param(op, marks=TRITON) for op in OPS[7:]]
ops, tails = (pytest.mark.parametrize("op", found) for found in ([*OPS[:7], *_TAILS], _TAILS))
# The planned steps that a call and its backward take, the op's own first.
TAKEN = {
    **{op: (op, f"{op}_bwd") for op in OPS[:7]},
    "rms_norm_modulate": ("layer_norm_modulate", "layer_norm_modulate_bwd"),
    "layer_norm_modulate_linear": ("layer_norm_modulate", "layer_norm_modulate_bwd"),
    "conv_residual": ("conv_residual", "conv_dgrad", "conv_wgrad"),
    "group_norm_silu_conv_residual": ("group_norm_silu_conv_residual", "conv_dgrad", "conv_wgrad"),
    "linear_gate_residual": ("linear_gate_residual", "gate_residual_bwd"),
}
OPTIONS = {op: {"num_groups": 4} if op.startswith("group_norm") else {} for op in OPS}


class Timer(FakeTimer):
    """Seconds by exact name, 1 for the rest."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds


def run(op, grad=False, dtype=torch.float32, **options):
    """The result of a call, and of its backward."""
    given = inputs(op, dtype, grad=grad)
    y = getattr(zb, op)(**given, **OPTIONS[op], **options)
    if grad:
        sum(t.square().sum() for t in (y if isinstance(y, tuple) else (y,))).backward()
    return y


def choices() -> dict[str, str]:
    """What was chosen by measurement, by step."""
    return {key.split(maxsplit=1)[0]: entry.choice for key, entry in _plan.open_store().entries.items()}
