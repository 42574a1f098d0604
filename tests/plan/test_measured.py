"""Plans: what is measured, once, by a fake timer; which rule holds instead."""

from __future__ import annotations

import threading

import pytest
import torch

import zeroblock as zb
from zeroblock import testing
from zeroblock.plan import mode
from zeroblock.plan import planned as _plan
from zeroblock.plan.describe import bucket
from zeroblock.plan.measure import choose, measure
from zeroblock.steps import conv as _conv

from .cases import BIG, FakeTimer, chosen, double, never, x3, x4

CPU = torch.device("cpu")


@pytest.fixture
def op():
    with double() as planned:
        yield planned


# ---- choosing ------------------------------------------------------------------------------------------------------


def test_the_fastest_is_chosen_and_measured_once(op):
    timer = FakeTimer(library=1.0, fast=0.5, picky=0.7)
    with _plan.use(timer=timer):
        assert chosen(op, x4) == "fast"
        count = len(timer.calls)
        assert sorted(set(timer.calls)) == ["fast", "library", "picky"] and count == 3 * 7
        for _ in range(3):
            assert chosen(op, x4) == "fast"
        assert len(timer.calls) == count


def test_what_does_not_take_the_call_is_not_run(op):
    with _plan.use(timer=FakeTimer(library=1.0, fast=0.9, picky=0.1)):
        assert chosen(op, x3) == "fast"
        assert "picky" not in op.ran and "coarse" not in op.ran


@pytest.mark.parametrize("fast, expected", [(0.5, "fast"), (0.96, "fast"), (0.99, "library"), (1.01, "library")])
def test_the_library_stays_unless_another_is_really_faster(op, fast, expected):
    with _plan.use(timer=FakeTimer(library=1.0, fast=fast, picky=2.0)):
        assert chosen(op, x4) == expected


def test_never_slower_than_the_library():
    """The preferred way wins ties only: measured slower than the library it is out, however little."""
    assert choose({"library": 1.0, "mine": 1.01, "other": 1.2}, "mine") == "library"
    assert choose({"library": 1.0, "mine": 0.99, "other": 0.98}, "mine") == "mine"
    assert choose({"library": 1.0, "mine": 0.99, "other": 0.5}, "mine") == "other"
    assert choose({"library": 1.0, "mine": None}, "mine") == "library"


def test_candidates_are_timed_in_turns():
    order: list[str] = []
    measure({n: lambda: None for n in "abc"}, CPU, lambda name, run, device: order.append(name) or 1.0)
    assert "".join(order[:9]) == "abcbcacab"


def test_a_slow_measurement_ends_early(monkeypatch):
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr("zeroblock.plan.measure.time.perf_counter", lambda: next(clock))
    calls: list[str] = []
    measure({n: lambda: None for n in "ab"}, CPU, lambda name, run, device: calls.append(name) or 1.0)
    assert len(calls) == 2 * 3


def _compiled_linear(device):
    torch._dynamo.reset()
    weight = torch.randn(512, 512, device=device)
    h = torch.randn(1, 256, 512, device=device)
    function = torch.compile(
        lambda h: zb.linear_gate_residual(h, weight, None, None, None), fullgraph=True, backend="aot_eager"
    )
    return function, h, weight


def test_a_compiled_call_on_a_cpu_takes_what_an_eager_one_does():
    function, h, weight = _compiled_linear("cpu")
    timer = FakeTimer(library=1.0, oneDNN=0.5)
    with _plan.use(timer=timer), torch.no_grad():
        function(h)
        count = len(timer.calls)
        assert count
        function(h)
        zb.linear_gate_residual(h, weight, None, None, None)
    assert len(timer.calls) == count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
def test_a_compiled_call_on_a_gpu_goes_by_the_rule():
    function, h, _ = _compiled_linear("cuda")
    with _plan.use(timer=never), torch.no_grad():
        function(h)


# ---- what makes another situation ----------------------------------------------------------------------------------


def test_situations_are_told_apart(op):
    timer = FakeTimer()
    rounds = lambda: timer.calls.count("library") // 7  # noqa: E731
    with _plan.use(timer=timer):
        op(x4, BIG)
        op(torch.ones(4), BIG)
        assert rounds() == 1
        op(torch.ones(20), BIG)
        op(torch.ones(19), BIG)  # one bucket with 20, but 19 is odd: other candidates
        op(torch.ones(18), BIG)  # as 20
        assert rounds() == 3
        op(x4.double(), BIG)
        op(torch.ones(8)[::2], BIG)
        assert rounds() == 5
        with mode.training():
            op(x4, BIG)
        assert rounds() == 6
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            op(x4, BIG)
        finally:
            torch.set_num_threads(threads)
        assert rounds() == 7
        op(x4, BIG)
        assert rounds() == 7


def test_buckets_are_at_most_a_quarter_wide():
    for n in range(1, 3000):
        assert n <= bucket(n) <= max(n, n * 1.25) and bucket(bucket(n)) == bucket(n)


def test_reduced_precision_needs_permission(op):
    timer = FakeTimer(library=1.0, fast=0.9, picky=0.9, coarse=0.1)
    with _plan.use(timer=timer):
        assert chosen(op, x4) in ("fast", "picky")
        assert op.explain(x4, BIG).not_taken["coarse"] == "needs reduced float32 precision"
        with mode.allow_reduced():
            assert chosen(op, x4) == "coarse"
        assert chosen(op, x4) in ("fast", "picky")
        torch.set_float32_matmul_precision("high")
        try:
            assert chosen(op, x4) == "coarse"
        finally:
            torch.set_float32_matmul_precision("highest")
        assert "coarse" in timer.calls and chosen(op, x4) in ("fast", "picky")


def test_training_is_marked_around_a_differentiable_op():
    seen = []
    planned = _conv.CONV
    before = planned.candidates["library"]
    spy = lambda *args: (seen.append(mode.is_training()), before.run(*args))[1]  # noqa: E731
    with _plan.use("fixed"):
        planned.library = planned.candidates["library"] = _plan.Candidate("library", spy)
        try:
            h, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
            zb.conv_residual(h, w, None, None)
            zb.conv_residual(h, w.requires_grad_(), None, None).sum().backward()
            with torch.no_grad():
                zb.conv_residual(h, w, None, None)
        finally:
            planned.library = planned.candidates["library"] = before
            _plan.forget()
    assert seen == [False, True, False] and not mode.is_training()


# ---- the fixed rule -------------------------------------------------------------------------------------------------


@pytest.fixture
def ruled(op):
    op.rule = lambda x, work: "picky"
    return op


def test_small_work_is_not_measured(ruled):
    with _plan.use(timer=never):
        assert chosen(ruled, x4, BIG - 1) == "picky"
        assert chosen(ruled, x3, BIG - 1) == "library"  # the rule's way takes no part
        assert "too small" in ruled.explain(x4, BIG - 1).why


def test_deterministic_algorithms_fix_the_choice(ruled):
    with _plan.use(timer=FakeTimer(fast=0.1)):
        assert chosen(ruled, x4) == "fast"
        torch.use_deterministic_algorithms(True)
        try:
            assert chosen(ruled, x4) == "picky" and "deterministic" in ruled.explain(x4, BIG).why
        finally:
            torch.use_deterministic_algorithms(False)
        assert chosen(ruled, x4) == "fast"


def test_the_policy_fixes_the_choice(ruled):
    with _plan.use("fixed", timer=never):
        assert chosen(ruled, x4) == "picky" and "ZEROBLOCK_PLAN=fixed" in ruled.explain(x4, BIG).why


def test_capture_measures_nothing_and_remembers_nothing(ruled, monkeypatch):
    timer = FakeTimer(fast=0.1)
    with _plan.use(timer=timer):
        with monkeypatch.context() as capture:
            capture.setattr(_plan, "capturing", lambda device: True)
            with pytest.warns(UserWarning, match="double is captured in a CUDA graph before a call like it ran"):
                assert chosen(ruled, x4) == "library" and not timer.calls
        assert chosen(ruled, x4) == "fast" and timer.calls
        monkeypatch.setattr(_plan, "capturing", lambda device: True)
        assert chosen(ruled, x4) == "fast", "what was measured before holds in capture too"


def test_nobody_waits_for_a_measurement(ruled):
    """Another thread's call in the same situation goes by the rule while the first is measuring."""
    others = []

    def timer(name, run, device):
        if not others:
            thread = threading.Thread(target=lambda: others.append(chosen(ruled, x4)))
            thread.start()
            thread.join(60)
        return {"fast": 0.1}.get(name, 1.0)

    with _plan.use(timer=timer):
        assert chosen(ruled, x4) == "fast"
    assert others == ["picky"]


def test_a_thread_that_captures_measures_nothing_while_another_does(ruled, monkeypatch):
    """Nor goes by the rule: that way may have to be compiled. What the other has measured then holds in a capture."""
    measuring, captured = threading.current_thread(), []
    monkeypatch.setattr(_plan, "capturing", lambda device: threading.current_thread() is not measuring)

    def capture():
        thread = threading.Thread(target=lambda: captured.append(chosen(ruled, x4)))
        thread.start()
        thread.join(60)

    def timer(name, run, device):
        assert threading.current_thread() is measuring
        if not captured:
            with pytest.warns(UserWarning, match="double is captured in a CUDA graph before a call like it ran"):
                capture()
        return {"fast": 0.1}.get(name, 1.0)

    with _plan.use(timer=timer):
        assert chosen(ruled, x4) == "fast"
        capture()
    assert captured == ["library", "fast"]


@pytest.mark.parametrize("way", ["dispatcher", "compile"])
def test_calls_through_the_dispatcher_go_by_the_rule(way):
    h, w = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 5, 5)
    pad = [2, 2]
    function = lambda h, w: torch.ops.zeroblock.conv_residual.default(h, w, None, None, pad, False)[0]  # noqa: E731
    if way == "compile":
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with _plan.use(timer=never):
        y = function(h, w)
    testing.assert_bitwise_equal(y, torch.conv2d(h, w, padding=2))
