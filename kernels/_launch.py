"""The one way a kernel is started, and the recorder of what was started.

`recording()` collects every launch (kernel, grid, arguments, options) instead of, or while, running it: the tests that
compile ahead of time compile exactly what is shipped, and a captured sequence can be run again on changed memory.
`Launch.source()` is that launch as the JIT compiler would specialise it: tensors are 16-byte aligned pointers, an int
of 1 and None are constants, other ints divisible by 16 say so.

Every file with kernels exports COMPILE_CASES, {name: function}: the function calls a launcher with tensors on "meta",
inside `recording(run=False)`, and all of them together start every shipped configuration. A case whose name ends in
"-unaligned" has sizes that do not allow 16-byte accesses; in all others the large tensors must move in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch

from ._dtypes import NAMES

_DIVISIBLE = [["tt.divisibility", 16]]


# Whether kernels check what they are given (an index out of range, an overflow), and stop the program.
DEBUG = os.environ.get("ZEROBLOCK_DEBUG") == "1"
WARP = 32  # threads of the warps that launches are counted in, NVIDIA's


@functools.lru_cache
def threads_of_warp(device: torch.device) -> int:
    """64 on AMD's Instinct GPUs."""
    if torch.version.hip is None or device.type != "cuda":
        return WARP
    return torch.cuda.get_device_properties(device).warp_size


@dataclasses.dataclass
class Launch:
    """One start of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def options_for(self, warp: int) -> dict[str, int]:
        """The options where a warp has `warp` threads: as many threads, whose accesses then are as wide. Products keep
        their warps, since each drives a matrix core."""
        if warp == WARP or "PRECISION" in self.arguments:
            return self.options
        return self.options | {"num_warps": max(1, self.options["num_warps"] * WARP // warp)}

    def source(self):
        """The kernel as the JIT compiler specialises it for these arguments (not in an interpreting process)."""
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        constexprs = {self.kernel.arg_names[i] for i in self.kernel.constexprs}

        def specialise(path: tuple[int, ...], value: Any, constant: bool) -> Any:
            if constant or value is None or (type(value) is int and value == 1):
                constants[path] = value
                return "constexpr"
            if isinstance(value, tuple):
                return tuple(specialise((*path, i), v, False) for i, v in enumerate(value))
            if isinstance(value, torch.Tensor):
                attributes[path] = _DIVISIBLE
                return f"*{NAMES[value.dtype]}"
            if isinstance(value, float):
                return "fp32"
            if value % 16 == 0:
                attributes[path] = _DIVISIBLE
            return "i32" if -(2**31) <= value < 2**31 else "i64"

        for i, name in enumerate(self.kernel.arg_names):
            signature[name] = specialise((i,), self.arguments[name], name in constexprs)
        return ASTSource(self.kernel, signature, constants, attributes)


_recorders: list[tuple[list[Launch], bool]] = []


@contextlib.contextmanager
def recording(run: bool = True) -> Iterator[list[Launch]]:
    """Collects the launches of the block; with run=False nothing is executed (tensors may be on "meta")."""
    launches: list[Launch] = []
    _recorders.append((launches, run))
    try:
        yield launches
    finally:
        _recorders.pop()


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 1, **arguments: Any) -> None:
    """kernel[grid](**arguments) on the device of its tensors, num_warps of 32 threads; an empty grid starts nothing."""
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if DEBUG:
        options["debug"] = True
    for first in arguments.values():
        if isinstance(first, torch.Tensor):
            break
    device = first.device
    on_gpu = device.type == "cuda"
    if _recorders or (on_gpu and threads_of_warp(device) != WARP):
        start = Launch(kernel, grid, arguments, options)
        if _recorders:
            launches, run = _recorders[-1]
            launches.append(start)
            if not run:
                return
        options = start.options_for(threads_of_warp(device))
    if on_gpu and device.index != torch.cuda.current_device():  # Triton starts kernels on the current device
        with torch.cuda.device(device):
            kernel[grid](**arguments, **options)
    else:
        kernel[grid](**arguments, **options)
