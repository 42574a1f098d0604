"""Planted mistakes: what is dead, symmetric, or only not seen, and that a wrong prediction shows."""

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import eager

from . import cases


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


DEAD = {
    "two_zero_layers": (cases.two_zero_layers, {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight"}),
    "zero_hidden_relu": (cases.zero_hidden_relu, {"0.weight", "0.bias", "2.weight"}),
    "all_zero_tanh": (lambda: cases.all_zero(nn.Tanh()), {"0.weight", "0.bias", "2.weight"}),
    "all_zero_relu": (lambda: cases.all_zero(nn.ReLU()), {"0.weight", "0.bias", "2.weight"}),
    "behind_zero_gate": (
        cases.zero_conv_behind_zero_gate,
        {"1.gate", "1.body.0.weight", "1.body.0.bias", "1.body.2.weight", "1.body.2.bias"},
    ),
    "dead_inputs": (cases.zero_conv_with_dead_inputs, {"1.body.0.weight", "1.body.2.weight"}),
}


@pytest.mark.parametrize("case", DEAD)
def test_dead(case):
    build, expected = DEAD[case]
    d = zb.doctor(*build())
    assert {p.name for p in d.of_kind("dead")} == expected
    assert all(p.proved and p.measured is None for p in d.of_kind("dead"))
    assert d.exit_status == 1 and d.mismatches == [] and not d.of_kind("symmetric")
    dead = next(p for p in d.of_kind("dead") if p.ranks and p.ranks.h)
    assert 0 in (dead.ranks.h[0], dead.ranks.dy[0])
    assert any("never move" in text and "rank 0 of" in text for text in d.explanation)


def test_dead_pair_names_its_other_half():
    d = zb.doctor(*cases.two_zero_layers())
    assert d["2.weight"].holder == ["3.weight"]
    assert d["3.weight"].holder == ["2.weight"]


def test_symmetric():
    d = zb.doctor(*cases.constant_hidden())
    assert {p.name for p in d.of_kind("symmetric")} == {"0.weight", "0.bias"}
    assert d["2.weight"].kind == "constant" and d.exit_status == 1
    assert d["0.weight"].ranks.grad == (1, 8) and d["0.weight"].ranks.unit_differences == (0, 8)
    assert any("The 16 units of 0.weight" in text for text in d.explanation)


def test_all_zero_with_sigmoid_is_symmetric_not_dead():
    d = zb.doctor(*cases.all_zero(nn.Sigmoid()))
    assert {p.name for p in d.of_kind("symmetric")} == {"0.weight", "0.bias"}
    assert d["2.weight"].kind == "zero tail" and d["0.weight"].measured == 2 and not d.of_kind("dead")


def test_constant_but_asymmetric():
    """A constant layer under a random one gets different gradients in each unit."""
    model = nn.Sequential(cases.constant(nn.Linear(8, 16), 0.1), nn.Tanh(), nn.Linear(16, 3))
    d = zb.doctor(model, cases.token_batch())
    assert d["0.weight"].kind == "constant" and d["0.weight"].ranks.grad[0] == 3 and d.healthy


def test_what_is_not_proved_is_not_called_dead():
    d = zb.doctor(*cases.dead_by_value(), steps=3)
    p = d["zero.weight"]
    assert p.kind == "not seen" and not p.proved and not p.agrees and d.exit_status == 0
    assert d.findings == ["MISMATCH zero.weight: first motion predicted in step 1, measured not seen in 3 steps"]
    assert "MISMATCH" in str(d) and "no proof" in " ".join(d.explanation) and p.ranks.h[0] == 0


def test_unused_and_frozen_are_no_alarm():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 3), nn.Linear(8, 3)
            self.frozen = eager.zero_module(nn.Linear(8, 3)).requires_grad_(False)

        def forward(self, x):
            return self.used(x) + self.frozen(x)

    d = zb.doctor(Unused(), cases.token_batch())
    assert {p.name for p in d.of_kind("unused")} == {"unused.weight", "unused.bias"}
    assert {p.name for p in d.of_kind("frozen")} == {"frozen.weight", "frozen.bias"} and d.healthy
    assert [b.steps for b in d.savings.branches] == [None]


def test_a_frozen_zero_tail_kills_its_body():
    model, batch = cases.lora()
    model[0].lora_B.requires_grad_(False)
    d = zb.doctor(model, batch)
    assert {p.name for p in d.of_kind("dead")} == {"0.lora_A.weight"}
    assert d["0.lora_A.weight"].holder == ["0.lora_B.weight"]


def test_a_wrong_prediction_is_a_finding(monkeypatch):
    """The two are independent: a prediction that ignores the zeros disagrees with what is measured."""
    from zeroblock.doctor import examine

    real = examine.predict

    def careless(tape, trainable):
        tape.leaves = dict.fromkeys(tape.leaves, True)
        return real(tape, trainable)

    monkeypatch.setattr(examine, "predict", careless)
    d = zb.doctor(*cases.fixup())
    assert len(d.mismatches) > 10 and len(d.findings) == len(d.mismatches)
    assert {p.predicted for p in d.mismatches} == {1}


def test_stochastic_depth_is_no_mismatch():
    class Drop(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            keep = torch.empty(1).bernoulli_(1e-6)  # practically always dropped
            return self.out(x + keep * self.body(x))

    d = zb.doctor(Drop(), cases.token_batch())
    assert d["body.weight"].measured is None and d["body.weight"].predicted == 1
    assert d.mismatches == [] and d.healthy
