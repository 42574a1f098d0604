"""Helpers for tests and benchmarks: error budgets, bitwise comparison, poisoned memory, saved bytes, backends.

`cases.py`: the calls of every op that are tested; `draw.py`: their inputs; `parity.py`: how they are judged; `eager.py`
and `eager_ops.py`: blocks and ops in plain PyTorch; `timing.py`: the only timer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends.available import BACKENDS, CPU_MISSING, use_backend
from ..zero import counters, reset_counters

__all__ = [
    "BACKENDS",
    "CPU_MISSING",
    "assert_bitwise_equal",
    "assert_error_budget",
    "counters",
    "poison_empty",
    "reset_counters",
    "rounding",
    "saved_activation_bytes",
    "use_backend",
]


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to a floating dtype."""
    return torch.finfo(dtype).eps / 2


def assert_error_budget(
    got: Tensor, eager: Tensor, exact: Tensor, what: str = "result", factor: float = 2.0, draws: bool = False
) -> None:
    """Checks that `got` is wrong by at most `factor` times eager's error plus one rounding.

    got: the result to judge; any shape and floating dtype, all finite.
    eager: the same computation by PyTorch, of got's shape and dtype.
    exact: the same in fp64.
    what: names the result in the message.
    factor: how many times eager's error is allowed.
    draws: the first dimension counts independent draws, whose errors are combined as their root mean square: the
        largest error of a single draw is luck.

    Judged twice: by the L2 norm of the error, and by the largest error, each relative to the same of `exact`.
    Raises AssertionError, with the errors, where one exceeds its limit, or shapes, dtypes or finiteness differ.
    """
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, expected {list(exact.shape)}"
    assert got.dtype == eager.dtype, f"{what}: dtype {got.dtype}, eager gives {eager.dtype}"
    assert torch.isfinite(exact).all(), f"{what}: the fp64 result is not finite, the comparison would mean nothing"
    assert torch.isfinite(got).all(), (
        f"{what}: {int((~torch.isfinite(got)).sum())} of {got.numel()} elements not finite"
    )
    if got.numel() == 0:
        return
    exact, count = exact.double(), got.shape[0] if draws else 1
    for name, order in (("L2", 2), ("max", float("inf"))):

        def norm(t: Tensor, order: float = order) -> Tensor:
            return torch.linalg.vector_norm(t.reshape(count, -1), order, dim=1).norm()

        size, allowed, error = norm(exact), norm(eager.double() - exact), norm(got.double() - exact)
        limit = factor * allowed + rounding(got.dtype) * size
        assert error <= limit, (
            f"{what}: {name} error {error / size:.3g} exceeds the budget {limit / size:.3g} "
            f"(eager's error {allowed / size:.3g})"
        )


def assert_bitwise_equal(got: Tensor, expected: Tensor, what: str = "result") -> None:
    """Checks that two tensors have the same shape, dtype and bits: -0.0 differs from +0.0, NaN equals the same NaN.

    got, expected: any shape and strides, elements of 1, 2, 4 or 8 bytes.
    what: names the result in the message.

    Raises AssertionError, with the number of differences and the first one.
    """
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    a, b = got.contiguous().view(integers), expected.contiguous().view(integers)
    if not torch.equal(a, b):
        first = int((a != b).flatten().nonzero()[0])
        raise AssertionError(
            f"{what}: {int((a != b).sum())} of {a.numel()} elements differ, first at flat index {first}: "
            f"{got.flatten()[first].item()!r} instead of {expected.flatten()[first].item()!r}"
        )


@contextlib.contextmanager
def poison_empty() -> Iterator[None]:
    """In the block PyTorch fills uninitialised memory with NaN (the largest integer): elements never written show.

    This is deterministic mode, with torch.utils.deterministic.fill_uninitialized_memory, which is on by default: the
    only switch that also reaches allocations made inside C++ ops.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@contextlib.contextmanager
def count_saved(exclude: Iterable[Tensor] = ()) -> Iterator[dict[int, int]]:
    """Yields a dict that fills with {storage address: bytes} of everything that autograd saves in the block.

    exclude: tensors whose storages do not count.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    found: dict[int, int] = {}
    alive = []  # a freed storage's address could come back

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return t

    pack.only_counts = True  # type: ignore[attr-defined]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def saved_activation_bytes(fn: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that fn() leaves saved for backward; a storage counts once, however many tensors view it.

    fn: a forward pass with gradients enabled; it returns what keeps the graph alive, its outputs.
    exclude: tensors that the caller owns anyway (inputs and parameters), whose storages do not count.
    """
    with count_saved(exclude) as found:
        result = fn()
        total = sum(found.values())
    del result
    return total
