"""What can run here and why not: the native extension, Triton, CUDA, and which backend is forced.

The extension is loaded at import; the GPU backends are imported when something first asks for them, so that neither a
missing triton nor a missing GPU is noticed before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .._dtypes import FLOATING
from .._version import NAMESPACE
from ..kernels._torch import OLDEST_NATIVE, VERSION

if TYPE_CHECKING:
    from .cuda import Cuda
    from .flagged import FlaggedSteps
    from .triton import Triton


def _load_extension() -> str | None:
    """Loads zeroblock/_C; returns None on success, else the reason."""
    if VERSION < OLDEST_NATIVE:
        return f"the extension zeroblock._C needs torch {OLDEST_NATIVE[0]}.{OLDEST_NATIVE[1]} or newer"
    libraries = sorted(Path(__file__).parents[1].glob("_C*.so"))
    if not libraries:
        return "the extension zeroblock._C was not built (no compiler for this platform at install time)"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"the extension zeroblock._C does not load: {error}"
    return None


def _why_no_cpu_kernels() -> str | None:
    if EXTENSION_MISSING is None and not getattr(torch.ops, NAMESPACE)._cpu_isa():
        return "this processor has neither AVX2+FMA+F16C nor AVX-512"
    return EXTENSION_MISSING


EXTENSION_MISSING = _load_extension()
CPU_MISSING = _why_no_cpu_kernels()


def _load_triton() -> FlaggedSteps | None:
    if _why_no_triton() is not None:
        return None
    from .triton import TRITON  # on first use: importing triton takes a second

    return TRITON


def _load_cuda() -> FlaggedSteps:
    from .cuda import CUDA  # on first use

    return CUDA


# The backends with kernels of their own for a GPU, in the order in which a rule prefers them.
_LOADERS: dict[str, Callable[[], FlaggedSteps | None]] = {"triton": _load_triton, "cuda": _load_cuda}
BACKENDS = ("reference", "cpu", *_LOADERS)
FORCED_ON_GPU = (*_LOADERS, "gpu")  # "gpu": the plan chooses between them (`gpu/`); forced in tests alone

_forced = os.environ.get("ZEROBLOCK_BACKEND") or "auto"
if _forced not in ("auto", *BACKENDS):
    raise ValueError(f"ZEROBLOCK_BACKEND must be one of auto, {', '.join(BACKENDS)}, got {_forced!r}")


_loaded: dict[str, FlaggedSteps | None] = {}


def gpu_backend(name: str) -> FlaggedSteps | None:
    """None where its package is missing or too old; one that is there and does not import raises."""
    if name not in _loaded:
        _loaded[name] = _LOADERS[name]()
    return _loaded[name]


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from ..kernels import _triton  # on first use: importing triton takes a second

    if _triton.VERSION < _triton.OLDEST:
        return f"the kernels need triton {_triton.OLDEST[0]}.{_triton.OLDEST[1]} or newer, this is {_triton.VERSION}"
    return None


def triton() -> Triton | None:
    return cast("Triton | None", gpu_backend("triton"))


def cuda() -> Cuda:
    """`missing` says why it cannot run."""
    return cast("Cuda", gpu_backend("cuda"))


def interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 before its import."""
    backend = triton()
    return backend is not None and backend.device == "cpu"


def missing(name: str) -> str | None:
    """None when the backend can run something here, else the reason."""
    if name == "cpu":
        return CPU_MISSING
    backend = gpu_backend(name)
    if backend is None:
        return _why_no_triton() or f"the {name} backend was not loaded"
    if name == "cuda" and backend.missing is not None and EXTENSION_MISSING is not None:
        return EXTENSION_MISSING
    if backend.missing is None and backend.device == "cuda" and not torch.cuda.is_available():
        hint = " (and TRITON_INTERPRET was not set before triton was imported)" if name == "triton" else ""
        return f"no GPU is visible{hint}"
    return backend.missing


def device_of(name: str) -> str:
    """The type of device whose tensors a backend takes; Triton's interpreter and the emulator of the CUDA kernels run
    on the CPU."""
    backend = gpu_backend(name) if name in _LOADERS else None
    return "cpu" if backend is None else backend.device


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


def kernels_run_on_host() -> bool:
    """Whether CPU tensors go to kernels that the host itself runs, not to those of a GPU backend that is forced."""
    return _forced not in FORCED_ON_GPU


def why_not(name: str, op: str, x: Tensor) -> str | None:
    """None when the kernels of a backend take a call of `op` with first tensor x, else the reason."""
    if x.dtype == torch.float64 and op != "is_zero":
        return "float64 runs through the reference"
    if x.dtype not in FLOATING:
        return f"no kernel for {x.dtype}"
    if name == "cpu":
        return CPU_MISSING if x.device.type == "cpu" else f"the tensor is on {x.device.type}"
    backend = gpu_backend(name)
    if backend is None or backend.missing is not None:
        return missing(name)
    if x.device.type != backend.device:
        hint = ", where triton runs only in its interpreter (TRITON_INTERPRET=1 before its import)"
        return f"the tensor is on {x.device.type}{hint if (name, x.device.type) == ('triton', 'cpu') else ''}"
    return backend.why_not(op, x)
