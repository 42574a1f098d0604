"""Gates in the zero contract: every shape, per sample, zero gate or zero weight, whatever is frozen."""

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import assert_bitwise_equal, assert_error_budget, counters, eager, reset_counters

from ..twins import run
from .cases import CASES, conv_body, image, linear_body, matmuls, was_skipped, zeroed


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gate_per_sample(kind):
    """One sample's zero gate decides nothing; all of them skip."""
    torch.manual_seed(0)
    tail = nn.Linear(16, 16) if kind == "linear" else nn.Conv2d(32, 32, 1)
    body, x = (nn.Linear(16, 16), torch.randn(2, 5, 16)) if kind == "linear" else (conv_body(), image())
    gate = torch.randn(2, x.shape[1 if kind == "conv" else 2])
    gate[0] = 0
    ours, theirs = (ns.ResidualBranch(body, tail, gate) for ns in (zb.nn, eager))
    assert not was_skipped("ResidualBranch", lambda: ours(x))
    y = ours(x)
    assert torch.equal(y[0], x[0]) and not torch.equal(y[1], x[1])
    assert torch.equal(theirs(x)[0], x[0])
    gate[1] = -0.0
    assert was_skipped("ResidualBranch", lambda: ours(x))
    assert torch.equal(ours(x), x)


def test_zero_gate_drops_a_nonzero_tail_and_bias():
    torch.manual_seed(0)
    branch = zb.nn.ResidualBranch(nn.Linear(16, 16), nn.Linear(16, 16), torch.zeros(1))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert was_skipped("ResidualBranch", lambda: branch(x)) and matmuls(lambda: branch(x)) == {}
    assert torch.equal(branch(x), x)


def test_zero_gate_rows_of_one_half_of_a_dit_block():
    """Attention's gate is zero, the mlp's is not: one half is skipped, the other runs."""
    case = CASES["DiTBlock"]
    ours, theirs = case.pair()
    for module in (ours, theirs):
        nn.init.ones_(case.weight(module).data.chunk(6)[5])
    inputs = case.example()
    with torch.no_grad():
        reset_counters()
        executed = matmuls(lambda: ours(*inputs))
        assert executed == {"gemm": 3}
        assert counters()["DiTBlock"] == (1, 1)
        expected = theirs(*inputs)
        assert_error_budget(ours(*inputs), expected, theirs.double()(*(t.double() for t in inputs)))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_bias_and_gate_survive(bias, gated):
    torch.manual_seed(0)
    gate = torch.randn(32) if gated else None
    branch = zb.nn.ResidualBranch(conv_body(), zeroed(nn.Conv2d(32, 32, 3, padding=1, bias=bias)), gate)
    if bias:
        nn.init.normal_(branch.tail.bias)
    x = image()
    x.view(-1)[::3] = -0.0
    step = torch.zeros(32) if not bias else branch.tail.bias.detach()
    expected = x + (step if gate is None else gate * step)[:, None, None]
    assert was_skipped("ResidualBranch", lambda: branch(x))
    assert torch.equal(branch(x), expected)
    if gate is None:  # -0.0 + 0.0 is +0.0; a negative gate times zero is -0.0
        assert_bitwise_equal(branch(x), expected)


GATES = {
    "linear": [(), (16,), (2, 16), (2, 5, 16)],
    "conv": [(), (32,), (2, 32)],
}


@pytest.mark.parametrize("frozen", ["nothing", "tail.weight", "tail.bias", "gate", "tail and gate"])
@pytest.mark.parametrize("zero", ["weight", "gate"])
@pytest.mark.parametrize("kind, size", [(k, size or (1,)) for k, sizes in GATES.items() for size in sizes])
def test_gradients_of_every_gate_shape(kind, size, zero, frozen):
    """In fp64, where both must agree to fp64."""

    def make(ns):
        torch.manual_seed(0)
        gate = nn.Parameter(torch.randn(size))
        body, tail = (linear_body(), nn.Linear(16, 16)) if kind == "linear" else (conv_body(), nn.Conv2d(32, 32, 1))
        nn.init.zeros_(gate if zero == "gate" else tail.weight)
        branch = ns.ResidualBranch(body, tail, gate).double()
        for name, p in branch.named_parameters():
            p.requires_grad_(not (name == frozen or (frozen == "tail and gate" and not name.startswith("body"))))
        return branch

    torch.manual_seed(1)
    x = (torch.randn(2, 5, 16) if kind == "linear" else image()).double().requires_grad_()
    ours = make(zb.nn)
    assert was_skipped("ResidualBranch", lambda: ours(x))
    y, got = run(ours, (x,))
    expected_y, expected = run(make(eager), (x,))
    assert torch.equal(y, expected_y)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_gate_from_a_module_of_the_condition():
    """The gate's own layer is upstream too: its gradient is dgate's."""

    def make(ns):
        torch.manual_seed(0)
        gate = zeroed(nn.Linear(16, 16))
        return ns.ResidualBranch(TakesCondition(), nn.Linear(16, 16), gate)

    torch.manual_seed(1)
    inputs = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 16, requires_grad=True)
    (y, got), (expected_y, expected) = run(make(zb.nn), inputs), run(make(eager), inputs)
    assert torch.equal(y, expected_y)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=name)
        assert expected[name].any() == got[name].any()


class TakesCondition(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x, c):
        return self.linear(x) * c[:, None]
