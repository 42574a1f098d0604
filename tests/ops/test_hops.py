"""How many functions a call passes on its way to the kernel: `ZEROBLOCK_PLAN=fixed python -m tests.ops.test_hops` lists
them, with TRITON_INTERPRET=1 those on a GPU too. docs/architecture.md shows the lists of SHOWN as they are printed.

A hop is a function that a reader has to open to follow the call. In Python these are the frames of zeroblock's files
that stand on the stack when the first native op is called, or a Triton kernel started. No Python sees the native ones
(NATIVE): they are the binding, the entry in the table of kernels (which picks the types) and the body of the kernel; of
a Winograd convolution the entry counts as the kernel.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch
from torch._ops import OpOverload

import zeroblock as zb
from zeroblock.backends import available
from zeroblock.kernels import _torch
from zeroblock.testing import CPU_MISSING, use_backend

from ..support import ROOT

PACKAGE, KERNELS = Path(zb.__file__).parent, Path(_torch.__file__).parent
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
# By native op. The test looks the names up in their files.
NATIVE = {
    "_layer_norm_modulate": (
        "csrc/torch/cpu_tokens.cpp: layer_norm_modulate",
        "csrc/cpu/layer_norm_modulate.h: layer_norm_modulate_fwd",
        "csrc/cpu/layer_norm_modulate.h: layer_norm_modulate_fwd_of",
    ),
    "_group_norm_silu": (
        "csrc/torch/cpu_group_norm.cpp: group_norm_silu",
        "csrc/cpu/group_norm_silu.h: group_norm_silu_fwd",
        "csrc/cpu/group_norm_silu.h: group_norm_silu_fwd_nchw",
    ),
    "_gate_residual": (
        "csrc/torch/cpu_tokens.cpp: gate_residual",
        "csrc/cpu/gate_residual.h: gate_residual_fwd",
        "csrc/cpu/gate_residual.h: gate_residual_fwd_of",
    ),
    "_activation": (
        "csrc/torch/cpu_activation.cpp: activation",
        "csrc/cpu/activation.h: activation_fwd",
        "csrc/cpu/activation.h: activation_fwd_of",
    ),
    "_winograd_conv": ("csrc/torch/cpu_winograd.cpp: winograd_conv", "csrc/cpu/winograd/fwd.h: winograd_fwd"),
}
MOST = {"layer_norm_modulate": 6, "conv_residual": 7}
ON_A_GPU, MOST_ON_A_GPU = "layer_norm_modulate", 7
SHOWN = ("layer_norm_modulate", "conv_residual")  # in docs/architecture.md, and the one ON_A_GPU


def _file(path: str) -> str | None:
    """A file of ours as it is called in the repository; None for others."""
    for folder, name in ((KERNELS, "kernels"), (PACKAGE, "zeroblock")):
        if Path(path).is_relative_to(folder):
            return str(Path(name) / Path(path).relative_to(folder))
    return None


def _stack(frame: FrameType | None) -> list[str]:
    """ "file: function" of the frames of ours up to this one."""
    found = []
    while frame is not None:
        if (path := _file(frame.f_code.co_filename)) is not None:
            found.append(f"{path}: {frame.f_code.co_name}")
        frame = frame.f_back
    return found[::-1]


def _stack_where(code: CodeType, is_it: Callable[[FrameType], bool], call: Callable[[], object]) -> list[str]:
    """The stack where the second of two calls first runs the function with this code, for which `is_it` holds."""
    found: list[list[str]] = []

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is code and is_it(frame):
            found.append(_stack(frame))

    call()  # what is done once, is not on the way
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    assert len(found) == 1, f"{code.co_name} is called {len(found)} times"
    return found[0]


def _tensors(shapes: tuple[tuple[int, ...], ...], device: str = "cpu") -> list[torch.Tensor]:
    return [torch.randn(s, generator=torch.Generator().manual_seed(i)).to(device) for i, s in enumerate(shapes)]


def python_frames(name: str) -> list[str]:
    """ "file: function" of every frame of ours between the caller and the native op, on the CPU without gradients."""
    function, shapes, native = CALLS[name]

    def is_native(frame: FrameType) -> bool:
        return next(iter(frame.f_locals.values())).name().partition(".")[0] == f"zeroblock::{native}"

    tensors = _tensors(shapes)
    with use_backend("cpu"), torch.no_grad():
        return _stack_where(OpOverload.__call__.__code__, is_native, lambda: function(*tensors))


def hops(name: str) -> list[str]:
    return python_frames(name) + list(NATIVE[CALLS[name][2]])


def gpu_hops() -> list[str]:
    """Those on a GPU, by the plan's rule; the last is the Triton kernel that is started."""
    from zeroblock.kernels._launch import launch

    function, shapes, _ = CALLS[ON_A_GPU]
    tensors = _tensors(shapes, available.device_of("triton"))
    started: list[CodeType] = []

    def is_launch(frame: FrameType) -> bool:
        started.append(frame.f_locals["kernel"].fn.__code__)
        return True

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(available, "_forced", "gpu")
        frames = _stack_where(launch.__code__, is_launch, lambda: function(*tensors))
    return [*frames, f"{_file(started[0].co_filename)}: {started[0].co_name}"]


def listing(name: str, found: list[str]) -> str:
    return "\n  ".join([f"{name}: {len(found)} hops", *found])


def assert_shown(text: str) -> None:
    assert text in (ROOT / "docs/architecture.md").read_text(), f"docs/architecture.md does not show this list:\n{text}"


needs_cpu = pytest.mark.skipif(CPU_MISSING is not None, reason=f"the cpu backend cannot run: {CPU_MISSING}")


@needs_cpu
@pytest.mark.parametrize("name", CALLS)
def test_the_way_to_the_kernel_starts_at_the_function_and_ends_in_the_backend(name):
    frames = python_frames(name)
    assert frames[0].startswith("zeroblock/functional/") and frames[0].endswith(f".py: {name}")
    assert frames[-1].startswith(("zeroblock/backends/", "zeroblock/steps/"))


@needs_cpu
@pytest.mark.parametrize("name", MOST)
def test_few_functions_stand_between_a_call_and_its_kernel(name):
    assert len(hops(name)) <= MOST[name], "\n".join(hops(name))


@pytest.mark.parametrize("op", NATIVE)
def test_native_functions_stand_where_the_lists_say(op):
    for file, function in (hop.split(": ") for hop in NATIVE[op]):
        assert re.search(rf"^\S.*\b{function}\(", (ROOT / file).read_text(), re.M), f"{file} has no {function}"


@needs_cpu
@pytest.mark.parametrize("name", SHOWN)
def test_contributing_shows_the_way(name):
    assert_shown(listing(f"{name} on a CPU", hops(name)))


@pytest.mark.interpreted
def test_contributing_shows_the_way_on_a_gpu():
    if (reason := available.missing("triton")) is not None:
        pytest.skip(f"the triton backend cannot run: {reason}")
    found = gpu_hops()
    assert len(found) <= MOST_ON_A_GPU
    assert_shown(listing(f"{ON_A_GPU} on a GPU", found))


if __name__ == "__main__":
    for name in CALLS:
        print(listing(f"{name} on a CPU", hops(name)))
    if available.missing("triton") is None:
        print(listing(f"{ON_A_GPU} on a GPU", gpu_hops()))
