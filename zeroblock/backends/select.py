"""`select`: the backend of a call, by the metadata of its first tensor. Called at every op."""

from __future__ import annotations

from torch import Tensor

from . import available
from .available import CPU_MISSING, DTYPES, GPU_BACKENDS
from .base import Backend
from .reference import REFERENCE

CPU: Backend | None = None
if CPU_MISSING is None:
    from .cpu import CPU as _native  # binds the extension's ops

    CPU = _native


def select(op: str, x: Tensor) -> Backend:
    """The backend for a call of `op` with first tensor x. On a GPU a plan (`gpu/`) chooses between the backends, unless
    one is forced; the reference takes what no kernel takes."""
    forced = available._forced
    if x.is_cpu and forced not in GPU_BACKENDS:
        if CPU is not None and forced != "reference" and (x.dtype in DTYPES or op == "is_zero"):
            return CPU
        return REFERENCE
    backend: Backend | None = None
    if forced == "triton" or forced == "cuda":
        backend = available.gpu_backend(forced) if available.why_not(forced, op, x) is None else None
    elif (forced == "gpu" or (forced == "auto" and x.device.type == "cuda")) and (x.dtype in DTYPES or op == "is_zero"):
        from .gpu import GPU  # on first use: it imports triton

        backend = GPU
    return REFERENCE if backend is None else backend
