"""diffusers' transformer blocks by description, accelerated, against themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.convert.families import known
from zeroblock.convert.trial import tensors as outputs
from zeroblock.testing import counters, reset_counters

from .cases import randomize_
from .diffusers_blocks import BLOCKS
from .model_cases import accelerated, cast, check, drawn, evaluate, infer

pytest.importorskip("diffusers.models.transformers", reason="diffusers is not installed")

NAMES = pytest.mark.parametrize("name", BLOCKS)
A_FEW = pytest.mark.parametrize(
    "name",
    [
        "Flux2TransformerBlock",
        "LongCatImageSingleTransformerBlock",
        "CogVideoXBlock",
        "WanTransformerBlock",
        "LTXVideoTransformerBlock",
        "Lumina2TransformerBlock",
    ],
)


def made(name: str) -> tuple[nn.Module, dict]:
    torch.manual_seed(7)
    block = randomize_(BLOCKS[name].make())
    return block, drawn(BLOCKS[name].case(), 0)


@NAMES
def test_outputs_and_gradients(name):
    check(BLOCKS[name].case(), "dense", evaluate, together=True)


@NAMES
def test_inference_names_copies_and_restore(name):
    plain, inputs = made(name)
    plain.eval()
    ours, report = accelerated(plain, strict=True)
    whole = {b.family for b in report.branches if not known()[b.family].inner}
    assert not report.left_alone and whole == {BLOCKS[name].name}, report
    assert list(ours.state_dict()) == list(plain.state_dict())
    expected = infer(plain, inputs)
    for model in (ours, copy.deepcopy(ours)):
        assert_close(infer(model, inputs), expected)
    kind = type(ours)
    assert zb.restore(ours) == report.blocks and type(ours) is type(plain) is not kind
    assert all(torch.equal(y, expected[k]) for k, y in infer(ours, inputs).items())


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for k, y in got.items():
        torch.testing.assert_close(y, expected[k], rtol=1e-4, atol=1e-4, msg=k)


@NAMES
def test_no_original_and_no_eager_norm_runs(name):
    plain, inputs = made(name)
    ours, _ = accelerated(plain)
    family = known()[BLOCKS[name].name]
    asked = []
    eager, ours_family = family.eager, type(ours)._zeroblock.family
    ours_family.eager = lambda *args, **kwargs: asked.append(1) or eager(ours_family, *args, **kwargs)
    try:
        infer(ours, inputs)
    finally:
        del ours_family.eager
    assert not asked


ZERO = [name for name, built in BLOCKS.items() if getattr(known()[built.name], "description", None) is not None]
ZERO = [name for name in ZERO if known()[BLOCKS[name].name].description.linears]


# Rows by index, and streams of different widths, are not skipped.
NOT_SKIPPED = {"QwenImageTransformerBlock 1": 2, "MochiTransformerBlock": 1}


def is_skipped(branch):
    return any(part.gate is not None for part in branch.parts()) and branch.reads is None


@pytest.mark.parametrize("name", ZERO)
def test_zero_gates_are_skipped(name):
    plain, inputs = made(name)
    family = known()[BLOCKS[name].name]()
    branches = family.branches(plain)
    with torch.no_grad():
        for tensors in branches.values():
            for t in tensors:
                t.zero_()
    ours, report = accelerated(plain)
    assert all(b.zero for b in report.branches if b.family == family.name), report
    reset_counters()
    got = evaluate(ours, inputs)
    skipped = counters()[family.name][1]
    assert skipped == sum(map(is_skipped, family.description.branches)) - NOT_SKIPPED.get(name, 0)
    expected = evaluate(plain, inputs)
    for k, y in got.items():
        if k in expected:
            torch.testing.assert_close(y, expected[k], rtol=1e-3, atol=1e-3, msg=k)
        else:
            assert not y.any(), k
    assert expected.keys() <= got.keys()
    plain.eval(), ours.eval()
    reset_counters()
    assert_close(infer(ours, inputs), infer(plain, inputs))
    assert counters()[family.name][1] == skipped


@A_FEW
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    plain, inputs = made(name)
    inputs = cast(inputs, dtype)
    ours, _ = accelerated(plain.to(dtype).eval())
    for y, expected in zip(infer(ours, inputs).values(), infer(plain, inputs).values(), strict=True):
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


class Scaled(nn.Module):
    """A linear that is none of torch's, as adapters and quantisers put in."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2.0 * self.inner(x)


@A_FEW
def test_linears_of_others_and_hooks_stay_in_charge(name):
    plain, inputs = made(name)
    ours, _ = accelerated(plain)
    called = []
    for block in (plain, ours):
        replaced = [
            (m, child) for m in block.modules() for child, layer in m.named_children() if type(layer) is nn.Linear
        ]
        for m, child in replaced:
            setattr(m, child, Scaled(getattr(m, child)))
        for m in block.modules():
            if m is not block and not isinstance(m, (nn.ModuleList, Scaled)) and hasattr(m, "eps"):
                m.register_forward_hook(lambda m, args, y, block=block: called.append(block))
    got, expected = evaluate(ours, inputs), evaluate(plain, inputs)
    assert got.keys() == expected.keys()
    for k, y in got.items():
        torch.testing.assert_close(y, expected[k], rtol=1e-3, atol=1e-3, msg=k)
    assert called.count(ours) == called.count(plain)


@A_FEW
def test_checkpointed(name):
    plain, inputs = made(name)
    ours, _ = accelerated(plain)
    expected = evaluate(plain, inputs)

    def checkpointed(**given):
        return torch.utils.checkpoint.checkpoint(ours, **given, use_reentrant=False)

    checkpointed.named_parameters = ours.named_parameters
    for k, y in evaluate(checkpointed, inputs).items():
        torch.testing.assert_close(y, expected[k], rtol=1e-3, atol=1e-3, msg=k)


@A_FEW
def test_compiled_in_one_graph(name):
    plain, inputs = made(name)
    ours, _ = accelerated(plain, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for y, expected in zip(outputs(compiled(**inputs)), outputs(plain(**inputs)), strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for y, expected in zip(outputs(compiled(**inputs)), outputs(plain(**inputs)), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
