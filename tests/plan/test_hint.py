"""The hint that chooses between the dense and the flagged plan: it costs time where it is wrong, and nothing else.

Words that arrive when the test says so take the place of pinned memory, stand-ins that of the GPU backends.
"""

import copy
import gc

import pytest
import torch

from zeroblock.backends import available as _backends
from zeroblock.steps import flag, hint
from zeroblock.testing import assert_bitwise_equal

from .gpu_cases import TRITON, tails
from .gpu_cases import backends_fixture as _backends_fixture  # noqa: F401  (the tests' `backends`)
from .hint_cases import bare, call, looks, parameters
from .hint_cases import words_fixture as _words_fixture  # noqa: F401  (the tests' `words`)

if _backends.interprets():
    pytest.skip("stand-ins need a process that does not interpret", allow_module_level=True)
pytestmark = TRITON


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
    assert 1 <= found.count(hint.LOOK) == words.sent <= 640 / 64
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
