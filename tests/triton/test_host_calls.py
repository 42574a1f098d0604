"""What a launch costs the host, beside Triton's own start of a kernel: functions called, a tenth of a microsecond each,
and tensors made. In eager training of small models the host is what a step waits for."""

import sys
from collections import Counter
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from zeroblock.kernels import (  # noqa: E402
    gate_residual,
    group_norm_silu,
    group_norm_silu_bwd,
    layer_norm_modulate,
    zero_flag,
)

X, ROW, STAT, WEIGHT = torch.zeros(2, 8, 64), torch.zeros(2, 64), torch.zeros(2, 8), torch.zeros(64)
IMAGE, GROUPS = torch.zeros(2, 64, 4, 4), torch.zeros(2, 32)
NORM = (WEIGHT, WEIGHT, ROW, ROW, 32)
# (functions of Python, others) called at most by a call that was made before, and its launches. Until Python 3.11 a
# comprehension is a function, too.
CALLS = {
    "layer_norm_modulate": (
        partial(layer_norm_modulate.forward, X, ROW, ROW, None, None, 1e-6, False),
        (18, 26, 1),
    ),
    "layer_norm_modulate_bwd": (
        partial(layer_norm_modulate.backward, X, X, STAT, STAT, ROW, ROW, None, None, False),
        (25, 28, 2),
    ),
    "group_norm_silu": (
        partial(group_norm_silu.forward, IMAGE, 32, WEIGHT, WEIGHT, 1e-5, ROW, ROW, True, False),
        (14, 14, 1),
    ),
    "group_norm_silu_bwd": (
        partial(group_norm_silu_bwd.backward, IMAGE, IMAGE, GROUPS, GROUPS, *NORM, True, False),
        (30, 22, 2),
    ),
    "gate_residual": (partial(gate_residual.forward, X, ROW, X, X.dtype), (13, 16, 1)),
    "zero_flag": (partial(zero_flag.zero_flag, [WEIGHT], True), (15, 22, 1)),
}


class Kernel:
    """Instead of one of Triton's: counts what is started."""

    started = 0

    def __getitem__(self, grid):
        return self.start

    def start(self, **arguments):
        Kernel.started += 1


@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    from zeroblock.kernels import _reduce

    kernel = type(layer_norm_modulate._forward)
    for module in (gate_residual, group_norm_silu, group_norm_silu_bwd, layer_norm_modulate, zero_flag, _reduce):
        for name, value in list(vars(module).items()):
            if type(value) is kernel:
                monkeypatch.setattr(module, name, Kernel())


def counted(call):
    """(functions of Python, others, launches) of a call."""
    call()
    kinds, before = Counter(), Kernel.started
    sys.setprofile(lambda frame, event, argument: kinds.update([event]))
    try:
        call()
    finally:
        sys.setprofile(None)
    starts = Kernel.started - before
    return kinds["call"] - 2 * starts, kinds["c_call"], starts  # without the stub's own


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_takes_few_steps_on_the_host(name):
    call, most = CALLS[name]
    found = counted(call)
    assert all(a <= b for a, b in zip(found, most, strict=True)) and found[2] == most[2], found
    assert counted(lambda: (call(), call()))[0] > most[0], "a second call would show"
