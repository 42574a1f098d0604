"""What does not depend on the number of threads: zeroblock's own ways, and the fixed rule. The measured choice may."""

from __future__ import annotations

import contextlib

import pytest
import torch

import zeroblock as zb
from zeroblock import testing
from zeroblock.backends.select import select
from zeroblock.plan import planned as _plan
from zeroblock.steps.conv import CONV, ConvCall, unit_geometry
from zeroblock.steps.conv_bwd import CONV_BWD, ConvGradsCall

from .cases import BIG, double, x4


@pytest.fixture(autouse=True)
def _keep_the_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def by_threads(name, run, device):
    """A timer by which another way is the fastest with one thread than with more."""
    run()
    return 1e-6 if name == ("library" if torch.get_num_threads() == 1 else "fast") else 1.0


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        with _plan.use(timer=by_threads):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def choices(op) -> list[str]:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        op(x4, BIG)
        assert op.explain(x4, BIG).choice == op.ran[-1]
        found.append(op.ran[-1])
    return found


def test_the_fastest_is_measured_for_each_number_of_threads():
    with double() as op, _plan.use(timer=by_threads):
        assert choices(op) == ["library", "fast", "fast"]


@pytest.mark.parametrize("fixed", [lambda: _plan.use("fixed", timer=by_threads), deterministic])
def test_the_fixed_rule_chooses_the_same_for_any_number_of_threads(fixed):
    with double() as op, fixed():
        op.rule = lambda x, work: "picky"
        assert choices(op) == ["picky"] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ways_of_our_own_give_the_same_bits_for_any_number_of_threads(dtype, layout):
    g = torch.Generator().manual_seed(3)
    draw = lambda *s: torch.randn(*s, generator=g).to(dtype).to(memory_format=layout)  # noqa: E731
    h, dy, weight, backend = draw(2, 64, 21, 30), draw(2, 96, 21, 30), draw(96, 64, 3, 3), select("conv", torch.ones(1))
    forward = ConvCall(backend, h, weight, None, dy, unit_geometry([1, 1]))
    backward = ConvGradsCall(backend, dy, h, weight, True, (1, 1), [True, True, True])
    ways = [(c, call) for step, call in ((CONV, forward), (CONV_BWD, backward)) for c in step.takers(call).values()]
    own = [(c, call) for c, call in ways if c.name.startswith("winograd")]
    assert len(own) == (2 if backend.name == "cpu" else 0)
    for candidate, call in own:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(candidate.run(call))
        for other in results[1:]:
            for a, b in zip(_tensors(results[0]), _tensors(other), strict=True):
                testing.assert_bitwise_equal(a, b, candidate.name)


def _tensors(result):
    return result if isinstance(result, (list, tuple)) else [result]


@pytest.mark.parametrize("tokens", [7, 256])
def test_under_the_fixed_rule_bits_move_with_the_threads_only_where_eagers_do(tokens):
    def run(function, threads):
        torch.set_num_threads(threads)
        g = torch.Generator().manual_seed(4)
        x, w = (torch.randn(*s, generator=g).requires_grad_() for s in ((4, tokens, 384), (1536, 384)))
        y = function(x, w)
        return [y.detach(), *torch.autograd.grad(y, (x, w), torch.cos(y.detach()))]

    eager = lambda x, w: torch.nn.functional.linear(torch.nn.functional.layer_norm(x, (384,), eps=1e-6), w)  # noqa: E731
    ours = lambda x, w: zb.layer_norm_modulate_linear(x, None, None, w)  # noqa: E731
    compared = 0
    with _plan.use("fixed"):
        for e1, e2, o1, o2 in zip(*(run(f, n) for f in (eager, ours) for n in (1, 2)), strict=True):
            if torch.equal(e1, e2):
                compared += 1
                testing.assert_bitwise_equal(o1, o2)
    assert compared, "eager's own bits move everywhere: nothing was compared"
