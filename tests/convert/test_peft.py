"""LoRA layers of peft, accelerated, against themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing

from ..freeze.cases import needs_native
from .model_cases import Case, accelerated, infer, normal, three_tests

peft = pytest.importorskip("peft", reason="peft is not installed")


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 6)

    def forward(self, x):
        return self.linear(self.conv(x).flatten(2).transpose(1, 2))


def _lora(**options):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["conv", "linear"], **options)
    return peft.inject_adapter_in_model(config, _Net())


ZERO = tuple((f"{layer}.lora_B.default.weight", 0, 1) for layer in ("conv", "linear"))
CASES = {
    "lora": Case(_lora, lambda g: {"x": normal(g, 2, 3, 5, 4)}, ZERO, {"LoRA": 2}),
    "dropout": Case(lambda: _lora(lora_dropout=0.2), lambda g: {"x": normal(g, 2, 3, 5, 4)}, ZERO, {"LoRA": 2}),
}


test_gradients, test_inference, test_ten_steps = three_tests(CASES)


def _skips(model, x):
    testing.reset_counters()
    with torch.no_grad():
        y = model(x)
    return y, testing.counters().get("LoRA", (0, 0))


def test_zero_base_weight_under_a_dense_adapter_is_no_zero_branch():
    """A LoRA layer's `weight` is its base layer's: all zero, while the layer is not."""
    torch.manual_seed(0)
    model = _lora().eval()
    with torch.no_grad():
        model.conv.base_layer.weight.zero_()
        model.conv.lora_B.default.weight.normal_()
    ours, report = accelerated(model)
    assert [b.zero for b in report.branches if b.path.startswith("conv.lora_B")] == [False]
    x = torch.randn(2, 3, 5, 4)
    y, counts = _skips(ours, x)
    assert torch.equal(y, model(x)) and counts == (1, 1)


def test_merge_unmerge_and_disabled_adapters():
    torch.manual_seed(0)
    model = _lora().eval()
    ours, _ = accelerated(model)
    x = torch.randn(2, 3, 5, 4)
    for change, expected in (
        (lambda m: None, (0, 2)),
        (lambda m: m.conv.merge(), (0, 1)),
        (lambda m: m.conv.unmerge(), (0, 2)),
        (lambda m: m.linear.enable_adapters(False), (0, 1)),
        (lambda m: m.linear.enable_adapters(True), (0, 2)),
        (lambda m: nn.init.normal_(m.linear.lora_B.default.weight, generator=torch.Generator().manual_seed(1)), (1, 1)),
    ):
        change(model)
        change(ours)
        y, counts = _skips(ours, x)
        assert torch.equal(y, model(x)) and counts == expected


def test_variants_are_left_alone():
    report = zb.accelerate(_lora(use_dora=True))
    assert not any(b.family == "LoRA" for b in report.branches)
    assert {(b.path, b.reason) for b in report.left_alone} == {
        ("conv", "it is a variant of LoRA"),
        ("linear", "it is a variant of LoRA"),
    }


def test_second_adapter():
    torch.manual_seed(0)
    model = _lora().eval()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["linear"]), model, adapter_name="second")
    model.conv.set_adapter("default")
    model.linear.set_adapter(["default", "second"])
    nn.init.normal_(model.linear.lora_B["second"].weight)
    ours = copy.deepcopy(model)
    zb.accelerate(ours)
    x = torch.randn(2, 3, 5, 4)
    y, counts = _skips(ours, x)
    assert torch.equal(y, model(x)) and counts == (1, 2)


@pytest.mark.parametrize("known", [False, True], ids=["as any linear layer", "known as quantised"])
def test_adapter_of_a_quantised_layer(known):
    """For a model known to be quantised peft has a layer of its own, which is left to peft and reported."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    plain = _Net()
    packed = bnb.nn.Linear4bit(8, 6, quant_type="nf4", compute_dtype=torch.float32)
    packed.load_state_dict(plain.linear.state_dict())
    plain.linear, plain.is_loaded_in_4bit = packed.to("cpu"), known
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["conv", "linear"]), plain)
    nn.init.normal_(plain.linear.lora_B["default"].weight)
    ours, report = accelerated(plain)
    reason = "a LoRA layer with a forward of its own (embedding or quantised)"
    assert [(b.path, b.reason) for b in report.left_alone] == ([("linear", reason)] if known else [])
    assert len(report.branches) == 2 - known
    x = {"x": torch.randn(2, 3, 5, 4)}
    testing.assert_error_budget(infer(ours, x)["y0"], infer(plain, x)["y0"], infer(plain, x)["y0"].double())


@needs_native
def test_an_adapter_that_is_merged_while_frozen_raises():
    """peft writes the sum through `.data`, which leaves no trace but the values."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = peft.get_peft_model(layers, peft.LoraConfig(target_modules=["0", "2"], r=4))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    model.eval().requires_grad_(False)
    x = torch.randn(3, 64)
    expected = model(x)
    zb.freeze(model)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="was written while frozen"):
        model(x)
    zb.unfreeze(model)
    torch.testing.assert_close(model(x), expected)
