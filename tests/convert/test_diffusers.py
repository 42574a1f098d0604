"""The blocks of diffusers, accelerated, against themselves: forward, gradients, training; what is skipped."""

from __future__ import annotations

import pytest
import torch

import zeroblock as zb
from zeroblock.convert import proof as _proof
from zeroblock.convert.families import adaln as _transformer
from zeroblock.convert.families import diffusers_adaln, diffusers_mmdit, diffusers_resnet

from .model_cases import Case, accelerated, check, drawn, evaluate, infer, normal, prepared, rows, three_tests

resnet = pytest.importorskip("diffusers.models.resnet", reason="diffusers is not installed")
attention = pytest.importorskip("diffusers.models.attention", reason="diffusers is not installed")
normalization = pytest.importorskip("diffusers.models.normalization", reason="diffusers is not installed")
flux = pytest.importorskip("diffusers.models.transformers.transformer_flux", reason="diffusers is not installed")
motion = pytest.importorskip("diffusers.models.unets.unet_motion_model", reason="diffusers is not installed")


def _resnet(kind="ResnetBlock2D", temb=True, channels=16, spatial=False, **options):
    options = {"in_channels": channels, "groups": 4, "temb_channels": 12 if temb else None, **options}

    def inputs(g):
        shape = (2, 12, 3, 2) if spatial else (2, 12)
        return {"input_tensor": normal(g, 2, channels, 6, 4), "temb": normal(g, *shape) if temb else None}

    family = "SpatialNormResnetBlock2D" if spatial and "up" not in options else kind
    # One that is fused skips conv2 alone in training, by the op.
    return Case(
        lambda: getattr(resnet, kind)(**options), inputs, rows("conv2")[:1], {family: int(family is kind)}, {family: 1}
    )


def _tokens(g, *names, T=5, D=16, **shapes):
    given = {name: normal(g, 2, T + i, D) for i, name in enumerate(names)}
    return given | {name: normal(g, *shape) for name, shape in shapes.items()}


def _basic(**options):
    options = {"dim": 16, "num_attention_heads": 2, "attention_head_dim": 8, "attention_bias": True, **options}
    return lambda: attention.BasicTransformerBlock(**options)


def _dit(**options):
    def inputs(g):
        index = torch.tensor([1, 3])
        return _tokens(g, "hidden_states") | {"timestep": index, "class_labels": index}

    options = {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 4, "norm_elementwise_affine": False} | options
    zero = rows("norm1.linear", 2, 5, of=6)
    return Case(_basic(activation_fn="gelu-approximate", **options), inputs, zero, {"BasicTransformerBlock": 2})


def _pixart(**options):
    def inputs(g):
        return _tokens(g, "hidden_states", encoder_hidden_states=(2, 3, 10), timestep=(2, 96))

    options = {"norm_type": "ada_norm_single", "cross_attention_dim": 10, "norm_elementwise_affine": False} | options
    return Case(_basic(**options), inputs, rows("attn2.to_out.0")[:1], {}, {"BasicTransformerBlock": 1})


def _joint(**options):
    zero = rows("norm1.linear", 2, 5, of=6) + rows("norm1_context.linear", 2, 5, of=6)
    return Case(
        lambda: attention.JointTransformerBlock(16, 2, 8, **options),
        lambda g: _tokens(g, "hidden_states", "encoder_hidden_states", temb=(2, 16)),
        zero,
        {"JointTransformerBlock": 2 if options.get("context_pre_only") else 3},
    )


def _flux_tokens(g):
    return _tokens(g, "hidden_states", "encoder_hidden_states", temb=(2, 16))


BLOCKS = {
    "resnet": _resnet(),
    "resnet-scale-shift-1x1": _resnet(time_embedding_norm="scale_shift", out_channels=24, output_scale_factor=1.5),
    "resnet-no-temb": _resnet(temb=False, out_channels=8, eps=1e-5, conv_shortcut_bias=False),
    "resnet-up": _resnet(up=True, skip_time_act=True),
    "resnet-down": _resnet(down=True, time_embedding_norm="scale_shift", output_scale_factor=2.0**0.5),
    "resnet-fir-up": _resnet(up=True, kernel="fir"),
    "resnet-sde-down": _resnet(down=True, kernel="sde_vp"),
    "resnet-mish": _resnet(non_linearity="mish", output_scale_factor=2.0),
    "resnet-dropout": _resnet(dropout=0.3),
    "resnet-gelu-dropout": _resnet(dropout=0.3, non_linearity="gelu"),
    "resnet-ada-group": _resnet("ResnetBlockCondNorm2D", non_linearity="gelu"),
    "resnet-spatial": _resnet("ResnetBlockCondNorm2D", channels=32, spatial=True, time_embedding_norm="spatial"),
    "resnet-spatial-wider": _resnet(
        "ResnetBlockCondNorm2D",
        channels=32,
        spatial=True,
        time_embedding_norm="spatial",
        out_channels=64,
        output_scale_factor=2.0,
        dropout=0.2,
    ),
    "resnet-spatial-up": _resnet(
        "ResnetBlockCondNorm2D", channels=32, spatial=True, time_embedding_norm="spatial", up=True
    ),
    "temporal": Case(
        lambda: resnet.TemporalConvLayer(16, norm_num_groups=4),
        lambda g: {"hidden_states": normal(g, 6, 16, 4, 3), "num_frames": 3},
        rows("conv4.3")[:1],
        {"TemporalConvLayer": 1},
    ),
    "dit": _dit(),
    "dit-gelu-affine": _dit(norm_elementwise_affine=True),
    "dit-dropout": _dit(dropout=0.2),
    "pixart": _pixart(),
    "pixart-gelu": _pixart(activation_fn="gelu-approximate"),
    "joint": _joint(),
    "joint-last": _joint(context_pre_only=True),
    "joint-dual": Case(
        lambda: attention.JointTransformerBlock(16, 2, 8, qk_norm="rms_norm", use_dual_attention=True),
        lambda g: _tokens(g, "hidden_states", "encoder_hidden_states", temb=(2, 16)),
        rows("norm1.linear", 2, 5, 8, of=9) + rows("norm1_context.linear", 2, 5, of=6),
        {"JointTransformerBlock": 4},
    ),
    "flux": Case(
        lambda: flux.FluxTransformerBlock(16, 2, 8),
        _flux_tokens,
        rows("norm1.linear", 2, 5, of=6) + rows("norm1_context.linear", 2, 5, of=6),
        {"FluxTransformerBlock": 3},
    ),
    "flux-single": Case(
        lambda: flux.FluxSingleTransformerBlock(16, 2, 8),
        _flux_tokens,
        rows("norm.linear", 2, of=3),
        {"FluxSingleTransformerBlock": 1},
    ),
    "flux-single-proj": Case(
        lambda: flux.FluxSingleTransformerBlock(16, 2, 8),
        _flux_tokens,
        rows("proj_out")[:1],
        {"FluxSingleTransformerBlock": 1},
    ),
    "gligen": Case(
        lambda: attention.GatedSelfAttentionDense(16, 10, 2, 8),
        lambda g: _tokens(g, "x", objs=(2, 3, 10)),
        (("alpha_attn", 0, 1), ("alpha_dense", 0, 1)),
        {"GatedSelfAttentionDense": 2},
    ),
    "motion": Case(
        lambda: motion.AnimateDiffTransformer3D(2, 8, in_channels=16, norm_num_groups=4),
        lambda g: {"hidden_states": normal(g, 6, 16, 3, 2), "num_frames": 3},
        rows("proj_out")[:1],
        {"AnimateDiffTransformer3D": 1},
    ),
    "ada-zero": Case(
        lambda: normalization.AdaLayerNormZero(16),
        lambda g: _tokens(g, "x", emb=(2, 16)),
        (),
        {},
    ),
    "ada-zero-single": Case(
        lambda: normalization.AdaLayerNormZeroSingle(16),
        lambda g: _tokens(g, "x", emb=(2, 16)),
        (),
        {},
    ),
    "ada-zero-x": Case(
        lambda: normalization.SD35AdaLayerNormZeroX(16),
        lambda g: _tokens(g, "hidden_states", emb=(2, 16)),
        (),
        {},
    ),
    "ada-continuous": Case(
        lambda: normalization.AdaLayerNormContinuous(16, 12),
        lambda g: _tokens(g, "x", conditioning_embedding=(2, 12)),
        (),
        {},
    ),
    "ada-continuous-rms": Case(
        lambda: normalization.AdaLayerNormContinuous(16, 12, elementwise_affine=True, norm_type="rms_norm"),
        lambda g: _tokens(g, "x", conditioning_embedding=(2, 12)),
        (),
        {},
    ),
}


test_gradients, test_inference, test_ten_steps = three_tests(BLOCKS)


# What half precision rounds once more or less shows in blocks of every kind of op.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize(
    "name", ["resnet-scale-shift-1x1", "resnet-mish", "dit", "pixart-gelu", "joint", "flux-single"]
)
def test_half_precision(name, phase, dtype):
    check(BLOCKS[name], phase, evaluate, dtype)


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", ["resnet", "resnet-scale-shift-1x1", "resnet-up", "resnet-mish", "resnet-ada-group"])
def test_channels_last(name, phase):
    def run(block, inputs):
        x = inputs["input_tensor"].contiguous(memory_format=torch.channels_last)
        return evaluate(block.to(memory_format=torch.channels_last), inputs | {"input_tensor": x})

    check(BLOCKS[name], phase, run)
    block = prepared(BLOCKS[name], phase)
    ours, _ = accelerated(block)
    inputs = drawn(BLOCKS[name], 1)
    for model in (block, ours):
        model.to(memory_format=torch.channels_last)
    inputs["input_tensor"] = inputs["input_tensor"].contiguous(memory_format=torch.channels_last)
    assert ours(**inputs).stride() == block(**inputs).stride()


@pytest.mark.parametrize("name", ["dit", "dit-dropout", "joint", "flux", "flux-single", "gligen"])
def test_frozen_gates(name):
    """Whoever trains the rest of a block gets zeros, as eager gives them."""
    case = BLOCKS[name]

    def build():
        block = case.build()
        for n, p in block.named_parameters():
            p.requires_grad_("norm1." not in n and "norm1_context." not in n and "norm." not in n and "alpha" not in n)
        return block

    check(case._replace(build=build), "zero", evaluate)


class _Counted:
    """An attention processor that counts its calls."""

    def __init__(self, processor):
        self.processor, self.calls = processor, 0

    def __call__(self, attn, hidden_states, *args, **kwargs):
        self.calls += 1
        return self.processor(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize("name", ["dit", "joint", "joint-dual", "flux", "flux-single", "gligen", "motion"])
def test_attention_is_not_run(name):
    block = prepared(BLOCKS[name], "zero").eval()
    ours, _ = accelerated(block)
    processors = []
    for m in ours.modules():
        if hasattr(m, "processor"):
            m.processor = _Counted(m.processor)
            processors.append(m.processor)
    inputs = drawn(BLOCKS[name], 1)
    infer(ours, inputs)
    assert [p.calls for p in processors] == [0] * len(processors) and processors
    zb.restore(ours)
    infer(ours, inputs)
    assert all(p.calls == 1 for p in processors)


def _swap_scale_and_shift(monkeypatch):
    original = diffusers_resnet.ResnetBlock2D._embedding

    def swapped(self, block, temb):
        scale, shift, e = original(self, block, temb)
        return shift, scale, e

    monkeypatch.setattr(diffusers_resnet.ResnetBlock2D, "_embedding", swapped)
    return _resnet(time_embedding_norm="scale_shift", channels=20), "dense", evaluate


def _return_almost_x(monkeypatch):
    monkeypatch.setattr(diffusers_mmdit, "copy_of_residual", lambda x: x * 1.0001)
    return BLOCKS["joint"], "zero", infer


def _forget_a_gate(monkeypatch):
    monkeypatch.setattr(_transformer, "gated", lambda residual, gate, branch: residual + branch)
    monkeypatch.setattr(diffusers_mmdit, "gated", lambda residual, gate, branch: residual + branch)
    return BLOCKS["joint"], "dense", infer


def _detach_the_modulation(monkeypatch):
    original = diffusers_adaln.modulated
    detached = lambda norm, x, shift, scale: original(norm, x, shift.detach(), scale)  # noqa: E731
    monkeypatch.setattr(diffusers_adaln, "modulated", detached)
    return BLOCKS["ada-zero"], "dense", evaluate


PLANTED = [_swap_scale_and_shift, _return_almost_x, _forget_a_gate, _detach_the_modulation]


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("proof", [True, False], ids=["proof", "check"])
def test_planted_bugs_are_found(plant, proof, monkeypatch):
    """By the proof, which leaves the block alone, or where it is blind by the comparison of these tests."""
    monkeypatch.setattr(_proof, "_proved", {})
    if not proof:
        monkeypatch.setattr(_proof, "verdict", lambda block, family: _proof.Verdict(None))
    case, phase, run = plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(case, phase, run)
