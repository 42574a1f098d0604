"""What can run here and why not: the optional native extension, and which primitives an op uses.

`select` looks at metadata alone (device, dtype) and is called on every op; the tables it reads are filled once, at
import.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import _plain

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpu", "cuda")


def _load_extension() -> str | None:
    """Loads zeroblock/_C; returns None on success, else the reason."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return "the extension zeroblock._C was not built (no compiler for this platform at install time)"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"the extension zeroblock._C does not load: {error}"
    if not torch.ops.zeroblock._cpu_isa():
        return "this processor has neither AVX2+FMA+F16C nor AVX-512"
    return None


CPU_MISSING = _load_extension()
_cpu: ModuleType | None = None
if CPU_MISSING is None:
    from . import _cpu as _cpu_primitives

    _cpu = _cpu_primitives

from . import _cuda  # noqa: E402  (after the extension, whose ops it looks up)

_forced = os.environ.get("ZEROBLOCK_BACKEND", "auto")
if _forced not in ("auto", *BACKENDS):
    raise ValueError(f"ZEROBLOCK_BACKEND must be one of auto, {', '.join(BACKENDS)}, got {_forced!r}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the block with one backend of BACKENDS for every tensor it can take, or "auto"."""
    global _forced
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"use_backend: name must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    if name == "cpu" and CPU_MISSING is not None:
        raise RuntimeError(f"use_backend: the cpu backend cannot run: {CPU_MISSING}")
    if name == "cuda" and (missing := cuda_missing()) is not None:
        raise RuntimeError(f"use_backend: the cuda backend cannot run: {missing}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def cuda_missing() -> str | None:
    """None when the CUDA kernels can run, else the reason."""
    if _cuda.MISSING is None and _cuda.device == "cuda" and not torch.cuda.is_available():
        return f"built for {_cuda.archs()}, but no GPU is visible"
    return _cuda.MISSING


def why_not_cuda(x: Tensor) -> str | None:
    """None when the CUDA kernels take x, else the reason."""
    if _cuda.MISSING is not None:
        return _cuda.MISSING
    if x.device.type != _cuda.device:
        return f"the tensor is on {x.device.type}"
    return None if x.dtype in _cuda.DTYPES else f"no kernel for {x.dtype}"


def why_not_cpu(x: Tensor) -> str | None:
    """None when the CPU kernels take x, else the reason."""
    if CPU_MISSING is not None:
        return CPU_MISSING
    if x.device.type != "cpu":
        return f"the tensor is on {x.device.type}"
    if x.dtype not in CPU_DTYPES and not (x.dtype == torch.float64):
        return f"no kernel for {x.dtype}"
    return "float64 runs through the reference" if x.dtype == torch.float64 else None


def select(op: str, x: Tensor) -> ModuleType:
    """The primitives module for a call of `op` with leading tensor x."""
    if _forced in ("auto", "cuda") and _cuda.MISSING is None and x.device.type == _cuda.device:
        if x.dtype in _cuda.DTYPES or op == "is_zero":
            return _cuda
    if _cpu is not None and _forced != "reference" and x.device.type == "cpu":
        if x.dtype in CPU_DTYPES or op == "is_zero":
            return _cpu
    return _plain
