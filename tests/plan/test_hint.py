"""The hint that chooses between the dense and the flagged plan: it costs time where it is wrong, and nothing else.

Words that arrive when the test says so take the place of pinned memory, stand-ins that of the GPU backends.
"""

import contextlib
import copy
import gc
import threading

import pytest
import torch

import zeroblock as zb
from zeroblock import zero
from zeroblock.backends import available as _backends
from zeroblock.plan import planned as _plan
from zeroblock.steps import flag, hint
from zeroblock.testing import assert_bitwise_equal

from .cases import FakeTimer
from .gpu_cases import OPTIONS, TRITON, inputs, tails
from .gpu_cases import backends_fixture as _backends_fixture  # noqa: F401  (the tests' `backends`)

if _backends.interprets():
    pytest.skip("stand-ins need a process that does not interpret", allow_module_level=True)
pytestmark = TRITON


class FakeWord:
    """Arrives `late` calls of `ready` after it was sent; None: never."""

    late: int | None = 0
    sent = 0

    def copy(self, flag):
        type(self).sent += 1
        self._value, self._left = int(flag), self.late

    def ready(self):
        if self._left is None:
            return False
        self._left -= 1
        return self._left < 0

    def value(self):
        return self._value


@pytest.fixture(autouse=True)
def words(monkeypatch):
    class Words(FakeWord):
        pass

    monkeypatch.setattr(hint, "new_word", Words)
    monkeypatch.setattr(hint, "_hints", {})
    with _plan.use(timer=FakeTimer()):
        yield Words


def parameters(op, is_zero=False, **kwargs):
    given = inputs(op, **kwargs)
    given["weight"] = torch.nn.Parameter(given["weight"].detach(), requires_grad=kwargs.get("grad", False))
    if is_zero:
        given["weight"].data.zero_()
    return given


def call(op, given, **kwargs):
    return getattr(zb, op)(**given, **OPTIONS[op], **kwargs)


def bare(given):
    step = given["bias"] if given["weight"].dim() == 2 else given["bias"][:, None, None]
    return given["residual"] + (given["gate"][:, None] * step if "gate" in given else step)


def looks(backends) -> int:
    return sum(b.calls.count("zero_flag") for b in backends.values())


# ---- the hint alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", (0, 1, 5, None))
def test_a_dense_weight_is_looked_at_in_one_call_of_64(late, words):
    words.late, found = late, []
    one = hint.Hint(1)
    for _ in range(640):
        found.append(one.turn())
        if found[-1] == hint.LOOK:
            one.look(torch.zeros(1, dtype=torch.int32))
    assert hint.FLAGGED not in found
    assert 1 <= found.count(hint.LOOK) == words.sent <= 640 / hint.EVERY
    assert (one.zero is False) == (late is not None)


def test_a_change_is_noticed():
    """Dense to zero within one round of looks, zero to dense at the second call."""
    value, one = 1, hint.Hint(1)

    def turn():
        found = one.turn()
        if found != hint.DENSE:
            one.look(torch.tensor([value], dtype=torch.int32))
        return found

    assert [turn() for _ in range(3)] == [hint.LOOK, hint.FLAGGED, hint.FLAGGED]
    value = 0
    assert [turn() for _ in range(3)] == [hint.FLAGGED, hint.DENSE, hint.DENSE]
    value = 1
    found = [turn() for _ in range(hint.EVERY + 2)]
    assert found.index(hint.FLAGGED) == found.index(hint.LOOK) + 1 and found.count(hint.LOOK) == 1


# ---- calls ----------------------------------------------------------------------------------------------------------


@tails
def test_a_dense_model_pays_nothing(op, backends, words):
    """No flag is written or read, in backward neither, and what is reported of the weight is one tensor for all."""
    given = parameters(op, grad=True)
    expected = call(op, given, zero_skip="never")
    call(op, given)
    reported = set()
    for _ in range(hint.EVERY):
        y = call(op, given)
        assert_bitwise_equal(y, expected)
        reported.add(next(iter(flag._executed.values())).data_ptr())
    y.square().sum().backward()
    assert looks(backends) == words.sent == 1 and len(reported) == 1
    assert all(set(b.flags) <= {None} for b in backends.values())


@tails
@pytest.mark.parametrize("late", (0, 3, None))
def test_a_zero_weight_takes_the_flagged_plan_once_it_was_seen(op, late, backends, words):
    words.late = late
    given = parameters(op, is_zero=True)
    ran = []
    for _ in range(8):
        before = len(backends["triton"].flags)
        assert_bitwise_equal(call(op, given), bare(given))
        ran.append(backends["triton"].flags[before:] == [1])
    first = 8 if late is None else late + 1
    assert ran[:first] == [False] * first and ran[first + 1 :] == [True] * max(0, 7 - first)


@tails
@pytest.mark.parametrize("is_zero", (False, True))
def test_a_wrong_hint_costs_time_alone(op, is_zero, backends, words):
    """Each plan's result for each kind of weight, bit by bit, forward and backward."""
    words.late = None  # it stays wrong
    given = parameters(op, is_zero, grad=True)
    call(op, given, zero_skip="never")  # measures
    for wrong in (False, True):
        one = hint.Hint(1 if wrong else 10**9)
        one.zero = wrong
        hint._enter(given["weight"], one)
        before = len(backends["triton"].flags)
        y = call(op, given)
        assert backends["triton"].flags[before:] == ([int(is_zero)] if wrong else [])
        expected = bare(given) if is_zero else call(op, given, zero_skip="never")
        assert_bitwise_equal(y, expected)
        got = torch.autograd.grad(y.square().sum(), [t for t in given.values() if t.requires_grad])
        exact = torch.autograd.grad(expected.square().sum(), [given["residual"], given["bias"]])
        for a, b in zip((got[list(given).index(n)] for n in ("residual", "bias")), exact, strict=True):
            torch.testing.assert_close(a, b)
        upstream = got[0]
        assert bool(upstream.any()) != is_zero


@tails
def test_what_made_anew_for_every_call_is_not_looked_at(op, backends, words):
    given = parameters(op)
    for _ in range(5):
        call(op, {**given, "weight": given["weight"].detach().clone(memory_format=torch.preserve_format)})
        assert not hint._hints
    assert words.sent == looks(backends) == 0
    given["weight"] = given["weight"].detach()
    for _ in range(5):
        call(op, given)
    assert words.sent == looks(backends) == 1, "one that comes back"


@tails
def test_autocast_s_copies_have_the_weight_s_hint(op, backends, words):
    given = parameters(op, is_zero=True)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            before = len(backends["triton"].flags)
            call(op, given)
        # The norm's input is not in the dtype of the weight's copy: no kernel of ours takes that.
        assert backends["triton"].flags[before:] == ([] if op.startswith("group_norm") else [1])
    assert len(hint._hints) == 1, "the copies are gone"


@tails
def test_a_weight_that_is_moved_loaded_copied_or_trained(op, backends):
    given = parameters(op, is_zero=True)
    weight = given["weight"]
    dense = torch.randn_like(weight)
    for _ in range(3):
        call(op, given)
    assert hint.seen_zero(weight)

    def check(given, expected_zero, calls=2):
        for _ in range(calls):
            expected = bare(given) if not given["weight"].any() else call(op, given, zero_skip="never")
            torch.testing.assert_close(call(op, given), expected)
        assert hint.seen_zero(given["weight"]) is expected_zero

    twin = {**given, "weight": copy.deepcopy(weight)}
    assert hint.seen_zero(twin["weight"]) is None
    check(twin, True)
    weight.data.copy_(dense)  # unseen by version counters
    check(given, False, 3)
    weight.data = torch.zeros_like(dense)  # as .to() swaps it
    check(given, True, hint.EVERY + 2)
    with torch.no_grad():
        weight.add_(dense)
    check(given, False, 3)
    with torch.inference_mode():
        weight.data.zero_()
        check(given, True, hint.EVERY + 2)
    assert len(hint._hints) == 2
    del given, twin, weight, check
    gc.collect()
    assert not hint._hints


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
