"""Step sanitizer: the CUDA kernels under compute-sanitizer, two of them under its race detector too."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from . import Setting, Skip, sanitized

RACES = ("group_norm_silu", "layer_norm_modulate")
ERRORS = 9  # the exit code asked for, where something was found
REFUSED = ("Device not supported", "Target application terminated before first instrumented API call")
TAIL = 1000


def tool() -> list[str]:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        raise Skip("compute-sanitizer is not installed")
    return [found, "--error-exitcode", str(ERRORS), "--print-limit", "3"]


def watch(kind: str, name: str, setting: Setting) -> None:
    """A dry run goes the same way without the tool."""
    watching = [] if setting.device == "cpu" else [*tool(), "--tool", kind]
    command = [*watching, sys.executable, "-m", "gpurun.worker", "gpurun.sanitized", setting.device, "--only", name]
    # Each allocation by itself: in a pool of torch's an access beside a tensor stays unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    if any(words in said for words in REFUSED):
        raise Skip(f"compute-sanitizer cannot watch this GPU: {said[-TAIL:]}")
    if done.returncode:
        raise RuntimeError(f"{'errors' if done.returncode == ERRORS else f'exit {done.returncode}'}: {said[-TAIL:]}")


def units(setting: Setting) -> dict[str, Callable[[], None]]:
    names = [("memcheck", name) for name in sanitized.watched(setting.device)]
    names[2:2] = [("racecheck", name) for name in RACES]
    selected = names[:3] if setting.quick else names
    return {f"{kind}/{name}": functools.partial(watch, kind, name, setting) for kind, name in selected}
