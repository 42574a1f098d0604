"""diffusers' ControlNets, accelerated, against themselves: the whole control branch is not run while it is zero."""

from __future__ import annotations

import fnmatch

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.convert.families import known

from .model_cases import Case, accelerated, infer, normal, outputs, prepared, three_tests
from .test_diffusers_models import CONDITIONED, MODELS, UNET, Controlled, conditions, diffusers, flux_inputs

_NET = {**UNET, "down_block_types": CONDITIONED["down_block_types"], "cross_attention_dim": 12}
del _NET["sample_size"]


def _image_inputs(g):
    return {"sample": normal(g, 2, 4, 8, 8), "controlnet_cond": normal(g, 2, 3, 16, 16), **conditions(g)}


def _union():
    return diffusers.ControlNetUnionModel(
        **_NET,
        conditioning_embedding_out_channels=(4, 8),
        addition_time_embed_dim=4,
        num_control_type=2,
        num_trans_channel=8,
        num_trans_head=2,
        num_proj_channel=8,
    )


def _union_inputs(g, controls=1):
    image = _image_inputs(g)
    images = tuple(image["controlnet_cond"] + i for i in range(controls))
    types = {"control_type": torch.tensor([[1, controls - 1]] * 2), "control_type_idx": tuple(range(controls))}
    return image | types | {"controlnet_cond": images}


def _sparse():
    types = ("CrossAttnDownBlockMotion", "DownBlockMotion")
    return diffusers.SparseControlNetModel(
        **(_NET | {"down_block_types": types}), motion_num_attention_heads=2, motion_max_seq_length=4
    )


def _sparse_inputs(g):
    video = {"sample": normal(g, 2, 4, 3, 8, 8), "controlnet_cond": normal(g, 2, 4, 3, 8, 8)}
    mask = {"conditioning_mask": torch.ones(2, 1, 3, 8, 8)}
    return video | mask | conditions(g) | {"encoder_hidden_states": normal(g, 6, 3, 12)}


def _sd3():
    return diffusers.SD3ControlNetModel(
        sample_size=4,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=4,
    )


def _flux():
    return diffusers.FluxControlNetModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=[4, 4, 8],
    )


def _xs(**options):
    return diffusers.UNetControlNetXSModel(
        sample_size=8,
        down_block_types=CONDITIONED["down_block_types"],
        block_out_channels=(8, 16),
        norm_num_groups=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        num_attention_heads=2,
        ctrl_conditioning_embedding_out_channels=(4, 8),
        ctrl_block_out_channels=(4, 8),
        ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=4,
        **options,
    )


_ZERO = (("controlnet_*_block*", 0, 1), ("controlnet_blocks*", 0, 1))
NETS = {
    "union": Case(_union, _union_inputs, _ZERO, {"ZeroLayer": 5}, {"ControlNetModel": 1}),
    "sparse": Case(_sparse, _sparse_inputs, _ZERO, {"ZeroLayer": 5}, {"ControlNetModel": 1}),
    "sd3": Case(
        _sd3,
        lambda g: {
            "hidden_states": normal(g, 2, 4, 4, 4),
            "controlnet_cond": normal(g, 2, 4, 4, 4),
            "encoder_hidden_states": normal(g, 2, 3, 12),
            "pooled_projections": normal(g, 2, 10),
            "timestep": torch.tensor([1, 2]),
        },
        _ZERO,
        {"ZeroLayer": 2},
        {"ControlNetModel": 1},
    ),
    "flux": Case(
        _flux,
        lambda g: {**flux_inputs(g), "controlnet_cond": normal(g, 2, 4, 4)},
        _ZERO,
        {"ZeroLayer": 3},
        {"ControlNetModel": 1},
    ),
    "xs": Case(
        _xs,
        _image_inputs,
        (("*ctrl_to_base*", 0, 1), ("control_to_base_for_conv_in*", 0, 1)),
        {"ZeroLayer": 13},
        {"UNetControlNetXSModel": 1},
    ),
}


test_gradients, test_inference, test_ten_steps = three_tests(NETS, together=True, slow=True)


@pytest.mark.parametrize("scaled", [False, True], ids=["zero layers", "scale 0"])
@pytest.mark.parametrize("name", NETS)
def test_nothing_of_the_control_branch_runs(name, scaled):
    """From the second call of a kind on: it could be NaN, and what comes back is what the untouched model returns."""
    case = NETS[name]
    (family,) = case.inferred
    model = prepared(case, "dense" if scaled else "zero").eval()
    inputs = case.inputs(torch.Generator().manual_seed(1)) | ({"conditioning_scale": 0.0} if scaled else {})
    ours, _ = accelerated(model)
    expected, first = model(**inputs), infer(ours, inputs)
    for n, p in ours.named_parameters():
        held = any(fnmatch.fnmatch(n, pattern) for pattern, *_ in case.zero)
        if not held and (name != "xs" or "ctrl" in n or "cond_embedding" in n):
            p.data.fill_(float("nan"))
    testing.reset_counters()
    with torch.no_grad():
        got = ours(**inputs)
    assert testing.counters()[family] == (0, 1) and (name == "xs" or len(testing.counters()) == 1)
    assert type(got) is type(expected) and got.keys() == expected.keys()
    for a, b, c in zip(outputs(got), outputs(expected), first.values(), strict=True):
        assert torch.equal(a, c) and a.dtype == b.dtype and a.stride() == b.stride()
        assert name == "xs" or torch.equal(a, b)


def test_two_controls_that_are_not_scaled_are_not_skipped_for_their_scale():
    """ControlNetUnionModel scales the conditions then, not the results."""
    model = prepared(NETS["union"], "dense").eval()
    ours, _ = accelerated(model)
    inputs = _union_inputs(torch.Generator().manual_seed(1), controls=2) | {"conditioning_scale": [0.0, 0.0]}
    for _ in range(3):
        for a, b in zip(infer(ours, inputs).values(), infer(model, inputs).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert b.any()


def test_a_control_that_mixes_the_time_embedding_is_not_skipped():
    """Then the U-Net needs it even where all zero convolutions are zero."""
    options = {"ctrl_learn_time_embedding": True, "time_embedding_mix": 0.5}
    case = NETS["xs"]._replace(build=lambda: _xs(**options))
    model = prepared(case, "zero").eval()
    ours, _ = accelerated(model)
    inputs = case.inputs(torch.Generator().manual_seed(1))
    for _ in range(3):
        a, b = infer(ours, inputs)["y0"], infer(model, inputs)["y0"]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_parts_of_a_control_network_are_reported():
    adapter = diffusers.ControlNetXSAdapter.from_unet(Controlled().unet, size_ratio=0.5, num_attention_heads=2)
    (row,) = [b for b in zb.accelerate(adapter).left_alone if b.path == ""]
    assert "accelerate the UNetControlNetXSModel made of it" in row.reason


def _skipped(model, **inputs):
    """The second call: the first of a kind may be compared with eager's."""
    with torch.no_grad():
        model(**inputs)
    testing.reset_counters()
    with torch.no_grad():
        result = outputs(model(**inputs))
    return result, testing.counters().get("ControlNetModel", (0, 0))


def _control(phase, **options):
    case = MODELS["unet-controlnet"]._replace(build=lambda: Controlled(**options).control, zero=(("*", 0, 1),))
    model = prepared(case, phase).eval()
    g = torch.Generator().manual_seed(1)
    return model, {"sample": normal(g, 2, 4, 10, 6), "controlnet_cond": normal(g, 2, 3, 20, 12), **conditions(g)}


@pytest.mark.parametrize(
    "options", [{}, {"guess_mode": True}, {"conditioning_scale": 0.5}, {"return_dict": True}], ids=str
)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    "padding, layout", [(0, torch.contiguous_format), (1, torch.contiguous_format), (1, torch.channels_last)]
)
def test_controlnet_of_zero_convolutions_is_its_biases(options, pooled, padding, layout):
    model, inputs = _control("dense", downsample_padding=padding)
    model.to(memory_format=layout)
    model.register_to_config(global_pool_conditions=pooled)
    for conv in (*model.controlnet_down_blocks, model.controlnet_mid_block):
        nn.init.zeros_(conv.weight)
        if pooled:  # the mean of equal numbers is rounded
            nn.init.zeros_(conv.bias)
    ours, _ = accelerated(model)
    got, counts = _skipped(ours, **inputs, **options)
    assert counts == (0, 1) and "ResnetBlock2D" not in testing.counters()
    expected = outputs(model(**inputs, **options))
    assert type(ours(**inputs, **options)) is type(model(**inputs, **options))
    for a, b in zip(got, expected, strict=True):
        testing.assert_error_budget(a, b.detach(), b.detach().double())
        assert a.stride() == b.stride()


def test_controlnet_scaled_by_zero_is_not_run():
    model, inputs = _control("dense")
    ours, _ = accelerated(model)
    got, counts = _skipped(ours, **inputs, conditioning_scale=0)
    expected, _ = _skipped(model, **inputs, conditioning_scale=0)
    assert counts == (0, 1) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert _skipped(ours, **inputs)[1] == (1, 0)
    assert _skipped(ours, **inputs, conditioning_scale=torch.tensor(0.0))[1] == (1, 0)  # a tensor is not read


def test_controlnet_runs_when_somebody_watches_or_learns():
    model, inputs = _control("zero")
    ours, _ = accelerated(model)
    assert _skipped(ours, **inputs)[1] == (0, 1)
    testing.reset_counters()
    ours(**inputs)
    assert "ControlNetModel" not in testing.counters()
    seen = []
    handle = ours.mid_block.register_forward_hook(lambda *_: seen.append(1))
    assert _skipped(ours, **inputs)[1] == (0, 0) and seen == [1, 1]
    handle.remove()
    nn.init.constant_(ours.controlnet_mid_block.weight, 1e-3)
    assert _skipped(ours, **inputs)[1] == (1, 0)
    never, _ = accelerated(model, zero_skip="never")
    assert _skipped(never, **inputs)[1] == (0, 0)


def test_controlnet_with_another_forward_is_left_alone():
    class Louder(diffusers.ControlNetModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model, _ = _control("zero")
    model.__class__ = Louder
    rows = [b for b in accelerated(model)[1].left_alone if b.path == ""]
    assert [b.reason for b in rows] == ["its forward is not diffusers' own"]


def test_a_controlnet_that_returns_something_else_is_not_skipped(monkeypatch):
    family = known()["ControlNetModel"]
    original = family._results
    monkeypatch.setattr(family, "_results", lambda *args: [t + 1e-6 for t in original(*args)])
    model, inputs = _control("zero")
    ours, _ = accelerated(model)
    got, _ = _skipped(ours, **inputs)
    assert testing.counters()["ResnetBlock2D"] == (0, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, outputs(model(**inputs)), strict=True))
