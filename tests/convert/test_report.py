"""accelerate() and restore(): what they report and refuse, and that the checks of their tests can fail."""

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import eager, reset_counters

from ..support import ROOT
from .cases import Case, Net, assert_drop_in, example

# ---- report ---------------------------------------------------------------------------------------------------------


def test_report_says_what_is_zero_now():
    net = Net()
    nn.init.ones_(net.blocks[1].out_layers[3].weight)
    report = zb.accelerate(net)
    assert [(b.path, b.family, b.zero) for b in report.branches] == [
        ("blocks.0.out_layers.3", "ResBlock", True),
        ("blocks.1.out_layers.3", "ResBlock", False),
    ]
    header, counts, _, titles, first, second = str(report).splitlines()
    assert header == "zeroblock: 2 of 2 blocks fused, 0 only skipped while zero, 0 left alone"
    assert counts == "residual branches: 2, zero now: 1"
    assert titles.split() == ["branch", "family", "zero", "now", "backend"]
    assert first.split()[:3] == ["blocks.0.out_layers.3", "ResBlock", "yes"] and second.split()[2] == "no"
    reset_counters()
    net(*example())
    assert report.counters() == {"ResBlock": (1, 1)}


def test_what_is_only_skipped_stands_apart():
    conv = nn.Conv2d(8, 8, 1)
    nn.init.zeros_(conv.weight)
    report = zb.accelerate(nn.Sequential(Net(), conv))
    lines = str(report).splitlines()
    assert lines[0] == "zeroblock: 2 of 3 blocks fused, 1 only skipped while zero, 0 left alone"
    assert (report.blocks, report.fused, report.only_skipped) == (3, 2, 1)
    at = next(i for i, line in enumerate(lines) if line.startswith("only skipped "))
    assert lines[at + 1].split() == ["1", "ZeroLayer", "yes"]
    assert [b.fused for b in report.branches if b.family == "ZeroLayer"] == [False]


def test_parts_are_no_blocks():
    normalization = pytest.importorskip("diffusers.models.normalization")
    norms = nn.Sequential(*(normalization.AdaLayerNormZero(16) for _ in range(2)))
    report = zb.accelerate(norms)
    first, second = str(report).splitlines()
    assert first.startswith("zeroblock: 0 of 0 blocks fused,") and second.endswith("; parts of blocks: 2")
    assert (report.blocks, report.fused, report.only_skipped) == (2, 0, 0)


def test_backend_of_the_forward():
    net = Net()
    assert {b.backend for b in zb.accelerate(net, backend="reference").branches} == {"reference"}
    inputs = example()
    y = net(*inputs)
    zb.restore(net)
    torch.testing.assert_close(net(*inputs), y, rtol=1e-4, atol=1e-4)


def test_every_family_is_in_the_readme():
    readme = (ROOT / "zeroblock/convert/README.md").read_text()
    assert [name for name in zb.convert.families() if f"`{name}`" not in readme] == []


def test_families_have_texts():
    for name, text in zb.convert.families().items():
        for word in ("Source: ", "Use: ", "Inference", "Training forward", "Training backward"):
            assert word in text, (name, word)


# ---- refusals -------------------------------------------------------------------------------------------------------

WRONG = {
    "model": (
        lambda: zb.accelerate([]),
        TypeError,
        "accelerate: model must be an nn.Module, or a pipeline .*, got list",
    ),
    "restore": (
        lambda: zb.restore(None),
        TypeError,
        "restore: model must be an nn.Module, or a pipeline .*, got NoneType",
    ),
    "zero_skip": (lambda: zb.accelerate(Net(), zero_skip="yes"), ValueError, "zero_skip must be one of"),
    "backend": (lambda: zb.accelerate(Net(), backend="tpu"), ValueError, "backend must be one of"),
    "precision": (lambda: zb.accelerate(Net(), precision="low"), ValueError, "precision must be one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("call", [zb.accelerate, zb.restore])
def test_compiled_model_is_refused(call):
    outside = torch.compile(Net())
    inside = Net()
    inside.blocks[0] = torch.compile(inside.blocks[0])
    in_place = Net()
    in_place.blocks[1].compile()
    for model in (outside, inside, in_place):
        with pytest.raises(RuntimeError, match="is compiled.*torch.compile it"):
            call(model)


# ---- the checks can fail --------------------------------------------------------------------------------------------

PLANTED = {
    "result": lambda forward: lambda self, block, *a: forward(self, block, *a) * 1.0001,
    "gradient": lambda forward: lambda self, block, x, emb: forward(self, block, x, emb.detach()),
    "alias": lambda forward: lambda self, block, x, emb: x if is_zero(block) else forward(self, block, x, emb),
}


def is_zero(block):
    return not block.out_layers[3].weight.any()


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_caught(name, monkeypatch):
    """By the comparison with the untouched copy, where the proof is switched off."""
    family = zb.convert.known()["ResBlock"]
    monkeypatch.setattr(family, "forward", PLANTED[name](family.forward))
    monkeypatch.setattr(zb.convert.proof, "verdict", lambda *_: zb.convert.proof.Verdict(None))
    monkeypatch.setattr(zb.convert.accelerated, "_classes", {})
    case = Case(
        lambda: eager.ResBlock(64, 16, 0.0, use_scale_shift_norm=True),
        lambda: (torch.randn(2, 64, 4, 4), torch.randn(2, 16)),
        {"ResBlock": 1},
        1,
    )
    with pytest.raises((AssertionError, RuntimeError)):
        assert_drop_in(case)
