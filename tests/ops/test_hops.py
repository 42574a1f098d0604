"""How many functions a call passes on its way to the kernel: `ZEROBLOCK_PLAN=fixed python -m tests.ops.test_hops` lists
them.

A hop is a function that a reader has to open to follow the call. In Python these are the frames of zeroblock's files
that stand on the stack when the first native op is called. No Python sees the native ones: they are the binding, the
entry in the table of kernels (which picks the types) and the body of the kernel; of a Winograd convolution the entry
counts as the kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._ops import OpOverload

import zeroblock as zb
from zeroblock.testing import CPU_MISSING, use_backend

PACKAGE = Path(zb.__file__).parent
_X, _V, _IMAGE = (2, 9, 64), (2, 64), (2, 64, 16, 16)
CALLS: dict[str, tuple[Callable, tuple[tuple[int, ...], ...], str]] = {  # function, shapes, its native op
    "layer_norm_modulate": (zb.layer_norm_modulate, (_X, _V, _V), "_layer_norm_modulate"),
    "group_norm_silu": (lambda x: zb.group_norm_silu(x, 8), (_IMAGE,), "_group_norm_silu"),
    "gate_residual": (zb.gate_residual, (_X, _V, _X), "_gate_residual"),
    "linear_gate_residual": (
        lambda *tensors: zb.linear_gate_residual(*tensors, activation="gelu_tanh"),
        (_X, (64, 64), (64,), _V, _X),
        "_activation",
    ),
    "conv_residual": (zb.conv_residual, (_IMAGE, (64, 64, 3, 3), (64,), _IMAGE), "_winograd_conv"),
}
NATIVE = {name: ("binding", "fwd", "kernel") for name in CALLS} | {"conv_residual": ("binding", "kernel")}
MOST = {"layer_norm_modulate": 6, "conv_residual": 7}


def _file(path: str) -> str | None:
    """A file of the package as it is called in the repository; None for others."""
    return str(Path("zeroblock") / Path(path).relative_to(PACKAGE)) if Path(path).is_relative_to(PACKAGE) else None


def python_frames(name: str) -> list[str]:
    """ "file: function" of every frame of ours between the caller and the native op, on the CPU without gradients."""
    function, shapes, native = CALLS[name]
    tensors = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]
    found: list[list[str]] = []

    def watch(frame, event, _):
        if event != "call" or frame.f_code is not OpOverload.__call__.__code__:
            return
        op = next(iter(frame.f_locals.values()))
        if op.name().partition(".")[0] == f"zeroblock::{native}":
            stack = []
            while (frame := frame.f_back) is not None:
                if (path := _file(frame.f_code.co_filename)) is not None:
                    stack.append(f"{path}: {frame.f_code.co_name}")
            found.append(stack[::-1])

    with use_backend("cpu"), torch.no_grad():
        function(*tensors)  # what is done once, is not on the way
        before = sys.getprofile()
        sys.setprofile(watch)
        try:
            function(*tensors)
        finally:
            sys.setprofile(before)
    assert len(found) == 1, f"{name} calls {native} {len(found)} times"
    return found[0]


def hops(name: str) -> list[str]:
    return python_frames(name) + [f"csrc: {what}" for what in NATIVE[name]]


needs_cpu = pytest.mark.skipif(CPU_MISSING is not None, reason=f"the cpu backend cannot run: {CPU_MISSING}")


@needs_cpu
@pytest.mark.parametrize("name", CALLS)
def test_the_way_to_the_kernel_starts_at_the_function_and_ends_in_the_backend(name):
    frames = python_frames(name)
    assert frames[0] == f"zeroblock/functional.py: {name}"
    assert frames[-1].startswith(("zeroblock/backends/", "zeroblock/steps/"))


@needs_cpu
@pytest.mark.parametrize("name", MOST)
def test_few_functions_stand_between_a_call_and_its_kernel(name):
    assert len(hops(name)) <= MOST[name], "\n".join(hops(name))


if __name__ == "__main__":
    for name in CALLS:
        print(f"{name}: {len(hops(name))} hops", *hops(name), sep="\n  ")
