"""Step machine: what this is, and what it can do at most."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable

import torch

from . import Setting, Skip


def said(*command: str) -> str:
    """What a program prints, or why it does not run."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return (done.stdout + done.stderr).strip()


def versions(setting: Setting) -> dict:
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "cores": os.cpu_count(),
        "g++": said("g++", "--version").partition("\n")[0],
        "nvcc": said("nvcc", "--version").rpartition("\n")[2],
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError as error:
        found["triton"] = str(error)
    return found


def gpu(setting: Setting) -> dict:
    if setting.device == "cpu":
        raise Skip("a dry run")
    properties = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
    query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu,persistence_mode"
    return {
        "properties": {name: getattr(properties, name, None) for name in names},
        "smi": said("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
    }


def ceilings(setting: Setting) -> dict:
    from .headlines import ceilings as measured

    copy, matmul = measured(setting)
    return {"copy_gb_s": round(copy, 1), "matmul_tflop_s": round(matmul, 3)}


def units(setting: Setting) -> dict[str, Callable[[], dict]]:
    """First of all whether there is a GPU: without one nothing else is tried."""
    return {f.__name__: (lambda f=f: f(setting)) for f in (gpu, versions, ceilings)}
