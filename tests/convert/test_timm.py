"""ResNet and NFNet blocks of torchvision and timm, accelerated, against themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing

from .model_cases import Case, normal, three_tests


def _image(g):
    return {"x": normal(g, 3, 16, 7, 7)}


def _torchvision(kind, *args, down=None):
    def build():
        resnet = pytest.importorskip("torchvision.models.resnet", reason="torchvision is not installed")
        return getattr(resnet, kind)(16, *args, downsample=None if down is None else _shortcut(down))

    last = "bn3.weight" if kind == "Bottleneck" else "bn2.weight"
    return Case(build, _image, ((last, 0, 1),), {}, {"ResNetBlock": 1})


def _timm(kind, *args, down=None):
    def build():
        resnet = pytest.importorskip("timm.models.resnet", reason="timm is not installed")
        return getattr(resnet, kind)(16, *args, downsample=None if down is None else _shortcut(down))

    last = "bn3.weight" if kind == "Bottleneck" else "bn2.weight"
    return Case(build, _image, ((last, 0, 1),), {}, {"ResNetBlock": 1})


def _nfnet(skipinit, **options):
    def build():
        nfnet = pytest.importorskip("timm.models.nfnet", reason="timm is not installed")
        layers = pytest.importorskip("timm.layers", reason="timm is not installed")
        options.setdefault("conv_layer", layers.ScaledStdConv2d)
        return nfnet.NormFreeBlock(16, 16, alpha=0.2, skipinit=skipinit, act_layer=nn.SiLU, reg=False, **options)

    zero = "skipinit_gain" if skipinit else "conv3.gain"
    return Case(build, _image, ((zero, 0, 1),), {"NormFreeBlock": 1} if skipinit else {}, {"NormFreeBlock": 1})


def _shortcut(out):
    return nn.Sequential(nn.Conv2d(16, out, 1, 2, bias=False), nn.BatchNorm2d(out))


BLOCKS = {
    "torchvision-basic": _torchvision("BasicBlock", 16),
    "torchvision-basic-down": _torchvision("BasicBlock", 24, 2, down=24),
    "torchvision-bottleneck": _torchvision("Bottleneck", 4),
    "timm-basic": _timm("BasicBlock", 16),
    "timm-bottleneck-down": _timm("Bottleneck", 6, 2, down=24),
    "nfnet-skipinit": _nfnet(True),
    "nfnet-gain": _nfnet(False),
}


test_gradients, test_inference, test_ten_steps = three_tests(BLOCKS)


@pytest.mark.parametrize("name", ["torchvision-basic", "timm-basic"])
def test_training_learns_the_statistics(name):
    plain = BLOCKS[name].build()
    nn.init.zeros_(plain.bn2.weight)
    ours = copy.deepcopy(plain)
    zb.accelerate(ours)
    x = torch.randn(4, 16, 6, 6)
    for model in (plain, ours):
        with torch.no_grad():
            model(x)
    assert torch.equal(plain.bn2.running_var, ours.bn2.running_var) and plain.bn2.num_batches_tracked == 1
    assert ours.bn2.num_batches_tracked == 1


def test_accelerate_leaves_the_statistics_alone():
    """The proof runs a copy in train mode."""
    resnet = pytest.importorskip("torchvision.models.resnet", reason="torchvision is not installed")
    model = resnet.BasicBlock(16, 16)
    assert len(zb.accelerate(model).branches) == 1
    assert not model.bn1.running_mean.any() and model.bn1.num_batches_tracked == 0


def test_whole_resnets():
    """torchvision with zero_init_residual, timm with its default: in eval nothing but the shortcuts runs."""
    resnet = pytest.importorskip("torchvision.models.resnet", reason="torchvision is not installed")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for plain in (resnet.resnet18(zero_init_residual=True, num_classes=5), timm.create_model("resnet10t")):
        plain.eval()
        ours = copy.deepcopy(plain)
        report = zb.accelerate(ours)
        assert report.branches and all(b.zero for b in report.branches) and not report.left_alone
        x = torch.randn(1, 3, 64, 64)
        testing.reset_counters()
        with torch.no_grad():
            assert torch.equal(ours(x), plain(x))
        assert testing.counters() == {"ResNetBlock": (0, len(report.branches))}


def test_attention_after_the_last_norm_is_left_alone():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    report = zb.accelerate(timm.create_model("seresnet18"))
    assert not report.branches and {b.reason for b in report.left_alone} == {"attention follows its last norm"}
