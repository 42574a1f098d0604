"""Helpers for tests and benchmarks: error budgets, bitwise comparison, poisoned memory, saved bytes, backends."""

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
    """Relative error of one rounding to dtype."""
    return torch.finfo(dtype).eps / 2


def assert_error_budget(
    got: Tensor, eager: Tensor, exact: Tensor, what: str = "result", factor: float = 2.0, draws: bool = False
) -> None:
    """got may be wrong, against the fp64 result `exact`, by at most `factor` x eager's error plus one rounding.

    Judged twice: as a relative L2 error and as the largest error relative to the largest element. `eager` is the same
    computation by PyTorch in the dtype of `got`. With `draws` the first dimension counts independent draws, and the
    errors of the draws are combined as their root mean square: the largest error of a single draw is luck.
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
    """Same shape, dtype and bits (so -0.0 differs from +0.0, and NaN equals the same NaN)."""
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
    """Memory that PyTorch hands out uninitialised in the block is NaN (largest integer): what is never written shows.

    The switch is PyTorch's own (torch.utils.deterministic.fill_uninitialized_memory, on by default in deterministic
    mode): the only one that also reaches allocations made inside C++ ops.
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
    """Collects {storage address: bytes} of everything autograd saves in the block, `exclude`'s storages left out."""
    known = {t.untyped_storage().data_ptr() for t in exclude}
    found: dict[int, int] = {}
    alive = []  # a freed storage's address could come back

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def saved_activation_bytes(fn: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that fn() leaves saved for backward, by distinct storages; pass inputs and parameters as `exclude`."""
    with count_saved(exclude) as found:
        result = fn()
        total = sum(found.values())
    del result
    return total
