"""How plans are measured and chosen, and how a situation is described in the cache and to people."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROUNDS, MIN_ROUNDS, SECONDS = 7, 3, 0.3
MARGIN = 1.03  # what counts as equally fast


# Clock cycles that a GPU is kept busy while the host enqueues what is measured: about a millisecond.
_HEAD_START = 2_000_000


def time_call(name: str, run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one warm call; on a GPU the device's own, with its cache cold and the host far ahead."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.empty(2 * _cache_bytes(device), dtype=torch.int8, device=device).zero_()
            torch.cuda._sleep(_HEAD_START)
            start.record()
            run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(
    runs: dict[str, Callable[[], Any]], device: torch.device, timer: Callable[..., float] = time_call
) -> dict[str, float | None]:
    """Least seconds of each run, all warm and in turns: what else the machine did is in the others.

    The library's way (the first) may raise; another that does is out (None), with a warning.
    """
    first = next(iter(runs))
    samples: dict[str, list[float] | None] = {name: [] for name in runs}
    for name, run in runs.items():
        try:
            run()
        except Exception as error:
            if name == first:
                raise
            warnings.warn(f"zeroblock does not use the plan {name}: {error}", stacklevel=2)
            samples[name] = None
    able = [name for name in runs if samples[name] is not None]
    start = time.perf_counter()
    for i in range(ROUNDS):
        for name in able[i % len(able) :] + able[: i % len(able)]:
            samples[name].append(timer(name, runs[name], device))  # type: ignore[union-attr]
        if i + 1 >= MIN_ROUNDS and time.perf_counter() - start > SECONDS:
            break
    return {name: None if s is None else min(s) for name, s in samples.items()}


def choose(times: dict[str, float | None], preferred: str) -> str:
    """The fastest; among equally fast ones the preferred, then the library's; never one slower than the library's."""
    library = times["library"]
    assert library is not None
    able = {name: t for name, t in times.items() if t is not None and t <= library}
    best = min(able.values())
    order = [preferred, "library", *sorted(able, key=lambda name: able[name])]
    return next(name for name in order if name in able and able[name] <= best * MARGIN)


@functools.lru_cache
def _cache_bytes(device: torch.device) -> int:
    return max(1 << 20, torch.cuda.get_device_properties(device).L2_cache_size)


def place(device: torch.device) -> str:
    """Where a measurement holds: the device, and what beside torch its kernels come from."""
    if device.type == "cuda":
        return _gpu_name(device)
    return f"{_cpu() if device.type == 'cpu' else device}, {torch.get_num_threads()} threads"


@functools.lru_cache
def _gpu_name(device: torch.device) -> str:
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    parts = [torch.cuda.get_device_name(device), toolkit, f"cuDNN {torch.backends.cudnn.version()}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        parts.append(f"triton {importlib.metadata.version('triton')}")
    return ", ".join(parts)


@functools.lru_cache
def cpu_model() -> str:
    """The processor's name with its family and model: virtual machines give the same name to different processors."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for key, _, value in (line.partition(":") for line in file):
            found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    return f"{name} family {found['cpu family']} model {found['model']}" if "cpu family" in found else name


def _cpu() -> str:
    return f"{cpu_model()} {torch.backends.cpu.get_cpu_capability()}"


def bucket(n: int) -> int:
    """n rounded up to one of four steps per octave: what is this close in size shares a measurement."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


def layout_name(t: Tensor) -> str:
    if t.is_contiguous():
        return "contiguous"
    if t.dim() in (4, 5):
        format = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
        return "channels-last" if t.is_contiguous(memory_format=format) else "strided"
    return "transposed" if t.dim() == 2 and t.t().is_contiguous() else "strided"


def describe_images(t: Tensor) -> str:
    """[N, C, *S] with batch and space in buckets."""
    sizes = [bucket(n) if d != 1 else n for d, n in enumerate(t.shape)]
    return f"{dtype_name(t)}{sizes} {layout_name(t)}"


def describe_rows(t: Tensor) -> str:
    """[..., K] as a matrix, its rows in buckets."""
    rows = t.numel() // max(1, t.shape[-1])
    return f"{dtype_name(t)}[{bucket(rows)}, {t.shape[-1]}] {layout_name(t)}"


def describe_weight(t: Tensor) -> str:
    return f"{list(t.shape)} {layout_name(t)}"


def dtype_name(t: Tensor | torch.dtype) -> str:
    """torch.bfloat16, or a tensor of it -> "bfloat16"."""
    return str(t.dtype if isinstance(t, Tensor) else t).removeprefix("torch.")
