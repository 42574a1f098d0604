"""Diagnoses of real architectures (models: cases.py), and what the fast path saves of them."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

import zeroblock as zb
import zeroblock.testing
from zeroblock.doctor.examine import random_target_loss
from zeroblock.testing import eager
from zeroblock.tools import models

from . import cases


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def steps_of(diagnosis):
    """{parameter: measured}, after checking that the prediction says the same of every one."""
    assert diagnosis.mismatches == [] and diagnosis.findings == []
    for p in diagnosis.parameters:
        assert p.measured == p.predicted, p
    return {p.name: p.measured for p in diagnosis.parameters}


# ---- healthy architectures: the exact first-motion step of every parameter -----------------------------------------


def test_guided_unet():
    model, batch = cases.unet()
    d = zb.doctor(model, batch)
    steps = steps_of(d)
    assert d.healthy and d.exit_status == 0
    assert {n for n, s in steps.items() if s == 1} == {"out.2.weight", "out.2.bias"}
    for name, step in steps.items():
        last = name.split(".")[-2:] in (["3", "weight"], ["3", "bias"]) and "out_layers" in name
        second = last or "proj_out" in name or "skip_connection" in name or name.startswith(("out.0", "input_blocks.0"))
        assert step == (1 if name.startswith("out.2") else 2 if second else 3), name
    assert d["out.2.weight"].kind == "zero tail"
    conv2 = d["middle_block.0.out_layers.3.weight"]
    assert (conv2.kind, conv2.role, conv2.holder) == ("waits", "tail", ["out.2.weight"])
    assert d["middle_block.0.in_layers.2.weight"].holder == ["middle_block.0.out_layers.3.weight"]
    assert len(d.savings.branches) == len(model.zero_tails())
    assert {b.parameters[0] for b in d.savings.branches if b.steps == 1} == {"out.2.weight"}
    assert "out.2.weight is zero and learns all the same" in d.explanation[0]


@pytest.mark.parametrize("blocks", [eager, zb.nn], ids=["eager", "zeroblock"])
def test_dit(blocks):
    _, batch = cases.dit()
    d = zb.doctor(models.DiT(blocks, hidden_size=48, depth=2, num_heads=2), batch)
    steps = steps_of(d)
    assert d.healthy
    second = ("blocks.0.adaLN", "blocks.1.adaLN", "final_layer.adaLN", "x_embedder")
    for name, step in steps.items():
        assert step == (1 if name.startswith("final_layer.linear") else 2 if name.startswith(second) else 3), name
    assert d["blocks.0.adaLN_modulation.1.weight"].role == "gate"
    assert d["blocks.1.attn.qkv.weight"].holder == ["blocks.1.adaLN_modulation.1.weight"]
    gates = {b.parameters[0] for b in d.savings.branches if b.by == "gate"}
    assert gates == {"blocks.0.adaLN_modulation.1.weight", "blocks.1.adaLN_modulation.1.weight"}


def test_fixup():
    steps = steps_of(zb.doctor(*cases.fixup()))
    assert {n for n, s in steps.items() if s == 1} == {"fc.weight", "fc.bias"}
    for i in range(3):
        block = f"layers.{i}."
        assert steps[block + "conv2.weight"] == steps[block + "bias2b"] == 2
        assert steps[block + "scale"] == steps[block + "conv1.weight"] == steps[block + "bias2a"] == 3


def test_rezero():
    d = zb.doctor(*cases.rezero())
    steps = steps_of(d)
    assert d["1.resweight"].kind == d["2.resweight"].kind == "zero gate"
    assert {n for n, s in steps.items() if s == 2} == {n for n in steps if ".body." in n}


def test_edm_with_negative_zeros():
    model, batch = cases.edm(0.0)
    assert torch.signbit(model.block0.conv1.weight).any()
    d = zb.doctor(model, batch)
    steps = steps_of(d)
    assert {n for n, s in steps.items() if s == 1} == {"out_conv.weight", "out_conv.bias"}
    for block in ("block0", "block1"):
        assert steps[f"{block}.conv1.weight"] == 2 and steps[f"{block}.conv0.weight"] == 3
        assert steps[f"{block}.affine.weight"] == 3
    assert len(d.savings.branches) == 3 and d.near_zero == []


@pytest.mark.parametrize("init", [1e-5, 1e-10], ids=["songunet", "score_sde"])
def test_near_misses_are_not_zero(init):
    d = zb.doctor(*cases.edm(init))
    assert set(steps_of(d).values()) == {1}
    assert {p.name for p in d.near_zero} == {"block0.conv1.weight", "block1.conv1.weight", "out_conv.weight"}
    assert (
        d.savings.branches == []
        and "would skip nothing" in str(d)
        and "Near misses" in str(d)
        and "Near misses" in d.to_html()
    )


def test_controlnet():
    d = zb.doctor(*cases.controlnet())
    assert d.mismatches == [] and d.healthy
    first = {p.name: p.measured for p in d.parameters if not p.name.startswith(("encoder", "decoder"))}
    assert {n for n, s in first.items() if s == 1} == {n for n in first if n.startswith("zero_convs")}
    assert {n for n, s in first.items() if s == 2} == {n for n in first if n.startswith(("copy", "hint.2"))}
    assert {n for n, s in first.items() if s == 3} == {n for n in first if n.startswith("hint.0")}
    assert d["hint.0.weight"].waits_for[-1] == ["hint.2.weight"]


def test_lora():
    model, batch = cases.lora()
    d = zb.doctor(model, batch)
    assert d.mismatches == [] and d.healthy
    for layer in ("0", "2"):
        assert d[f"{layer}.lora_B.weight"].kind == "zero tail" and d[f"{layer}.lora_B.weight"].measured == 1
        assert d[f"{layer}.lora_A.weight"].measured == 2
        assert d[f"{layer}.lora_A.weight"].holder == [f"{layer}.lora_B.weight"]
    assert len(d.savings.branches) == 2


def test_only_some_rows_zero():
    """Zero gate rows in an otherwise random modulation: the prediction follows zeros inside a parameter."""
    model, batch = cases.dit()
    for block in model.blocks:
        linear = block.adaLN_modulation[1]
        nn.init.normal_(linear.weight, std=0.1)
        for row in (2, 5):
            linear.weight.data.chunk(6)[row].zero_()
    steps = steps_of(zb.doctor(model, batch))
    # The other rows are random, and still nothing behind a gate moves before its rows do.
    assert steps["blocks.0.adaLN_modulation.1.weight"] == 2 and steps["blocks.0.mlp.fc1.weight"] == 3


def test_longer_chains_than_steps():
    """Each zero gate waits for the one outside it; what is predicted beyond the steps taken is no mismatch."""
    model = nn.Linear(8, 8)
    for _ in range(4):
        model = cases.GatedBranch(model, 0.0)
    model = nn.Sequential(nn.Linear(8, 8), model)
    d = zb.doctor(model, cases.token_batch(), steps=2)
    gates = {p.name: p for p in d.parameters if p.role == "gate"}
    assert [p.predicted for p in gates.values()] == [1, 2, 3, 4]
    assert [p.measured for p in gates.values()] == [1, 2, None, None]
    assert d["1.gate"].kind == "zero gate" and d["1.body.body.gate"].kind == "waits"
    assert d["1.body.body.gate"].holder == ["1.body.gate"]
    assert d["1.body.body.body.body.weight"].predicted == 5 and d["1.body.body.body.body.weight"].kind == "waits"
    assert d.healthy and d.mismatches == [] and zb.doctor(model, cases.token_batch(), steps=5).predicted_steps == 5


def test_branches_are_those_that_zeroblock_skips():
    """The branches the doctor names against the counters of the blocks that run."""
    model, batch = models.UNet(zb.nn, model_channels=32, channel_mult=(1, 2), num_heads=2), cases.diffusion_batch()
    holders = {name for b in zb.doctor(model, batch).savings.branches for name in b.parameters}
    zb.testing.reset_counters()
    with torch.no_grad():
        model(*batch)
    executed, skipped = zb.testing.counters()["ResBlock"]
    assert executed == 0 and skipped == sum("out_layers" in name for name in holders) > 5
    # The others are the attention blocks' projections and the output conv, which are plain modules.
    assert len(holders) == skipped + sum("proj_out" in name for name in holders) + 1


# ---- savings -------------------------------------------------------------------------------------------------------


def test_savings_of_one_block():
    """ResBlock without a skip conv: both convs alike, so inference saves both, training 4 of 6 parts."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = eager.ResBlock(32, 16, 0.0)

        def forward(self, x, emb):
            return self.block(x, emb)

    batch = (torch.randn(2, 32, 8, 8).requires_grad_(), torch.randn(2, 16))
    s = zb.doctor(One(), batch).savings
    conv = 2 * 9 * 2 * 64 * 32 * 32
    linear = 2 * 2 * 16 * 32
    assert s.inference_flops == 2 * conv + linear and s.inference_saved == s.inference_flops
    assert s.training_saved == 4 * conv + linear  # conv2 and its dx, conv1's dx and dW, the embedding's dW
    (branch,) = s.branches
    assert branch.parameters == ["block.out_layers.3.weight"] and branch.steps == 1
    assert 0 < s.activation_saved < s.activation_bytes


def test_a_dense_model_saves_nothing():
    d = zb.doctor(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), cases.token_batch())
    s = d.savings
    assert (s.inference_saved, s.training_saved, s.activation_saved, s.branches) == (0, 0, 0, [])
    assert s.inference_flops == 2 * 16 * (64 + 24) and s.activation_bytes > 0
    assert Counter(p.kind for p in d.parameters) == {"free": 4}
    assert all(math.isfinite(loss) for loss in d.losses)


def test_own_loss_and_factory():
    def factory():
        return nn.Sequential(nn.Linear(8, 4), eager.zero_module(nn.Linear(4, 2))), torch.randn(5, 8), sum_loss

    def sum_loss(model, batch):
        return model(batch).sum()

    d = zb.doctor(factory, steps=2)
    # With this loss dL/dy is the same for every output: the zero rows stay alike for ever.
    assert d["1.weight"].kind == "symmetric" and d["1.weight"].ranks.dy == (1, 2)
    assert zb.doctor(factory, steps=2, loss=lambda m, b: random_target_loss(m, b)).healthy
