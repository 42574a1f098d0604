"""Memory formats of converted blocks: what the original returns, zero or not."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import counters, eager, reset_counters

from ..formats import LAYOUTS, formats
from . import oracles, oracles_edm


def _library(module, name, *args, **options):
    package = pytest.importorskip(module, reason=f"needs {module}")
    return getattr(package, name)(*args, **options)


USED = [name for name in LAYOUTS if name not in ("expanded", "from an image")]
INFERENCE_ONLY = ("torchvision", "timm")
EMB = torch.randn(2, 16)
# name: (build, the other inputs, the parameter that holds its branch at zero)
BLOCKS = {
    "guided": (lambda: eager.ResBlock(32, 16, 0.0), (EMB,), "out_layers.3.weight"),
    "attention": (lambda: oracles.AttentionBlock(32, 4, "legacy"), (), "proj_out.weight"),
    "edm": (lambda: oracles_edm.UNetBlock(32, 32, 16), (EMB,), "conv1.weight"),
    "fixup": (lambda: eager.FixupBasicBlock(32, 32), (), "conv2.weight"),
    "diffusers": (
        lambda: _library("diffusers.models.resnet", "ResnetBlock2D", in_channels=32, temb_channels=16),
        (EMB,),
        "conv2.weight",
    ),
    "torchvision": (lambda: _library("torchvision.models.resnet", "BasicBlock", 32, 32), (), "bn2.weight"),
    "timm": (lambda: _library("timm.models.resnet", "Bottleneck", 32, 8), (), "bn3.weight"),
}


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("weights", ["contiguous", "channels-last"])
@pytest.mark.parametrize("name", BLOCKS)
def test_converted_blocks(name, weights, phase):
    torch.manual_seed(0)
    build, others, tail = BLOCKS[name]
    theirs = nn.ModuleList([build()]).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if phase == "zero":
            theirs[0].get_parameter(tail).zero_()
    if weights == "channels-last":
        theirs.to(memory_format=torch.channels_last)
    ours = copy.deepcopy(theirs)
    report = zb.accelerate(ours)
    assert report.branches, report
    for layout, grad in itertools.product(USED, (False, True)):
        x = LAYOUTS[layout](torch.randn(2, 32, 4, 6))
        reset_counters()
        with torch.set_grad_enabled(grad):
            results = [[m[0](x, *others).detach()] for m in (ours, theirs)]
        formats(results, (name, weights, layout, grad))
        skipped = any(n for _, n in counters().values())
        assert skipped == (phase == "zero" and not (grad and name in INFERENCE_ONLY)), (layout, grad, counters())
