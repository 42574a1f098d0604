"""How plans are measured and chosen."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

ROUNDS, MIN_ROUNDS, SECONDS = 7, 3, 0.3
MARGIN = 1.03  # what counts as equally fast
NOT_USED = "zeroblock does not use the plan {}: {}"  # of a way that fails, and why


class CallersError(RuntimeError):
    """An error that no other way may hide: what was asked for is wrong, not the way."""


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
    runs: Mapping[str, Callable[[], Any]], device: torch.device, timer: Callable[..., float] = time_call
) -> dict[str, float | None]:
    """Least seconds of each run, all warm and in turns: what else the machine did is in the others.

    A way that raises, or runs out of memory, is out (None), with a warning. Of the library's (the first) the error in
    its first run is the caller's; later it is out as the others are, for the call itself needs less memory than this.
    """
    first, *others = runs
    runs[first]()
    able = [first, *(name for name in others if _attempt(_warm, name, runs[name], device) is not None)]
    samples: dict[str, list[float]] = {name: [] for name in able}
    start = time.perf_counter()
    for i in range(ROUNDS):
        able = list(samples)
        for name in able[i % len(able) :] + able[: i % len(able)]:
            seconds = _attempt(timer, name, runs[name], device)
            if seconds is None:
                del samples[name]
            else:
                samples[name].append(seconds)
        if first not in samples or (i + 1 >= MIN_ROUNDS and time.perf_counter() - start > SECONDS):
            break
    return {name: min(samples[name]) if name in samples else None for name in runs}


def _warm(name: str, run: Callable[[], Any], device: torch.device) -> float:
    run()
    return 0.0


def _attempt(timer: Callable[..., float], name: str, run: Callable[[], Any], device: torch.device) -> float | None:
    """The timer's seconds; None, with a warning, where the way fails."""
    try:
        return timer(name, run, device)
    except CallersError:
        raise
    except Exception as error:
        warnings.warn(NOT_USED.format(name, error), stacklevel=3)
    release(device)
    return None


def release(device: torch.device) -> None:
    """Memory that a failed way has left to torch's cache goes back; to be called after its except block, until whose
    end the traceback holds the way's tensors."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.empty_cache()


def choose(times: dict[str, float | None], preferred: str) -> str:
    """The fastest; among equally fast ones the preferred, then the library's; never one slower than the library's.
    The library's where it could not be timed: nothing is known to be faster."""
    library = times["library"]
    if library is None:
        return "library"
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
