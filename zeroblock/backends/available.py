"""What can run here and why not: the native extension, Triton, and which primitives an op uses.

`select` looks at metadata alone (device, dtype, sizes) and is called on every op. The extension is loaded at import;
the modules of the GPU backends are imported when a tensor first asks for them, so that neither a missing triton nor a
missing GPU is noticed before.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import reference as _plain

DTYPES = CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpu", "triton", "cuda")


def _load_extension() -> str | None:
    """Loads zeroblock/_C; returns None on success, else the reason."""
    libraries = sorted(Path(__file__).parents[1].glob("_C*.so"))
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
    from . import cpu as _cpu_primitives

    _cpu = _cpu_primitives

_forced = os.environ.get("ZEROBLOCK_BACKEND", "auto")
if _forced not in ("auto", *BACKENDS):
    raise ValueError(f"ZEROBLOCK_BACKEND must be one of auto, {', '.join(BACKENDS)}, got {_forced!r}")

_MODULES = {"triton": ".triton", "cuda": ".cuda", "gpu": ".gpu.norms_gates"}
_lazy: dict[str, ModuleType | None] = {}


def _load(name: str) -> ModuleType | None:
    """The primitives module of a GPU backend, imported once; None when it cannot be."""
    if name not in _lazy:
        # A package that is there but does not import raises: nothing is hidden.
        found = name != "triton" or importlib.util.find_spec("triton") is not None
        _lazy[name] = importlib.import_module(_MODULES[name], __package__) if found else None
    return _lazy[name]


def interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 before its import."""
    module = _load("triton")
    return module is not None and module.INTERPRETS


def missing(name: str) -> str | None:
    """None when the backend can run something here, else the reason."""
    if name == "cpu":
        return CPU_MISSING
    module = _load(name)
    if module is None:
        return "the package triton is not installed"
    if module.MISSING is None and module.device == "cuda" and not torch.cuda.is_available():
        hint = " (and TRITON_INTERPRET was not set before triton was imported)" if name == "triton" else ""
        return f"no GPU is visible{hint}"
    return module.MISSING


def device_of(name: str) -> str:
    """The type of device whose tensors a backend takes; Triton's interpreter and the emulator of the CUDA kernels run
    on the CPU."""
    module = _load(name) if name in ("triton", "cuda") else None
    return "cpu" if module is None else module.device


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the block with one backend of BACKENDS for every tensor it can take, or "auto"."""
    global _forced
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"use_backend: name must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    reason = None if name in ("auto", "reference") else missing(name)
    if reason is not None:
        raise RuntimeError(f"use_backend: the {name} backend cannot run: {reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """The name given to `use_backend` or ZEROBLOCK_BACKEND, or "auto"."""
    return _forced


def why_not(name: str, op: str, x: Tensor) -> str | None:
    """None when the kernels of a backend take a call of `op` with leading tensor x, else the reason."""
    if x.dtype == torch.float64 and op != "is_zero":
        return "float64 runs through the reference"
    if x.dtype not in (*DTYPES, torch.float64):
        return f"no kernel for {x.dtype}"
    if name == "cpu":
        return CPU_MISSING if x.device.type == "cpu" else f"the tensor is on {x.device.type}"
    module = _load(name)
    if module is None or module.MISSING is not None:
        return missing(name)
    if x.device.type != module.device:
        hint = ", where triton runs only in its interpreter (TRITON_INTERPRET=1 before its import)"
        return f"the tensor is on {x.device.type}{hint if (name, x.device.type) == ('triton', 'cpu') else ''}"
    return module.why_not(op, x)


def select(op: str, x: Tensor) -> ModuleType:
    """The primitives module for a call of `op` with leading tensor x. On a GPU the plan (`_gpu.py`) chooses between
    the backends, unless one is forced; the reference takes what no kernel takes."""
    if x.is_cpu and _forced not in ("triton", "cuda"):
        if _cpu is not None and _forced != "reference" and (x.dtype in DTYPES or op == "is_zero"):
            return _cpu
        return _plain
    module = None
    if _forced in ("triton", "cuda"):
        module = _load(_forced) if why_not(_forced, op, x) is None else None
    elif _forced == "auto" and x.device.type == "cuda" and (x.dtype in DTYPES or op == "is_zero"):
        module = _load("gpu")
    return _plain if module is None else module
