"""The one decision: may a branch be skipped, and why; what it counts; which modules are zeroblock's own."""

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.blocks.decision import NOT_ALLOWED, RUN, SKIP_BY_GATE, SKIP_BY_WEIGHT, decide
from zeroblock.blocks.layers import is_own, is_plain_linear, may_draw
from zeroblock.testing import counters, eager, reset_counters

ZERO, ONE = torch.zeros(3, 3), torch.ones(3, 3)


class _Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "weights, gates, expected",
    [
        ((ZERO,), (), SKIP_BY_WEIGHT),
        ((), (ZERO,), SKIP_BY_GATE),
        ((ONE,), (), RUN),
        ((ZERO,), (ONE,), SKIP_BY_WEIGHT),
        ((ONE,), (ZERO,), SKIP_BY_GATE),
        ((ZERO,), (ZERO,), SKIP_BY_GATE),
        ((ZERO, ONE), (), RUN),
        ((), (ONE, ZERO), RUN),
    ],
)
def test_values_say_why(weights, gates, expected):
    reset_counters()
    assert decide("branch", "auto", weights, gates) is expected
    assert counters() == {"branch": (1, 0) if expected is RUN else (0, 1)}


def _hooked() -> nn.Module:
    m = nn.Sequential(nn.Linear(2, 2))
    m[0].register_forward_hook(lambda *_: None)
    return m


@pytest.mark.parametrize("bypassed", [_hooked(), nn.BatchNorm1d(2)], ids=["hook", "batch norm"])
def test_what_watches_a_module_stops_a_skip(bypassed):
    reset_counters()
    assert decide("branch", "auto", (ZERO,), bypassed=(bypassed,)) is NOT_ALLOWED and counters() == {}
    assert decide("branch", "auto", (ONE,), bypassed=(bypassed,)) is RUN


def test_random_numbers_stop_a_skip_that_would_swallow_them():
    dropout = nn.Dropout(0.5)
    assert decide("branch", "auto", (ZERO,), bypassed=(dropout,)) is SKIP_BY_WEIGHT
    assert decide("branch", "auto", (ZERO,), bypassed=(dropout,), may_draw=False) is NOT_ALLOWED
    assert decide("branch", "auto", (ZERO,), bypassed=(dropout.eval(),), may_draw=False) is SKIP_BY_WEIGHT


def test_nobody_looks_where_a_skip_is_not_allowed():
    reset_counters()
    assert decide("branch", "never", (ZERO,)) is NOT_ALLOWED
    with _Mode():
        assert decide("branch", "auto", (ZERO,)) is NOT_ALLOWED
    with zb.zero.reference_only():
        assert decide("branch", "auto", (ZERO,)) is NOT_ALLOWED
    assert counters() == {}
    with pytest.raises(ValueError, match="zero_skip"):
        decide("branch", "sometimes", (ZERO,))


def _with_gates(block: nn.Module, *gates: int) -> nn.Module:
    """All parameters random, the rows of these gates zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0, 0.1, generator=generator)
        for p in block.adaLN_modulation[-1].parameters():
            for i in gates:
                p.unflatten(0, (6, -1))[i].zero_()
    return block


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("gates, expected", [((2, 5), (0, 2)), ((2,), (1, 1)), ((5,), (1, 1)), ((), (2, 0))])
def test_a_half_counts_once_whoever_owns_the_block(gates, expected, training):
    converted = _with_gates(eager.DiTBlock(16, 2), *gates)
    zb.accelerate(converted, strict=True)
    x, c = torch.randn(2, 3, 16), torch.randn(2, 16)
    for block in (_with_gates(zb.nn.DiTBlock(16, 2), *gates), converted):
        reset_counters()
        with torch.set_grad_enabled(training):
            block.train(training)(x, c)
        assert counters()["DiTBlock"] == expected


class _Drawing(zb.nn.ZeroLinear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x))


def test_modules_are_known_as_zeroblocks_own():
    """Wherever their files stand: accelerate leaves them alone, and trusts them not to draw random numbers."""
    for name in zb.nn.__all__:
        kind = getattr(zb.nn, name)
        assert is_own(kind.__new__(kind)), name
    layer = nn.Sequential(zb.nn.ZeroLinear(2, 2))
    for m in (layer, copy.deepcopy(layer)):
        zb.freeze(m)
        assert is_own(m[0]) and type(m[0]) is not zb.nn.ZeroLinear
    for m in (nn.Linear(2, 2), eager.DiTBlock(16, 2), _Drawing(2, 2)):
        assert not is_own(m)
    assert may_draw(_Drawing(2, 2)) and not may_draw(zb.nn.ZeroLinear(2, 2))


def test_a_subclass_with_a_forward_of_its_own_is_no_plain_layer():
    assert is_plain_linear(nn.Linear(2, 2)) and is_plain_linear(zb.nn.ZeroLinear(2, 2))
    assert not is_plain_linear(_Drawing(2, 2))
