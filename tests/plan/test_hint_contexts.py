"""The hint where something watches or forbids: deterministic algorithms, ranks, captures, checkpointing, compilers,
threads; and what `explain` says. The hint itself: test_hint.py."""

import contextlib
import threading

import pytest
import torch

import zeroblock as zb
from zeroblock import zero
from zeroblock.backends import available as _backends
from zeroblock.plan import mode
from zeroblock.plan import planned as _plan
from zeroblock.steps import hint
from zeroblock.testing import assert_bitwise_equal

from .gpu_cases import OPTIONS, TRITON, tails
from .gpu_cases import backends_fixture as _backends_fixture  # noqa: F401  (the tests' `backends`)
from .hint_cases import bare, call, looks, parameters
from .hint_cases import words_fixture as _words_fixture  # noqa: F401  (the tests' `words`)

if _backends.interprets():
    pytest.skip("stand-ins need a process that does not interpret", allow_module_level=True)
pytestmark = TRITON


def _ranks(patch):
    patch.setattr(_plan, "_ranks", lambda: 2)


def _deterministic(patch):
    patch.setattr(_plan, "_deterministic", lambda: True)


def _fixed(patch):
    patch.setattr(_plan, "_policy", "fixed")


@tails
@pytest.mark.parametrize("ask", (_ranks, _deterministic, _fixed))
def test_bits_that_may_not_depend_on_the_moment(op, ask, backends, words, monkeypatch):
    """The dense plan, also of a weight that was seen zero before."""
    given = parameters(op, is_zero=True)
    for _ in range(3):
        call(op, given)
    seen, sent = len(backends["triton"].flags), words.sent
    with monkeypatch.context() as patch:
        ask(patch)
        for _ in range(3):
            assert_bitwise_equal(call(op, given), bare(given))
        assert len(backends["triton"].flags) == seen and words.sent == sent
        assert "the same bits always: the dense plan" in str(zb.explain(op, **given, **OPTIONS[op]))


@tails
def test_a_capture_takes_the_plan_of_the_moment_and_looks_at_nothing(op, backends, words, monkeypatch):
    given = parameters(op, is_zero=True)
    other = {**given, "weight": torch.nn.Parameter(given["weight"].detach().clone(), requires_grad=False)}
    for _ in range(3):
        call(op, given)
    sent, seen = words.sent, len(backends["triton"].flags)
    with monkeypatch.context() as patch:
        patch.setattr(hint, "capturing", lambda device: True)
        patch.setattr(_plan, "capturing", lambda device: True)
        call(op, given)
        assert backends["triton"].flags[seen:] == [1]
        calls = looks(backends)
        for _ in range(3):
            assert_bitwise_equal(call(op, other), bare(other))
        assert words.sent == sent and looks(backends) == calls
        assert len(backends["triton"].flags) == seen + 1


@tails
def test_recomputation_may_take_the_other_plan(op, backends):
    """Checkpointing compares what was saved with what is saved again: one shape, dtype and device in both plans."""
    given = parameters(op, is_zero=True, grad=True)
    for times in (False, True), (True, False):
        turns = iter(times)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("zeroblock.backends.gpu.hinted.plan_of", lambda w, turns=turns: (next(turns), None))
            run = lambda *values: call(op, dict(zip(given, values, strict=True)))  # noqa: E731
            y = torch.utils.checkpoint.checkpoint(run, *given.values(), use_reentrant=False)
            y.square().sum().backward()
            assert next(turns, None) is None
    upstream = given["x" if "x" in given else "h"].grad
    assert torch.equal(upstream, torch.zeros_like(upstream))


@tails
def test_a_compiler_sees_the_op_alone(op, backends):
    """No graph break; the plan is chosen when the graph runs."""
    given = parameters(op, is_zero=True)
    compiled = torch.compile(lambda given: call(op, given), backend="aot_eager", fullgraph=True)
    with contextlib.ExitStack() as stack:
        for cast in (False, True):
            if cast:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            for _ in range(3):
                before = len(backends["triton"].flags)
                compiled(given)
            assert (backends["triton"].flags[before:] == [1]) == (not cast)
    torch._dynamo.reset()


@pytest.mark.parametrize("is_zero", (False, True))
@tails
def test_backward_of_a_compiled_graph_asks_the_hint(op, is_zero, backends):
    """What forward reports there is a tensor of its own, which does not tell whether kernels are to read it."""
    given = parameters(op, is_zero, grad=True)
    with mode.fixed_rule():
        for _ in range(3):
            y = call(op, given)
        before = len(backends["triton"].flags)
        y.square().sum().backward()
    found = backends["triton"].flags[before:]
    assert found == ([1] if is_zero and "conv" in op else [])
    upstream = given["x" if "x" in given else "h"].grad
    assert bool(upstream.any()) != is_zero


def test_threads_share_a_hint(backends):
    given = parameters("conv_residual", is_zero=True)
    expected, errors = bare(given), []

    def work():
        for _ in range(20):
            if not torch.equal(call("conv_residual", given), expected):
                errors.append("differs")

    call("conv_residual", given)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and hint.seen_zero(given["weight"]) and len(hint._hints) == 1


def test_a_call_that_no_kernel_of_ours_takes(backends, words, monkeypatch):
    """Nothing is looked at: there is no other plan."""
    for backend in backends.values():
        monkeypatch.setattr(backend, "why_not_own", lambda *a: "not today")
    given = parameters("conv_residual", is_zero=True)
    for _ in range(3):
        call("conv_residual", given)
    assert words.sent == looks(backends) == 0
    assert "zero path: off: the GEMM is a library call (triton" in str(zb.explain("conv_residual", **given))


@tails
def test_explain_says_which_plan_and_why(op, backends):
    given = parameters(op)
    text = lambda: str(zb.explain(op, **given, **OPTIONS[op]))  # noqa: E731
    assert "the weight was not seen yet: the dense plan" in text() and f"plan {op}: " in text()
    for _ in range(2):
        call(op, given)
    assert "last seen not zero: the dense plan" in text() and f"plan {op}: " in text()
    given["weight"].data.zero_()
    for _ in range(hint.EVERY + 2):
        call(op, given)
    assert "last seen zero: our kernels" in text()
    assert f"plan flagged {op}: triton 64x64x32 (our kernels, all of which leave early" in text()
    assert zero.counters()[op][0] > 0


def test_the_real_word():
    """In ordinary memory where there is no GPU."""
    word, other = hint.PinnedWord(), hint.PinnedWord()
    for value in (1, 0, 1):
        word.copy(torch.tensor([value], dtype=torch.int32))
        other.copy(torch.tensor([1 - value], dtype=torch.int32))
        assert word.ready() and word.value() == value and other.value() == 1 - value
    word._word.value = hint._PENDING
    assert not word.ready()
