"""`select`: the backend of a call, by the metadata of its first tensor. Called at every op."""

from __future__ import annotations

from torch import Tensor

from .._dtypes import KERNELS
from . import available
from .available import CPU_MISSING, FORCED_ON_GPU
from .base import Backend
from .reference import REFERENCE

CPU: Backend | None = None
if CPU_MISSING is None:
    from .cpu import CPU as _native  # binds the extension's ops

    CPU = _native


def select(op: str, x: Tensor) -> Backend:
    """The backend for a call of `op` with first tensor x. On a GPU a plan (`gpu/`) chooses between the backends, unless
    one is forced; the reference takes what no kernel takes."""
    forced, has_kernels = available._forced, x.dtype in KERNELS or op == "is_zero"
    if x.is_cpu and forced not in FORCED_ON_GPU:
        return CPU if CPU is not None and forced != "reference" and has_kernels else REFERENCE
    backend: Backend | None = None
    if has_kernels and (forced == "gpu" or (forced == "auto" and x.device.type == "cuda")):
        from .gpu import GPU  # on first use: it imports triton

        backend = GPU
    elif forced in FORCED_ON_GPU:
        backend = available.gpu_backend(forced) if available.why_not(forced, op, x) is None else None
    return REFERENCE if backend is None else backend
