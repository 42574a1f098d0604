"""What people put around a model of diffusers: the same results as without accelerate, or the block is left alone."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing

from ..twins import assert_within_budget
from .model_cases import accelerated, cast, check, drawn, evaluate, infer, prepared

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from .test_diffusers import BLOCKS  # noqa: E402  (where diffusers is missing these cannot be imported)
from .test_diffusers_models import MODELS  # noqa: E402


def _unet(phase):
    return prepared(MODELS["unet"], phase).eval()


def _same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("first", ["accelerate", "cast"])
def test_layerwise_casting(phase, first):
    """Weights lie in float8 outside the calls of their layers: the blocks run as they did."""
    plain = _unet(phase).bfloat16()
    ours = copy.deepcopy(plain)
    if first == "accelerate":
        zb.accelerate(ours)
    for model in (plain, ours):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    if first == "cast":
        assert not any(b.zero for b in zb.accelerate(ours).branches)
    inputs = drawn(MODELS["unet"], 1, torch.bfloat16)
    testing.reset_counters()
    _same(infer(ours, inputs), infer(plain, inputs))
    assert testing.counters() == {}


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("first", ["accelerate", "offload"])
def test_cpu_offload(phase, first):
    """Weights are on meta outside the calls of their layers."""
    hf = pytest.importorskip("accelerate", reason="accelerate is not installed")
    plain = _unet(phase)
    ours = copy.deepcopy(plain)
    if first == "accelerate":
        zb.accelerate(ours)
    hf.cpu_offload(ours, execution_device="cpu")
    if first == "offload":
        assert not any(b.zero for b in zb.accelerate(ours).branches)
    inputs = drawn(MODELS["unet"], 1)
    testing.reset_counters()
    _same(infer(ours, inputs), infer(plain, inputs))
    assert not any(skipped for _, skipped in testing.counters().values())


@pytest.mark.parametrize("first", ["accelerate", "quantise"])
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_torchao_weights(name, first):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = quantization.Int8WeightOnlyConfig()
    plain = prepared(MODELS[name], "dense").eval()
    ours = copy.deepcopy(plain)
    if first == "accelerate":
        zb.accelerate(ours)
    for model in (plain, ours):
        quantization.quantize_(model, config)
    if first == "quantise":
        report = zb.accelerate(ours)
        assert report.branches and all(b.zero is None for b in report.branches), report
    exact = copy.deepcopy(plain)
    for m in exact.modules():
        if isinstance(m, nn.Linear) and type(m.weight) is not nn.Parameter:
            m.weight = nn.Parameter(m.weight.dequantize())
    exact.double()

    def sample(seed):
        inputs = drawn(MODELS[name], seed)
        return infer(ours, inputs), infer(plain, inputs), infer(exact, cast(inputs, torch.float64))

    assert_within_budget(sample)


def _in_4_bits(model, bnb):
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                packed = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=layer.bias is not None,
                    quant_type="nf4",
                    compute_dtype=torch.float32,
                )
                packed.load_state_dict(layer.state_dict())
                setattr(parent, name, packed.to("cpu"))
    return model


@pytest.mark.parametrize("first", ["accelerate", "quantise"])
def test_bitsandbytes_weights(first):
    """In NF4 a weight of -1 alone packs to bytes that are zero, and zeros to bytes that are not."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    dense = prepared(MODELS["dit"], "dense").eval()
    with torch.no_grad():
        for block in dense.transformer_blocks:
            block.norm1.linear.weight.fill_(-1.0)
    plain, ours, exact = (copy.deepcopy(dense) for _ in range(3))
    if first == "accelerate":
        zb.accelerate(ours)
    for model in (plain, ours):
        _in_4_bits(model, bnb)
    assert not plain.transformer_blocks[0].norm1.linear.weight.data.any()
    if first == "quantise":
        assert all(b.zero is None for b in zb.accelerate(ours).branches)
    packed = dict(plain.named_modules())
    for name, layer in exact.named_modules():
        if type(layer) is nn.Linear:
            weight = packed[name].weight
            layer.weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    exact.double()
    testing.reset_counters()
    infer(ours, drawn(MODELS["dit"], 0))
    assert not any(skipped for _, skipped in testing.counters().values())

    def sample(seed):
        inputs = drawn(MODELS["dit"], seed)
        return infer(ours, inputs), infer(plain, inputs), infer(exact, cast(inputs, torch.float64))

    assert_within_budget(sample)


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_gradient_checkpointing(name, phase):
    build = MODELS[name].build

    def checkpointed():
        model = build()
        model.enable_gradient_checkpointing()
        return model

    # The recomputation skips once more.
    check(MODELS[name]._replace(build=checkpointed, skipped={}), phase, evaluate, together=True)


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", ["resnet", "resnet-scale-shift-1x1", "dit", "joint", "flux-single", "pixart"])
def test_autocast(name, phase):
    def run(model, inputs):
        enabled = next(model.parameters()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return evaluate(model, inputs)

    check(BLOCKS[name], phase, run)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", ["resnet-scale-shift-1x1", "dit", "joint", "flux", "flux-single", "ada-continuous"])
def test_compile_in_one_graph(name, phase):
    def run(model, inputs, compiled):
        torch._dynamo.reset()
        call = functools.partial(torch.compile(model, backend="aot_eager", fullgraph=True)) if compiled else model
        return infer(call, inputs)

    case = BLOCKS[name]
    plain = prepared(case, phase).eval()
    ours, _ = accelerated(plain)
    exact = copy.deepcopy(plain).double()

    def sample(seed):
        inputs = drawn(case, seed)
        return run(ours, inputs, True), infer(plain, inputs), infer(exact, cast(inputs, torch.float64))

    assert_within_budget(sample)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet-scale-shift-1x1", "dit", "joint", "flux-single"])
def test_export(name):
    case = BLOCKS[name]
    plain = prepared(case, "dense").eval()
    ours, _ = accelerated(plain)
    inputs = drawn(case, 1)
    program = torch.export.export(ours, (), inputs)
    assert any("zeroblock" in str(node.target) for node in program.graph.nodes)
    exact = infer(copy.deepcopy(plain).double(), cast(inputs, torch.float64))
    for key, y in infer(program.module(), inputs).items():
        testing.assert_error_budget(y, infer(plain, inputs)[key], exact[key], key)


def test_ema_swap_is_seen():
    """EMAModel.copy_to and restore write through .data, which no version counter notices."""
    training_utils = pytest.importorskip("diffusers.training_utils", reason="diffusers is not installed")
    dense, model = _unet("dense"), _unet("zero")
    ours, _ = accelerated(model)
    ema = training_utils.EMAModel(dense.parameters())
    inputs = drawn(MODELS["unet"], 1)
    before = infer(ours, inputs)
    ema.store(ours.parameters())
    ema.copy_to(ours.parameters())
    testing.reset_counters()
    assert not torch.equal(infer(ours, inputs)["y0"], before["y0"])
    assert testing.counters()["ResnetBlock2D"] == (8, 0)
    ema.restore(ours.parameters())
    _same(infer(ours, inputs), before)


def test_identity(tmp_path):
    """Classes, names, pickles, copies and files are those of the model."""
    model = prepared(MODELS["dit"], "zero").eval()
    ours, _ = accelerated(model)
    assert isinstance(ours, diffusers.DiTTransformer2DModel) and type(ours).__name__ == "DiTTransformer2DModel"
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in model.named_parameters()]
    ours.save_pretrained(tmp_path)
    inputs = drawn(MODELS["dit"], 1)
    expected = infer(model, inputs)
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    unpickled = pickle.loads(pickle.dumps(ours))
    for twin in (loaded, unpickled):
        assert type(twin) is diffusers.DiTTransformer2DModel
        _same(infer(twin, inputs), expected)
    testing.reset_counters()
    _same(infer(copy.deepcopy(ours), inputs), infer(ours, inputs))
    assert testing.counters()["BasicTransformerBlock"][1] == 8
    assert zb.restore(ours) == len(list(ours.transformer_blocks)) * 2 + 1
    _same(infer(ours, inputs), expected)


@pytest.mark.parametrize("layer", ["conv2", "norm2", "time_emb_proj", "nonlinearity"])
def test_hooks_fire(layer):
    block = prepared(BLOCKS["resnet"], "zero").eval()
    ours, _ = accelerated(block)
    seen = []
    getattr(ours, layer).register_forward_hook(lambda *_: seen.append(1))
    inputs = drawn(BLOCKS["resnet"], 1)
    plain = infer(block, inputs)["y0"]
    testing.assert_error_budget(infer(ours, inputs)["y0"], plain, plain.double())
    assert seen


def test_lora_in_a_model():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    model = MODELS["dit"].build().eval()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0", "net.2", "norm1.linear"])
    peft.inject_adapter_in_model(config, model)
    case = MODELS["dit"]._replace(
        build=lambda: copy.deepcopy(model), zero=(("*lora_B*", 0, 1),), skipped={"LoRA": 8}, inferred=None
    )
    for phase in ("zero", "dense"):
        check(case, phase, infer)
        check(case, phase, evaluate)


def test_other_versions_are_left_alone():
    """A subclass with another forward: the proof finds it out."""
    resnet = pytest.importorskip("diffusers.models.resnet", reason="diffusers is not installed")

    class Louder(resnet.ResnetBlock2D):
        def forward(self, input_tensor, temb):
            return super().forward(2 * input_tensor, temb)

    class Alike(resnet.ResnetBlock2D):
        pass

    options = {"in_channels": 16, "groups": 4, "temb_channels": 12}
    model = nn.ModuleList([Louder(**options), Alike(**options)])
    report = zb.accelerate(model)
    assert [(b.path, b.family) for b in report.branches] == [("1.conv2", "ResnetBlock2D")]
    assert [(b.path, b.block) for b in report.left_alone] == [("0", "Louder")]
    assert "does not compute what ResnetBlock2D does" in report.left_alone[0].reason
