"""Rule 2 of the zero contract: the values decide, at that call, whoever wrote them and however."""

import multiprocessing

import pytest
import torch

import zeroblock as zb
from zeroblock.testing import counters, reset_counters

from ..twins import random_like, run
from .cases import CASES, TAILED, conv_branch, image, was_skipped


def skips(module, *inputs):
    return was_skipped(type(module).__name__, lambda: module(*inputs))


def fused(optimizer, **kwargs):
    def step(weight):
        weight.grad = torch.ones_like(weight)
        optimizer([weight], lr=0.1, fused=True, **kwargs).step()

    return step


def through_numpy(weight):
    weight.detach().numpy()[...] = 0.5


def through_other_process(weight):
    weight.share_memory_()
    process = multiprocessing.get_context("fork").Process(target=lambda: weight.data.view(-1)[-1:].fill_(0.5))
    process.start()
    process.join(60)
    assert process.exitcode == 0


SILENT_WRITES = {
    "fused SGD": fused(torch.optim.SGD),
    "fused Adam": fused(torch.optim.Adam),
    "fused AdamW": fused(torch.optim.AdamW),
    ".data fill": lambda w: w.data.fill_(0.5),
    ".data last element": lambda w: w.data.view(-1)[-1:].fill_(0.5),
    ".data copy": lambda w: w.data.copy_(torch.ones_like(w)),
    "foreach on .data": lambda w: torch._foreach_add_([w.data], 0.5),
    "numpy": through_numpy,
    "another process": through_other_process,
}


@pytest.mark.parametrize("write", SILENT_WRITES)
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_silent_write_is_seen_at_the_next_call(write, grad):
    """None of these writes bumps `_version`: only the values tell."""
    branch = conv_branch()
    x = image()
    with torch.set_grad_enabled(grad):
        assert skips(branch, x)
        version = branch.tail.weight._version
        SILENT_WRITES[write](branch.tail.weight)
        assert branch.tail.weight._version == version
        assert not skips(branch, x)
        assert torch.equal(branch(x), x + branch.tail(branch.body(x)))
        branch.tail.weight.data.zero_()
        assert skips(branch, x)


@pytest.mark.parametrize("name", CASES)
def test_one_nonzero_element_makes_the_block_dense(name):
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = case.example()
    for module in (ours, theirs):
        weight = case.weight(module).data
        for row in case.rows or (None,):
            rows = weight if row is None else weight.chunk(6)[row]
            rows.view(-1)[-1] = 0.75
    expected = run(theirs, inputs)[1]
    got = {}
    assert not was_skipped(case.counter, lambda: got.update(run(ours, inputs)[1]))
    assert {n for n, g in got.items() if g.any()} == {n for n, g in expected.items() if g.any()}


@pytest.mark.parametrize("op", ["conv_residual", "linear_gate_residual"])
def test_op_sees_a_silent_write(op):
    torch.manual_seed(0)
    if op == "conv_residual":
        w, arguments = torch.zeros(4, 4, 3, 3), (torch.randn(1, 4, 5, 5), None, torch.randn(1, 4, 5, 5))
        call = lambda: zb.conv_residual(arguments[0], w, *arguments[1:])  # noqa: E731
    else:
        w, arguments = torch.zeros(4, 4), (torch.randn(1, 5, 4), None, torch.randn(4), torch.randn(1, 5, 4))
        call = lambda: zb.linear_gate_residual(arguments[0], w, *arguments[1:])  # noqa: E731
    assert was_skipped(op, call) and torch.equal(call(), arguments[-1])
    w.data.fill_(0.5)
    assert not was_skipped(op, call) and not torch.equal(call(), arguments[-1])


@pytest.mark.parametrize("name", CASES)
def test_bumped_write_before_backward_raises(name):
    case = CASES[name]
    for module in case.pair():
        y = module(*case.example())
        with torch.no_grad():
            case.weight(module).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("name", TAILED)
def test_silent_write_before_backward_keeps_the_verdict(name):
    """Backward is that of the forward that ran: everything upstream stays exactly zero."""
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = case.example()
    expected = run(theirs, inputs)[1]
    y = ours(*inputs)
    case.weight(ours).data.fill_(1.0)
    y.backward(random_like(y))
    got = {f"input {i}": t.grad for i, t in enumerate(inputs)} | {n: p.grad for n, p in ours.named_parameters()}
    for key, g in expected.items():
        assert torch.equal(got[key], g) if not g.any() or key.startswith("input") else got[key].any()


def test_policies():
    branch = conv_branch()
    branch.zero_skip = "never"
    reset_counters()
    branch(image())
    assert counters().get("ResidualBranch", (0, 0))[1] == 0
    branch.zero_skip = "sync"
    assert skips(branch, image())
    branch.zero_skip = "sometimes"
    with pytest.raises(ValueError, match="zero_skip"):
        branch(image())
