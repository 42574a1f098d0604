"""Which way an op takes: candidates by name, measured once per situation, one mechanism for every device.

A `PlannedOp` is a step of an op (a convolution with its residual, a GEMM) that can be done in several ways,
each exact within the op's error budget. Its candidates are registered by name; the first is the library's own way and
takes everything. The first call in a situation (op, shape bucket, dtype, layout, device, number of threads, inference
or training, reduced precision or not) times the candidates that take it, in turns, and keeps the fastest; the library's
way stays unless another was really faster. The choice is shared by everything in the process and kept on disk
(`store.py`); after that a call costs one dictionary look-up.

The fixed rule (each step's `rule`, a function of the shapes alone, and before it the `rule` that a candidate may bring)
decides instead of a measurement
- on a GPU in calls that come through the dispatcher: torch.compile, export, tensor subclasses, dispatch modes;
- under torch.use_deterministic_algorithms, and with ZEROBLOCK_PLAN=fixed (read once, at import);
- while another thread is measuring;
- under torch.distributed with more than one rank where no choice is stored or shared (`share.py` says why);
- for work too small to be worth a measurement.
A process keeps what its first call in a situation was decided by, also where a process group comes or goes later.
While a CUDA graph is captured only a way runs that ran in this situation before: any other might have to be compiled
and loaded, which a capture does not allow. Where none did, the graph gets the library's, with a warning.

A way that fails, while it is measured or later, gives way to the library's, with a warning; the library's own error is
the caller's.

A measurement runs the candidates on the call's own tensors.

Candidates round differently, so that a first measurement may decide last bits as cudnn.benchmark does; the disk cache
keeps the decision for later processes. The fastest is measured for each number of threads; the fixed rule is the same
for all of them. zeroblock's own kernels give the same bits for any number of threads, PyTorch's convolutions and GEMMs
not always (tests/plan/test_threads.py). What a candidate computes in `reduced` float32 precision it is given only where
the user allowed that (torch.set_float32_matmul_precision, or `allow_reduced`). Candidates must be pure: same
arguments, fresh results, no random numbers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic

import torch
import torch.distributed as dist

from . import store as _store
from .candidate import Candidate, P, R, no, takes_all, the_library
from .describe import Explanation
from .measure import NOT_USED, CallersError, choose, measure, place, release, time_call
from .mode import capturing, is_fixed, is_training, mode, reduced_allowed, warn_of_capture
from .store import Entry, Store

SEPARATOR = " | "  # between the parts of a situation; none of them holds it
POLICIES = "measure", "fixed"
# Floating-point operations, 0.3 ms at 100 GFLOP/s of a core (measured: python benchmarks/run.py --group dense).
WORTH_MEASURING = 1 << 25
MEMORY = 1 << 14  # situations remembered, some 10 MB
_policy = os.environ.get("ZEROBLOCK_PLAN") or "measure"
if _policy not in POLICIES:
    raise ValueError(f"ZEROBLOCK_PLAN must be one of {', '.join(POLICIES)}, got {_policy!r}")
_lock = threading.RLock()
_opened: Store | None = None
_shared: dict[str, str] | None = None  # choices by situation without its place, from rank 0
_timer: Callable[..., float] = time_call
_deterministic = torch._C._get_deterministic_algorithms
_precision = torch._C._get_float32_matmul_precision
_threads = torch.get_num_threads


@contextlib.contextmanager
def use(
    policy: str = "measure", *, timer: Callable[..., float] = time_call, directory: Path | None = None
) -> Iterator[None]:
    """For tests and benchmarks: plans of their own in the block, by another timer, kept elsewhere (None: in memory)."""
    global _policy, _opened, _timer, _shared
    before = _policy, _opened, _timer, _shared
    _policy, _opened, _timer, _shared = policy, Store(directory), timer, None
    forget()
    try:
        yield
    finally:
        _policy, _opened, _timer, _shared = before
        forget()


def forget() -> None:
    """Drops what this process remembers; the store keeps what it has."""
    for step in STEPS.values():
        step._memory.clear()


def open_store() -> Store:
    global _opened
    if _opened is None:
        opened = Store(_store.DIRECTORY)  # not under a lock, which a fork might find held: threads keep the first
        _opened = _opened or opened
    return _opened


def own_choices() -> dict[str, Entry]:
    """What is stored, by situation; nothing under the fixed rule."""
    return {} if _policy == "fixed" else open_store().entries


def adopt(choices: dict[str, str]) -> None:
    """From now on these decide, by situation without its place, and the fixed rule what is not among them."""
    global _shared
    _shared = choices
    forget()


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def measures() -> bool:
    """Whether anything is measured in this process."""
    return _policy != "fixed"


def bits_are_free() -> bool:
    """Whether the last bits of a result may depend on the moment at which it is computed."""
    return _policy != "fixed" and not _deterministic() and _ranks() == 1


class PlannedOp(Generic[P, R]):
    """A step with several ways, called as step(*args); all ways take the same arguments and return the same.

    signature(*args): everything a choice may depend on, hashable, cheap. describe(*args): the same for people and for
    the cache, sizes in buckets. work(*args): floating-point operations, worth measuring from `worth` on. device_arg:
    the argument whose `device` is the call's.
    rule(*args): the name of the candidate to run where nothing is measured and no candidate's own rule holds; the
    library's where that one does not take the call.
    tiny(*args): whether a call is so small that every rule leaves it to the library: nothing is looked up for it.
    unmeasured: why nothing of this step is measured, where that is so: its rule decides always.
    """

    def __init__(
        self,
        name: str,
        library: Callable[P, R],
        *,
        signature: Callable[P, tuple],
        describe: Callable[P, str],
        work: Callable[P, int],
        rule: Callable[P, str] = the_library,
        tiny: Callable[P, bool] = no,
        device_arg: int = 0,
        worth: int = WORTH_MEASURING,
        unmeasured: str | None = None,
    ):
        self.name, self.signature, self.describe, self.work, self.tiny = name, signature, describe, work, tiny
        self.rule, self.device_arg, self.worth, self.unmeasured = rule, device_arg, worth, unmeasured
        self.library = Candidate("library", library)
        self.candidates = {"library": self.library}
        self._memory: dict[tuple, Callable[P, R]] = {}
        STEPS[name] = self

    def add(
        self,
        name: str,
        run: Callable[P, R],
        why_not: Callable[P, str | None] = takes_all,
        *,
        reduced: Callable[P, bool] = no,
        rule: Callable[P, bool] | None = None,
    ) -> None:
        """Registers another way."""
        self.candidates[name] = Candidate(name, run, why_not, reduced, rule)
        self._memory.clear()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if len(self.candidates) == 1 or self.tiny(*args, **kwargs):
            return self.library.run(*args, **kwargs)
        bits = mode.bits
        if _deterministic():
            bits = ~bits  # a situation of its own
        key = self.signature(*args, **kwargs), bits, _threads(), _precision()
        found = self._memory.get(key)
        run = self._resolve(key, *args, **kwargs) if found is None else found
        try:
            return run(*args, **kwargs)
        except CallersError:
            raise
        except Exception as error:
            if run is self.library.run:
                raise
            why = f"{error}"
        return self._without(key, run, why, *args, **kwargs)

    def _without(self, key: tuple, run: Callable[P, R], why: str, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """The library's result where the way that was chosen has failed, as from now on in this process: a choice that
        was stored or shared comes from a moment with more memory, or from another machine's libraries."""
        release(self._device(args))
        result = self.library.run(*args, **kwargs)  # its own error is the caller's
        name = next((c.name for c in self.candidates.values() if c.run is run), "chosen")
        warnings.warn(NOT_USED.format(name, why), stacklevel=4)
        self._memory[key] = self.library.run
        return result

    def takers(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Candidate[P, R]]:
        """The candidates that take this call."""
        return {name: c for name, c in self.candidates.items() if c.usable(*args, **kwargs)}

    def _fixed(self, *args: P.args, **kwargs: P.kwargs) -> Candidate[P, R]:
        for candidate in self.candidates.values():
            if candidate.rule is not None and candidate.rule(*args, **kwargs) and candidate.usable(*args, **kwargs):
                return candidate
        candidate = self.candidates.get(self.rule(*args, **kwargs), self.library)
        return candidate if candidate.usable(*args, **kwargs) else self.library

    def _device(self, args: tuple[Any, ...]) -> torch.device:
        return args[self.device_arg].device

    def _resolve(self, key: tuple, /, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        takers = self.takers(*args, **kwargs)
        if capturing(self._device(args)):
            if len(takers) > 1:
                warn_of_capture(self.name)
            return self.library.run
        fixed = self._fixed(*args, **kwargs)
        choice, _ = self._decided(fixed.name, takers, *args, **kwargs)
        if choice is None:
            if not _lock.acquire(blocking=False):
                return fixed.run
            try:
                choice = self._measured(fixed.name, takers, *args, **kwargs)
            finally:
                _lock.release()
        if len(self._memory) >= MEMORY:
            self._memory.clear()
        self._memory[key] = run = self.candidates[choice].run
        return run

    def _situation(self, takers: dict[str, Candidate[P, R]], /, *args: P.args, **kwargs: P.kwargs) -> tuple[str, ...]:
        """The cache's key: what, where, who. With another candidate, or one more that takes part, it is another."""
        kind = "training" if is_training() else "inference"
        precision = "reduced" if reduced_allowed() else "full"
        what = f"{self.name} {self.describe(*args, **kwargs)}, {kind}, {precision} precision"
        return what, place(self._device(args)), ", ".join(takers)

    def _decided(
        self, fixed: str, takers: dict[str, Candidate[P, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[str | None, str]:
        """The choice, None where the call has to measure, and why."""
        if self.unmeasured is not None:
            return fixed, self.unmeasured
        if is_fixed() or _deterministic():
            return fixed, "fixed rule: deterministic algorithms are asked for"
        if _policy == "fixed":
            return fixed, "fixed rule: ZEROBLOCK_PLAN=fixed"
        if len(takers) == 1:
            return fixed, "the only way here"
        if self.work(*args, **kwargs) < self.worth:
            return fixed, "fixed rule: too small to be worth measuring"
        what, where, who = self._situation(takers, *args, **kwargs)
        if _shared is not None:
            choice = _shared.get(SEPARATOR.join((what, who)))
            if choice in takers:
                return choice, "shared by rank 0"
            return fixed, "fixed rule: rank 0 shared no choice for it"
        entry = open_store().entries.get(SEPARATOR.join((what, where, who)))
        if entry is not None and entry.choice in takers:
            return entry.choice, "the fastest as measured" + (", stored on this rank" if _ranks() > 1 else "")
        if _ranks() > 1:
            return fixed, "fixed rule: with more than one rank nothing is measured"
        return None, "fixed rule: the first call will measure"

    def _measured(
        self, preferred: str, takers: dict[str, Candidate[P, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> str:
        store, situation = open_store(), SEPARATOR.join(self._situation(takers, *args, **kwargs))
        entry = store.entries.get(situation)
        if entry is not None and entry.choice in takers:  # another thread has measured it meanwhile
            return entry.choice
        runs = {name: functools.partial(c.run, *args, **kwargs) for name, c in takers.items()}
        with torch.no_grad():
            times = measure(runs, self._device(args), _timer)
        choice = choose(times, preferred)
        if times["library"] is not None:  # else a lack of memory, of this moment: for this process alone
            store.add(situation, Entry(choice, times))
        return choice

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Explanation:
        """What a call would do now. Measures nothing."""
        takers, fixed = self.takers(*args, **kwargs), self._fixed(*args, **kwargs)
        not_taken = {
            name: c.why_not(*args, **kwargs) or "needs reduced float32 precision"
            for name, c in self.candidates.items()
            if name not in takers
        }
        entry = open_store().entries.get(SEPARATOR.join(self._situation(takers, *args, **kwargs)))
        times = {} if entry is None else {n: None if t is None else t * 1e3 for n, t in entry.times.items()}
        choice, why = self._decided(fixed.name, takers, *args, **kwargs)
        return Explanation(self.name, choice or fixed.name, why, times, not_taken)


STEPS: dict[str, PlannedOp[..., Any]] = {}
