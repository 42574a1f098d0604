"""Zero by convention: what a family starts at zero, and a model of it has not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.doctor.conventions import CONVENTIONS, expected_zero
from zeroblock.testing import eager
from zeroblock.tools import models


def dit():
    torch.manual_seed(0)
    model = models.DiT(eager, hidden_size=32, depth=1, num_heads=2)
    return model, (torch.randn(2, 1, 16, 16), torch.randint(0, 1000, (2,)), torch.randint(0, 10, (2,)))


def is_zero(model):
    return {name: not p.any() for name, p in model.named_parameters()}


def test_a_fresh_model_has_its_zeros():
    diagnosis = zb.doctor(*dit(), steps=1)
    assert diagnosis.expected_zero == {} and "by convention" not in str(diagnosis)


def test_what_was_initialised_again_is_named():
    model, batch = dit()
    for m in model.modules():  # the loop that forgets
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
    diagnosis = zb.doctor(model, batch, steps=1)
    block, last = "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight"
    assert set(diagnosis.expected_zero) == {block, last, "final_layer.adaLN_modulation.1.weight"}
    assert diagnosis.expected_zero[block].startswith("DiTBlock")
    assert f"Zero by convention, but not here: {block}" in str(diagnosis)
    assert diagnosis.healthy and diagnosis.exit_status == 0  # a trained model is as well
    assert diagnosis.to_dict()["expected_zero"] == diagnosis.expected_zero


def test_namesakes_without_these_parameters_are_others():
    class FinalLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(3, 4)

    assert expected_zero(FinalLayer(), is_zero(FinalLayer())) == {}


@pytest.mark.parametrize(
    "module",
    [
        lambda: zb.nn.ResBlock(32, 16, 0.0),
        lambda: zb.nn.DiTBlock(16, 2),
        lambda: zb.nn.FinalLayer(16, 2, 3),
        lambda: zb.nn.FixupBasicBlock(4, 4),
        lambda: zb.nn.FixupBottleneck(4, 4),
    ],
)
def test_every_pattern_finds_its_parameters(module):
    fresh = module()
    assert type(fresh).__name__ in CONVENTIONS and expected_zero(fresh, is_zero(fresh)) == {}
    zeros = {name for name, zero in is_zero(fresh).items() if zero and not name.startswith("bias")}
    for p in fresh.parameters():
        nn.init.normal_(p)
    found = set(expected_zero(fresh, is_zero(fresh)))
    assert found and found <= zeros


def test_a_control_net_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = diffusers.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    )
    assert expected_zero(model, is_zero(model)) == {}
    nn.init.normal_(model.controlnet_mid_block.weight)
    assert set(expected_zero(model, is_zero(model))) == {"controlnet_mid_block.weight"}
