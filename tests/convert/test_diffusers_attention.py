"""Branches of diffusers without a gate: reported, left to diffusers, not run in inference while held at zero."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing

from .model_cases import Case, accelerated, check, drawn, infer, normal, prepared, rows, three_tests
from .test_diffusers_models import CONDITIONED, UNET, diffusers

attention = pytest.importorskip("diffusers.models.attention", reason="diffusers is not installed")
transformer = pytest.importorskip("diffusers.models.transformers.transformer_2d", reason="diffusers is not installed")

_HELD = rows("attn1.to_out.0")[:1] + rows("attn2.to_out.0")[:1] + rows("ff.net.2")[:1]


def _tokens(g):
    return {"hidden_states": normal(g, 2, 5, 16), "encoder_hidden_states": normal(g, 2, 3, 12)}


def _plain(**options):
    return lambda: attention.BasicTransformerBlock(16, 2, 8, cross_attention_dim=12, **options)


def _image(linear):
    def build():
        return transformer.Transformer2DModel(
            2, 8, in_channels=16, norm_num_groups=4, cross_attention_dim=12, use_linear_projection=linear
        )

    inputs = lambda g: {**_tokens(g), "hidden_states": normal(g, 2, 16, 4, 3)}  # noqa: E731
    return Case(build, inputs, rows("proj_out")[:1], {"ZeroLayer": 1}, {"Transformer2DModel": 1})


def _branches(norm, **options):
    return Case(_plain(norm_type=norm, **options), _tokens, _HELD, {"ZeroLayer": 3}, {"Attention": 2, "FeedForward": 1})


def _residual(**options):
    build = lambda: attention.Attention(  # noqa: E731
        16, heads=2, dim_head=8, bias=True, norm_num_groups=4, residual_connection=True, **options
    )
    inputs = lambda g: {"hidden_states": normal(g, 2, 16, 4, 3)}  # noqa: E731
    return Case(build, inputs, rows("to_out.0")[:1], {"ZeroLayer": 1}, {"Attention": 1})


CASES = {
    "layer-norm": _branches("layer_norm"),
    "layer-norm-gelu": _branches("layer_norm", activation_fn="gelu", attention_out_bias=False, ff_bias=False),
    "image-conv": _image(False),
    "image-linear": _image(True),
    "residual": _residual(),
    "residual-rescaled": _residual(rescale_output_factor=2.0**0.5),
}


test_gradients, test_inference, test_ten_steps = three_tests(CASES)


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_half_precision(name, phase):
    check(CASES[name], phase, infer, torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_the_branch_does_not_run(name):
    """From the second call on everything before the last layer could be NaN."""
    case = CASES[name]
    model = prepared(case, "zero").eval()
    ours, _ = accelerated(model)
    inputs = drawn(case, 1)
    expected = infer(model, inputs)["y0"]
    assert torch.equal(infer(ours, inputs)["y0"], expected)
    last = {n.removesuffix(".weight") for n, *_ in case.zero}
    for n, p in ours.named_parameters():
        if n.rpartition(".")[0] not in last:
            p.data.fill_(float("nan"))
    y = infer(ours, inputs)["y0"]
    assert torch.equal(y, expected) and y.stride() == expected.stride()


def _unet():
    return diffusers.UNet2DConditionModel(**CONDITIONED, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def test_every_residual_branch_of_stable_diffusion_has_a_row():
    model = _unet()
    report = zb.accelerate(model)
    rows = {b.path: (b.family, b.zero, b.backend) for b in report.branches}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert rows["down_blocks.0.attentions.0"] == ("Transformer2DModel", False, "eager")
    assert {rows[f"{block}.{name}"] for name in ("attn1", "attn2")} == {("Attention", False, "eager")}
    assert rows[f"{block}.ff"] == ("FeedForward", False, "eager")
    assert not report.left_alone
    added = {n for n, m in model.named_modules() if type(m).__name__ in ("Attention", "FeedForward", "ResnetBlock2D")}
    assert added == {path.removesuffix(".conv2") for path in rows if rows[path][0] != "Transformer2DModel"}


def test_attention_of_the_vae_has_a_row():
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    rows = {b.path: b.family for b in zb.accelerate(vae).branches}
    assert rows["encoder.mid_block.attentions.0"] == rows["decoder.mid_block.attentions.0"] == "Attention"


def test_gated_blocks_keep_their_attention_to_themselves():
    model = diffusers.DiTTransformer2DModel(2, 8, 4, num_layers=1, sample_size=4, num_embeds_ada_norm=10)
    families = [b.family for b in zb.accelerate(model).branches]
    assert families.count("BasicTransformerBlock") == 2 and not {"Attention", "FeedForward"} & set(families)


def test_other_norms_are_left_alone_with_the_reason():
    block = attention.BasicTransformerBlock(16, 2, 8, norm_type="ada_norm", num_embeds_ada_norm=4)
    report = zb.accelerate(block)
    assert [(b.path, b.reason) for b in report.left_alone] == [("", "norm_type 'ada_norm' has no gate")]
    assert [(b.path, b.family) for b in report.branches] == [("attn1", "Attention"), ("ff", "FeedForward")]


def test_a_lora_in_the_last_layer_is_not_bypassed():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    block = _plain()().eval()
    nn.init.zeros_(block.attn1.to_out[0].weight)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_out.0"]), block)
    nn.init.normal_(block.attn1.to_out[0].lora_B["default"].weight)
    ours = copy.deepcopy(block)
    report = zb.accelerate(ours)
    assert {b.path: b.zero for b in report.branches}["attn1"] is None
    inputs = _tokens(torch.Generator().manual_seed(1))
    testing.reset_counters()
    for _ in range(2):
        torch.testing.assert_close(infer(ours, inputs)["y0"], infer(block, inputs)["y0"])
    assert "Attention" not in testing.counters() or testing.counters()["Attention"][1] == 0


def test_a_fork_that_returns_something_else_is_never_skipped():
    class Attention(attention.Attention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) + 1

    Attention.__module__ = attention.Attention.__module__
    layer = Attention(16, heads=2, dim_head=8).eval()
    nn.init.zeros_(layer.to_out[0].weight)
    ours, _ = accelerated(layer)
    x = {"hidden_states": torch.randn(2, 5, 16)}
    for _ in range(3):
        assert torch.equal(infer(ours, x)["y0"], infer(layer, x)["y0"])


def test_unet_for_images_reports_its_attention():
    types = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    report = zb.accelerate(diffusers.UNet2DModel(**UNET, **types))
    assert sum(b.family == "Attention" for b in report.branches) == 4 and not report.left_alone
