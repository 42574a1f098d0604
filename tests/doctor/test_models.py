"""No false alarm on models as their libraries initialise them."""

import sys
from pathlib import Path

import pytest
import torch

import zeroblock as zb

from ..support import ROOT


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    """Also hides our folder kernels/, which `python -m pytest` puts on the path, from transformers."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
    torch.manual_seed(0)


def no_alarm(model, batch, unused=()):
    d = zb.doctor(model, batch, steps=2)
    assert d.of_kind("dead", "symmetric", "not seen") == [] and d.exit_status == 0
    assert d.findings == []
    assert {p.name for p in d.of_kind("unused")} == set(unused)
    return d


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "squeezenet1_0"])
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models", reason="needs the package torchvision")
    no_alarm(models.get_model(name), (torch.randn(2, 3, 64, 64),))


def test_torchvision_vit():
    models = pytest.importorskip("torchvision.models", reason="needs the package torchvision")
    d = no_alarm(models.VisionTransformer(32, 16, 2, 2, 64, 128), (torch.randn(2, 3, 32, 32),))
    assert d["heads.head.weight"].kind == "zero tail" and d["conv_proj.weight"].measured == 2


def test_torchvision_convnext():
    """Layer scale 1e-6: small, and not zero."""
    convnext = pytest.importorskip("torchvision.models.convnext", reason="needs the package torchvision")
    blocks = [convnext.CNBlockConfig(16, 32, 2), convnext.CNBlockConfig(32, None, 2)]
    d = no_alarm(convnext.ConvNeXt(blocks, stochastic_depth_prob=0.5), (torch.randn(4, 3, 32, 32),))
    assert len(d.near_zero) == 4 and d.savings.branches == []


def test_torchvision_swin():
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="needs the package torchvision")
    no_alarm(swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4]), (torch.randn(2, 3, 32, 32),))


def test_torchvision_zero_init_residual():
    models = pytest.importorskip("torchvision.models", reason="needs the package torchvision")
    d = no_alarm(models.resnet18(zero_init_residual=True), (torch.randn(2, 3, 48, 48),))
    assert d["layer1.0.bn2.weight"].kind == "zero gate" and d["layer1.0.conv1.weight"].measured == 2
    assert len(d.savings.branches) == 8


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "beit_base_patch16_224", "nf_resnet26"]
)
def test_timm(name):
    timm = pytest.importorskip("timm", reason="needs the package timm")
    size = {"img_size": 32} if "patch" in name else {}
    depth = {"depth": 2} if "patch" in name else {}
    d = no_alarm(timm.create_model(name, **size, **depth), (torch.randn(2, 3, 32, 32),))
    if name == "resnet18":  # zero_init_last
        assert d["layer1.0.bn2.weight"].kind == "zero gate" and len(d.savings.branches) == 8


def test_diffusers_unet():
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    model = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    d = no_alarm(model, {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3, 7])})
    assert {p.measured for p in d.parameters} == {1}  # "zero" is only a name there


def test_diffusers_dit():
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=4
    )
    labels, t = torch.tensor([1, 2]), torch.tensor([3, 7])
    no_alarm(model, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": t, "class_labels": labels})


def test_diffusers_controlnet():
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    model = diffusers.ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
    )
    batch = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "controlnet_cond": torch.randn(2, 3, 16, 16),
        "return_dict": False,
    }
    d = zb.doctor(model, batch, steps=3)
    assert d.healthy and d.findings == []
    first = {p.name: p.measured for p in d.parameters}
    zero_convs = {n for n in first if n.startswith(("controlnet_down_blocks", "controlnet_mid_block"))}
    assert {n for n, s in first.items() if s == 1} == zero_convs
    hint = {n for n in first if n.startswith("controlnet_cond_embedding")}
    last = {n for n in hint if "conv_out" in n}
    assert {first[n] for n in last} == {2} and {first[n] for n in hint - last} == {3}


def test_peft_lora():
    peft = pytest.importorskip("peft", reason="needs the package peft")
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 3))
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["0", "2"]), model)
    d = no_alarm(model, (torch.randn(4, 8),))
    steps = {p.name: p.measured for p in d.parameters if "lora" in p.name}
    assert steps == {n: 1 if "lora_B" in n else 2 for n in steps} and len(steps) == 4
    assert {p.kind for p in d.parameters if "lora_B" in p.name} == {"zero tail"}
