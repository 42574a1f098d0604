"""How an op tests whether its weight is exactly zero, and what it reports of it (contract: zero.py)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state
from torch._C._functorch import is_functorch_wrapped_tensor

from .._dtypes import FLOATING
from ..kernels._torch import capturing, stream_of
from ..plan.mode import FIXED, mode

# `zero_skip` of an op: its weight is not tested; tested on the host; tested by a kernel, whose flag the op's own
# kernels read on the device, so that the host never knows.
NEVER, HOST, DEVICE = 0, 1, 2

# `skipped` of an op, int32 [1] on its device: it ran; its weight was zero; its gate was. Under DEVICE it is the flag.
EXECUTED, ZERO_WEIGHT, ZERO_GATE = 0, 1, 2

# No subclass, which may compute anything, neither sharded nor quantised.
PLAIN_TYPES = (Tensor, nn.Parameter)


def is_plain_tensor(t: object) -> bool:
    return type(t) in PLAIN_TYPES and t.layout is torch.strided  # type: ignore[attr-defined]


def may_test(t: Tensor) -> bool:
    """Only plain floating tensors with values are ever tested (rule 1 of zero.py)."""
    return type(t) in PLAIN_TYPES and t.layout is torch.strided and t.dtype in FLOATING and not t.is_meta


_WORDS = {t: {2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}[t.itemsize] for t in FLOATING}
_MAGNITUDE = {t: (1 << 8 * t.itemsize - 1) - 1 for t in FLOATING}


def is_seen_nonzero(t: Any, at: int = 0) -> bool:
    """Whether the element that lies `at` so many behind the first one in memory is not zero, by its bits; False where
    that may not be tested. Most weights that are not zero show it here, without an op: between those of a small block
    one more takes ten times as long as in a loop of its own (benchmarks/run.py --group overhead)."""
    if type(t) not in PLAIN_TYPES or is_functorch_wrapped_tensor(t) or _get_tracing_state() is not None:
        return False
    if not t.is_cpu or t.dtype not in _WORDS or t.numel() <= at:
        return False
    if t.layout is not torch.strided or at and not t.is_contiguous():
        return False
    address = t.data_ptr()  # 0 where nothing is stored: a sharded weight that is not gathered, torch's zero tensors
    return address != 0 and _WORDS[t.dtype].from_address(address + at * t.itemsize).value & _MAGNITUDE[t.dtype] != 0


def skipped(like: Tensor, what: int) -> Tensor:
    """What an op on the device of `like` reports."""
    return torch.full((1,), what, dtype=torch.int32, device=like.device)


_executed: dict[tuple[torch.device, int], Tensor] = {}
_addresses: set[int] = set()


def executed(like: Tensor) -> Tensor:
    """What an op on the device of `like` reports whose weight nobody tests: one tensor for all such calls on a stream,
    so that none has to write it. What a compiler gets is its own: it may write into it."""
    if mode.bits & FIXED:
        return skipped(like, EXECUTED)
    key = like.device, stream_of(like.device)
    found = _executed.get(key)
    if found is None:
        with torch.inference_mode(False):  # it will be saved for backward
            found = skipped(like, EXECUTED)
        if not (like.is_meta or capturing(like.device)):  # what a graph writes holds in its replays alone
            _executed[key] = found
            _addresses.add(found.data_ptr())
    return found


def is_executed(skipped: Tensor) -> bool:
    """Whether it is known to come from `executed`."""
    return skipped.data_ptr() in _addresses


def flag_of(skipped: Tensor, zero_skip: int) -> Tensor | None:
    """Backward's flag, from what forward reported: None where kernels need not look."""
    return skipped if zero_skip == DEVICE and not is_executed(skipped) else None


def found_by_host(skipped: Tensor, zero_skip: int) -> int:
    """What forward reported where the host found it; a flag on the device is not read back."""
    return int(skipped) if zero_skip == HOST else EXECUTED
