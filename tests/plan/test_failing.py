"""Plans: a way that fails, while it is measured or later, never reaches the call; the library's own error does."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from zeroblock import testing
from zeroblock.plan import mode
from zeroblock.plan import planned as _plan
from zeroblock.plan.measure import measure
from zeroblock.steps.packed import FrozenWeightChanged

from .cases import BIG, FakeTimer, chosen, double, x4

CPU = torch.device("cpu")


@pytest.fixture
def op():
    with double() as planned:
        yield planned


def test_a_failing_way_is_left_out_and_said(op):
    op.add("broken", lambda x, work: 1 / 0)
    with _plan.use(timer=FakeTimer(library=1.0, fast=0.9, picky=0.8)):
        with pytest.warns(UserWarning, match="does not use the plan broken: division by zero"):
            assert chosen(op, x4) == "picky"
        assert op.explain(x4, BIG).milliseconds["broken"] is None


FAILURES = {
    "error": RuntimeError("no kernel"),
    "CUDA memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "CPU memory": MemoryError("no room"),
}


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("run", range(8))
def test_a_way_that_fails_in_any_of_its_runs_is_left_out(op, error, run):
    """Warm-up (run 0) and timed rounds: the others go on, and the call gets its result."""
    runs = []

    def flaky(x, work):
        runs.append(len(runs))
        if runs[-1] == run:
            raise error
        return x * 2

    op.add("flaky", flaky)
    with _plan.use(timer=FakeTimer(library=1.0, fast=0.9, picky=0.8, flaky=0.1)):
        with pytest.warns(UserWarning, match="does not use the plan flaky") as warned:
            y = op(x4, BIG)
        assert len(warned) == 1 and len(runs) == run + 1 and op.ran[-1] == "picky"
        testing.assert_bitwise_equal(y, x4 * 2)
        explained = op.explain(x4, BIG)
        assert explained.choice == "picky" and explained.milliseconds["flaky"] is None
        assert explained.milliseconds["fast"] == 900.0, "the others were timed"


def test_what_a_failed_way_held_is_freed_before_the_next_runs(op):
    held, alive = [], []

    def hungry(x, work):
        own = torch.empty(10)
        held.append(weakref.ref(own))
        raise torch.OutOfMemoryError("out of memory")

    def after(x, work):
        alive.extend(ref() is not None for ref in held)
        return x * 2

    op.add("hungry", hungry)
    op.add("after", after)
    gc.disable()
    try:
        with _plan.use(timer=FakeTimer()), pytest.warns(UserWarning, match="does not use the plan hungry"):
            op(x4, BIG)
    finally:
        gc.enable()
    assert len(held) == 1 and alive and not any(alive)


def test_where_all_others_fail_the_library_runs(op):
    def timer(name, run, device):
        if name != "library":
            raise torch.OutOfMemoryError("out of memory")
        return 1.0

    with _plan.use(timer=timer), pytest.warns(UserWarning, match="does not use the plan"):
        assert chosen(op, x4) == "library"


def test_a_library_that_cannot_be_timed_runs_and_nothing_is_stored(op):
    """A timed round takes more memory than the call: the call itself may succeed, another process may measure."""

    def timer(name, run, device):
        raise torch.OutOfMemoryError("out of memory")

    op.rule = lambda x, work: "picky"
    with _plan.use(timer=timer):
        with pytest.warns(UserWarning, match="does not use the plan library"):
            assert chosen(op, x4) == "library"
        assert not _plan.open_store().entries
        assert chosen(op, x4) == "library", "remembered: not measured, and not warned of, at every call"


def test_an_interrupt_is_the_users_and_leaves_nothing_behind(op):
    def timer(name, run, device):
        raise KeyboardInterrupt

    with _plan.use(timer=timer):
        with pytest.raises(KeyboardInterrupt):
            op(x4, BIG)
        assert _plan._lock.acquire(blocking=False)
        _plan._lock.release()


def test_the_librarys_own_error_is_the_callers():
    def fail():
        raise ValueError("bad argument")

    with pytest.raises(ValueError, match="bad argument"):
        measure({"library": fail, "other": lambda: None}, CPU)


# ---- a way that was chosen before ----------------------------------------------------------------------------------


class Flaky:
    """A way that is the fastest, and fails from when it is told to."""

    def __init__(self, op):
        self.error: Exception | None = None
        self.op = op
        op.add("flaky", self)

    def __call__(self, x, work):
        if self.error is not None:
            raise self.error
        self.op.ran.append("flaky")
        return x * 2


FASTEST = {"library": 1.0, "fast": 0.9, "picky": 0.8, "flaky": 0.1}


def falls_back(op, x=x4):
    """The call gets the library's result and one warning; later ones neither fail nor warn."""
    with pytest.warns(UserWarning, match="does not use the plan flaky") as warned:
        y = op(x, BIG)
    assert len(warned) == 1 and op.ran[-1] == "library"
    testing.assert_bitwise_equal(y, x * 2)
    assert chosen(op, x) == "library"


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("when", ["stored", "remembered", "shared"])
def test_a_choice_that_fails_gives_way_to_the_library(op, error, when):
    flaky = Flaky(op)
    with _plan.use(timer=FakeTimer(**FASTEST)):
        if when == "shared":
            what, _, who = op._situation(op.takers(x4, BIG), x4, BIG)
            _plan.adopt({_plan.SEPARATOR.join((what, who)): "flaky"})
        assert chosen(op, x4) == "flaky"
        stored = dict(_plan.open_store().entries)
        if when != "remembered":
            _plan.forget()
        flaky.error = error
        falls_back(op)
        assert _plan.open_store().entries == stored, "another process, or this one tomorrow, may have the memory"
        flaky.error = None
        assert chosen(op, x4) == "library"
        if when != "shared":
            assert chosen(op, torch.ones(64)) == "flaky", "in another situation it is what it was"


def test_the_fixed_rules_choice_may_fail_too(op):
    flaky = Flaky(op)
    op.rule = lambda x, work: "flaky"
    with _plan.use("fixed"):
        assert chosen(op, x4) == "flaky"
        _plan.forget()
        flaky.error = MemoryError("no room")
        falls_back(op)
        _plan.forget()
        with mode.fixed_rule(), pytest.warns(UserWarning, match="does not use the plan flaky"):
            testing.assert_bitwise_equal(op(x4, BIG), x4 * 2)


def test_where_the_library_fails_as_well_its_error_is_the_callers(op, recwarn):
    Flaky(op)

    def fail(x, work):
        raise ValueError("bad argument")

    with _plan.use(timer=FakeTimer(**FASTEST)):
        op(x4, BIG)
        for name in ("flaky", "library"):
            op.candidates[name] = _plan.Candidate(name, fail)
        op.library = op.candidates["library"]
        _plan.forget()
        with pytest.raises(ValueError, match="bad argument"):
            op(x4, BIG)
    assert not recwarn.list


def test_what_a_chosen_way_held_is_freed_before_the_library_runs(op):
    held, alive = [], []

    def hungry(x, work):
        own = torch.empty(10)
        held.append(weakref.ref(own))
        raise torch.OutOfMemoryError("out of memory")

    def library(x, work):
        alive.extend(ref() is not None for ref in held)
        return x * 2

    op.add("hungry", hungry)
    op.candidates["library"] = op.library = _plan.Candidate("library", library)
    op.rule = lambda x, work: "hungry"
    gc.disable()
    try:
        with _plan.use("fixed"), pytest.warns(UserWarning, match="does not use the plan hungry"):
            op(x4, BIG)
    finally:
        gc.enable()
    assert alive == [False]


@pytest.mark.parametrize("when", ["measured", "remembered"])
def test_an_error_of_the_callers_is_not_hidden_by_another_way(op, when, recwarn):
    """A weight that was written while frozen: the library's result would be a silent change of weights."""
    flaky = Flaky(op)
    with _plan.use(timer=FakeTimer(**FASTEST)):
        if when == "remembered":
            op(x4, BIG)
        stored = dict(_plan.open_store().entries)
        flaky.error = FrozenWeightChanged("was written while frozen")
        with pytest.raises(RuntimeError, match="was written while frozen"):
            op(x4, BIG)
        assert _plan.open_store().entries == stored and not recwarn.list
