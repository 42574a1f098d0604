"""Planted mistakes: what is dead, symmetric, or only not seen, and that a wrong prediction shows."""

import json

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.doctor.explain import explain
from zeroblock.doctor.kinds import finite
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


class UnusedGates(nn.Module):
    """Zero-initialised gates that a later version of the forward no longer calls."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(8, 3)
        self.gates = nn.ModuleList(eager.zero_module(nn.Linear(8, 8, bias=False)) for _ in range(2))

    def forward(self, x):
        return self.used(x)


class LastContext(nn.Module):
    """Queries of a context whose output the last block drops: a gradient comes, of zeros, whatever the weights are."""

    def __init__(self):
        super().__init__()
        self.q, self.context_q = nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        q = torch.cat([self.q(x), self.context_q(x)])
        h = torch.softmax(q @ q.detach().t(), -1) @ q.detach()
        return self.out(h[: len(x)])


class WaitsThroughASum(nn.Module):
    """The gradient of `first` is a sum: one term waits for the zero tail, the other is zero for ever."""

    def __init__(self):
        super().__init__()
        self.first, self.tail = eager.zero_module(nn.Linear(8, 8)), eager.zero_module(nn.Linear(8, 3))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        h = x + self.first(x)
        return self.tail(h) + self.last(h * torch.zeros_like(h)) + self.last(x)


def unused_gates():
    return UnusedGates(), cases.token_batch()


def advice(d):
    return " ".join(d.explanation)


def test_unused_gates_are_said_and_no_value_is_advised():
    d = zb.doctor(UnusedGates(), cases.token_batch())
    assert [p.name for p in d.of_kind("unused")] == ["gates.0.weight", "gates.1.weight"] and d.exit_status == 0
    assert d.verdict == "nothing is dead or symmetric, but 2 parameters are unused" == str(d).splitlines()[-1]
    assert "gates.0.weight, gates.1.weight are unused" in advice(d) and "2 of them are exactly zero" in advice(d)
    assert "find_unused_parameters=True" in advice(d) and "another value" not in advice(d)
    assert "nothing is dead or symmetric, but" in d.to_html()


def test_what_the_structure_drops_is_told_to_freeze():
    d = zb.doctor(LastContext(), cases.token_batch())
    dead = d.of_kind("dead")
    assert [p.name for p in dead] == ["context_q.weight", "context_q.bias"] and all(not p.holder for p in dead)
    assert "requires_grad_(False)" in advice(d) and "another value" not in advice(d)


def test_two_that_hold_each_other_are_told_to_change():
    d = zb.doctor(*cases.two_zero_layers())
    assert "give one of them another value" in advice(d) and "requires_grad_(False)" not in advice(d)


def test_a_term_that_is_always_zero_is_not_what_is_waited_for():
    d = zb.doctor(WaitsThroughASum(), cases.token_batch())
    assert d["first.weight"].kind == "waits" and d["first.weight"].holder == ["tail.weight"]
    assert "after tail.weight, which held" in advice(d)


def test_no_sentence_without_its_name():
    """A zero that no parameter holds: the sentence about what is waited for is left out."""
    d = zb.doctor(WaitsThroughASum(), cases.token_batch())
    for p in d.parameters:
        p.waits_for = [[] for _ in p.waits_for]
    text = " ".join(explain(d))
    assert "gets its first gradient in step 2." in text and "after ," not in text and "()" not in text


def plain(value):
    """Whether a value is made of JSON's containers and numbers alone."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v) for k, v in value.items())
    return all(map(plain, value)) if isinstance(value, list | tuple) else isinstance(value, str | int | float | None)


KEYS = "schema healthy alarms unused not_seen mismatches model steps losses parameters predicted_steps near_zero "
KEYS += "expected_zero savings findings explanation"


@pytest.mark.parametrize(
    "build", [cases.two_zero_layers, cases.constant_hidden, cases.dead_by_value, cases.unet, unused_gates]
)
def test_programs_read_the_dict_by_its_keys(build):
    d = zb.doctor(*build(), steps=2)
    found = d.to_dict()
    assert set(found) == set(KEYS.split()) and found["schema"] == 1 and plain(found)
    assert found["healthy"] is d.healthy is (found["alarms"] == [])
    assert found["alarms"] == [p.name for p in d.parameters if p.kind in ("dead", "symmetric")]
    assert found["unused"] == [p.name for p in d.parameters if p.kind == "unused"]
    if d.healthy:
        words = json.dumps(finite({**found, "parameters": [p["kind"] for p in found["parameters"]]}))
        assert "dead" not in words and "symmetric" not in words
