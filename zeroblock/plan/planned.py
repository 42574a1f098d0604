"""Which way an op takes: candidates by name, measured once per situation, one mechanism for every device.

A `PlannedOp` is a step of a composition (a convolution with its residual, a GEMM) that can be done in several ways,
each exact within the op's error budget. Its candidates are registered by name; the first is the library's own way and
takes everything. The first call in a situation (op, shape bucket, dtype, layout, device, number of threads, inference
or training, reduced precision or not) times the candidates that take it, in turns, and keeps the fastest; the library's
way stays unless another was really faster. The verdict is shared by everything in the process and kept on disk
(`_plan_store.py`); after that a call costs one dictionary look-up.

The fixed rule (each op's `rule`, a function of the shapes alone) decides instead of a measurement
- in calls that come through the dispatcher: torch.compile, export, tensor subclasses, dispatch modes;
- under torch.use_deterministic_algorithms, and with ZEROBLOCK_PLAN=fixed (read once, at import);
- during CUDA-graph capture where nothing was measured before, and while another thread is measuring;
- for work too small to be worth a measurement.

A measurement runs the candidates on the call's own tensors. What a flag on the device would skip is not skipped then
(`state.measuring`): a branch that is zero at its first call will not stay so.

Candidates round differently, so that a first measurement may decide last bits as cudnn.benchmark does; the disk cache
keeps the decision for later processes. What a candidate computes in `reduced` float32 precision it is given only where
the user allowed that (torch.set_float32_matmul_precision, or `allow_reduced`). Candidates must be pure: same
arguments, fresh results, no random numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import store as _plan_store
from .measure import choose, measure, place, time_call
from .store import Entry, Store

POLICIES = ("measure", "fixed")
WORTH_MEASURING = 1 << 25  # floating-point operations, a third of a millisecond on one core
MEMORY = 1 << 14  # situations remembered; shapes that never repeat must not fill the memory

_policy = os.environ.get("ZEROBLOCK_PLAN", "measure")
if _policy not in POLICIES:
    raise ValueError(f"ZEROBLOCK_PLAN must be one of {', '.join(POLICIES)}, got {_policy!r}")
_lock = threading.RLock()
_store: Store | None = None
_deterministic = torch._C._get_deterministic_algorithms
_precision = torch._C._get_float32_matmul_precision
_threads = torch.get_num_threads


class _State(threading.local):
    """What this thread's calls are: one number, because reading a thread's attribute costs as much as a flag."""

    mode = 0
    measuring = False
    FIXED, TRAINING, REDUCED = 1, 2, 4


def _flag(bit: int) -> property:
    def write(self: _State, on: bool) -> None:
        self.mode = self.mode | bit if on else self.mode & ~bit

    return property(lambda self: bool(self.mode & bit), write)


class _Flags(_State):
    fixed, training, reduced = (_flag(bit) for bit in (_State.FIXED, _State.TRAINING, _State.REDUCED))


state = _Flags()


@contextlib.contextmanager
def fixed_rule() -> Iterator[None]:
    """No measured choice in the block (this thread)."""
    before, state.fixed = state.fixed, True
    try:
        yield
    finally:
        state.fixed = before


@contextlib.contextmanager
def allow_reduced() -> Iterator[None]:
    """Candidates of reduced float32 precision may run in the block (this thread)."""
    before, state.reduced = state.reduced, True
    try:
        yield
    finally:
        state.reduced = before


timer = time_call


@contextlib.contextmanager
def use(
    policy: str = "measure", *, timer: Callable[..., float] = time_call, directory: Path | None = None
) -> Iterator[None]:
    """For tests and benchmarks: plans of their own in the block, by another timer, kept elsewhere (None: in memory)."""
    global _policy, _store
    before = _policy, _store, globals()["timer"]
    _policy, _store, globals()["timer"] = policy, Store(directory), timer
    forget()
    try:
        yield
    finally:
        _policy, _store, globals()["timer"] = before
        forget()


def forget() -> None:
    """Drops what this process remembers; the store keeps what it has."""
    for op in OPS.values():
        op._memory.clear()


def _open_store() -> Store:
    global _store
    if _store is None:
        _store = Store(_plan_store.DIRECTORY)
    return _store


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way. why_not(*args) is the reason it does not take them, or None, and reduced(*args) whether it takes them in
    reduced float32 precision; both read metadata only."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    reduced: Callable[..., bool] = lambda *args: False

    def usable(self, args: tuple) -> bool:
        return self.why_not(*args) is None and (not self.reduced(*args) or reduced_allowed())


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a planned step would do: the candidate, why, and the measured milliseconds (empty: not measured)."""

    step: str
    choice: str
    why: str
    milliseconds: dict[str, float | None]
    not_taken: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.step}: {self.choice} ({self.why})"]
        for name, ms in sorted(self.milliseconds.items(), key=lambda item: (item[1] is None, item[1])):
            lines.append(f"  {name}: " + ("failed" if ms is None else f"{ms:.4g} ms"))
        lines += [f"  {name} does not take it: {why}" for name, why in self.not_taken.items()]
        return "\n".join(lines)


class PlannedOp:
    """A step with several ways, called as op(*args); all ways take the same arguments and return the same.

    signature(*args): everything a choice may depend on, hashable, cheap. describe(*args): the same for people and for
    the cache, sizes in buckets. work(*args): floating-point operations, worth measuring from `worth` on. lead: which
    argument names the device.
    rule(*args): the name of the candidate to run where nothing is measured; the library's where that takes no part.
    """

    def __init__(
        self,
        name: str,
        library: Callable[..., Any],
        *,
        signature: Callable[..., tuple],
        describe: Callable[..., str],
        work: Callable[..., int],
        lead: int = 0,
        rule: Callable[..., str] = lambda *args: "library",
        worth: int = WORTH_MEASURING,
    ):
        self.name, self.signature, self.describe, self.work, self.rule = name, signature, describe, work, rule
        self.lead, self.worth = lead, worth
        self.library = Candidate("library", library, lambda *args: None)
        self.candidates = {"library": self.library}
        self._memory: dict[tuple, Callable[..., Any]] = {}
        OPS[name] = self

    def add(
        self,
        name: str,
        run: Callable[..., Any],
        why_not: Callable[..., str | None] = lambda *args: None,
        reduced: Callable[..., bool] = lambda *args: False,
    ) -> None:
        """Registers another way."""
        self.candidates[name] = Candidate(name, run, why_not, reduced)
        self._memory.clear()

    def __call__(self, *args: Any) -> Any:
        if len(self.candidates) == 1:
            return self.library.run(*args)
        mode = state.mode
        if mode & _State.FIXED or _deterministic():
            return self._fixed(args).run(*args)
        key = self.signature(*args), mode, _threads(), _precision()
        run = self._memory.get(key)
        if run is None:
            run = self._resolve(key, args)
        return run(*args)

    def _takers(self, args: tuple) -> dict[str, Candidate]:
        return {name: c for name, c in self.candidates.items() if c.usable(args)}

    def _fixed(self, args: tuple) -> Candidate:
        candidate = self.candidates.get(self.rule(*args), self.library)
        return candidate if candidate.usable(args) else self.library

    def _resolve(self, key: tuple, args: tuple) -> Callable[..., Any]:
        fixed, device = self._fixed(args), args[self.lead].device
        takers = self._takers(args)
        if _policy == "measure" and len(takers) > 1 and self.work(*args) >= self.worth:
            if _capturing(device) or not _lock.acquire(blocking=False):
                return fixed.run
            try:
                chosen = takers[self._measured(args, takers, fixed.name).choice]
            finally:
                _lock.release()
        else:
            chosen = fixed
        if len(self._memory) >= MEMORY:
            self._memory.clear()
        self._memory[key] = chosen.run
        return chosen.run

    def _situation(self, args: tuple, takers: dict[str, Candidate]) -> str:
        """The cache's key. Who competed belongs to it: a new candidate, or one more that takes part, measures anew."""
        mode = "training" if state.training else "inference"
        precision = "reduced" if reduced_allowed() else "full"
        parts = (
            f"{self.name} {self.describe(*args)}", f"{mode}, {precision} precision", place(args[self.lead].device),
            ", ".join(takers),
        )  # fmt: skip
        return " | ".join(parts)

    def _measured(self, args: tuple, takers: dict[str, Candidate], preferred: str) -> Entry:
        store, situation = _open_store(), self._situation(args, takers)
        entry = store.entries.get(situation)
        if entry is None or entry.choice not in takers:
            runs: dict[str, Callable[[], Any]] = {n: functools.partial(c.run, *args) for n, c in takers.items()}
            before, state.measuring = state.measuring, True
            try:
                with torch.no_grad():
                    times = measure(runs, args[self.lead].device, timer)
            finally:
                state.measuring = before
            entry = Entry(choose(times, preferred), times)
            store.add(situation, entry)
        return entry

    def explain(self, *args: Any) -> Explanation:
        """What a call would do now. Measures nothing."""
        takers, fixed = self._takers(args), self._fixed(args)
        not_taken = {
            name: c.why_not(*args) or "needs reduced float32 precision"
            for name, c in self.candidates.items()
            if name not in takers
        }
        entry = _open_store().entries.get(self._situation(args, takers))
        times = {} if entry is None else {n: None if t is None else t * 1e3 for n, t in entry.times.items()}
        if state.fixed or _deterministic():
            choice, why = fixed.name, "fixed rule: deterministic algorithms are asked for"
        elif _policy == "fixed":
            choice, why = fixed.name, "fixed rule: ZEROBLOCK_PLAN=fixed"
        elif len(takers) == 1:
            choice, why = fixed.name, "the only way here"
        elif self.work(*args) < self.worth:
            choice, why = fixed.name, "fixed rule: too small to be worth measuring"
        elif entry is not None:
            choice, why = entry.choice, "the fastest as measured"
        else:
            choice, why = fixed.name, "fixed rule: the first call will measure"
        return Explanation(self.name, choice, why, times, not_taken)


OPS: dict[str, PlannedOp] = {}


def reduced_allowed() -> bool:
    """Whether the user allowed reduced float32 precision."""
    return state.reduced or _precision() != "highest"
