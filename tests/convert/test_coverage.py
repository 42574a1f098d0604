"""Every model of the installed diffusers, tiny, accelerated, against itself; and the table of what is covered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import zeroblock as zb
from zeroblock.convert import Reason
from zeroblock.convert.families import known

from . import coverage
from .cases import Net, guided_block
from .gated_blocks import gated_blocks
from .one_of_each import BLOCKS
from .test_left_alone import Convs

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

SIZES = coverage.sizes()
LEVELS = ("no blocks", "nothing", "parts", "some blocks", "blocks")
# Flex attention has no backward pass on a CPU.
NOT_TRAINED = {"AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel", "LTX2VideoDiffusionDecoderModel"}
# Classes that multiply by something named a gate and are no block of gated branches.
NOT_GATED_BLOCKS = {
    "GLUMBConv": "a gated linear unit of convolutions",
    "GLUMBTempConv": "a gated linear unit of convolutions",
    "BidirectionalGDNUCPESinglePathLiteLA": "an attention whose result is gated",
    "AnyFlowDualTimestepTextImageEmbedding": "mixes two timesteps",
    "AnyFlowDualTimestepTextImageEmbeddingCausal": "mixes two timesteps",
    "LTX2VideoTransformer3DModel": "scales the timestep of its gates",
}


def test_every_model_is_in_the_table():
    """A class that is new in diffusers fails here: write its size into one of the files, renew the table."""
    known = {*SIZES, *coverage.NOT_RUN}
    assert {n for n in coverage.classes() if n not in known} == set()
    lines = coverage.table()
    assert set(lines) >= set(coverage.classes())
    assert len(coverage.NOT_RUN) <= 10
    assert not coverage.NOT_RUN.keys() & SIZES.keys()


def test_how_many_are_covered():
    levels = {name: line["level"] for name, line in coverage.table().items()}
    nothing = {n for n, level in levels.items() if level == "nothing" and coverage.is_transformer(n)}
    assert nothing == {"RFD4ProteinaTransformer"}  # of proteins: its scales and gates are sigmoids
    assert sum(level == "blocks" for level in levels.values()) >= 122
    # The classes of gated or residual transformer blocks that are run whole.
    blocks = {name for line in coverage.table().values() for name in line["blocks"].replace(")", "").split("; ")}
    whole = {b.split(" (")[0] for b in blocks if "Block" in b or "Layer" in b}
    assert len({b for b in whole if not b.startswith(("Res", "UNet")) and "es" + "net" not in b}) >= 75


def test_every_gated_block_of_diffusers_is_a_block_of_a_family():
    """A class that is new in diffusers and has gates fails here: describe it, or say what it is."""
    families = {kind: f for f in known().values() if not (f.inner or f.only_skips) for kind in f.classes}
    found = gated_blocks()
    assert {n: found[n] for n in found if n not in families and n not in NOT_GATED_BLOCKS} == {}
    whole = [n for n in found if n in families]
    assert all(families[n].name in BLOCKS for n in whole)  # of which the proof is tested
    assert len(whole) >= 55
    if diffusers.__version__ == "0.42.1":
        assert len(whole) == 81 and NOT_GATED_BLOCKS.keys() <= found.keys()


def run(model: nn.Module, inputs: dict, gradients: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(3)
    model.zero_grad()
    with torch.set_grad_enabled(gradients):
        ys = coverage.tensors(model(**inputs))
    if gradients:
        generator = torch.Generator().manual_seed(1)
        sum((y * torch.randn(y.shape, generator=generator)).sum() for y in ys).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [y.detach() for y in ys], grads


def stepped(ours: nn.Module, plain: nn.Module) -> None:
    """A step of AdamW with the gradients that the models have; undone again."""
    results = []
    for model in (ours, plain):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.optim.AdamW(model.parameters(), lr=0.1, eps=0.1).step()
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
    size = max(p.abs().max() for p in results[1].values())
    for name, p in results[1].items():
        torch.testing.assert_close(results[0][name], p, rtol=1e-3, atol=1e-3 * float(size))


def assert_close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= tolerance * b.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(n for n in SIZES if hasattr(diffusers, n)))
def test_accelerated_model(name):
    plain, inputs = coverage.build(name)
    ours, _ = coverage.build(name)  # weight norm cannot be copied before a call
    plain.load_state_dict(ours.state_dict())  # some parameters are torch.empty's
    found = coverage.row(ours.eval(), lambda model: model(**inputs))
    line = coverage.table()[name]
    assert LEVELS.index(found["level"]) >= LEVELS.index(line["level"]), "coverage was lost"
    if diffusers.__version__ == "0.42.1":
        assert found == {k: line[k] for k in found}, "renew the table: python -m tests.convert.coverage"
    assert list(ours.state_dict()) == list(plain.state_dict())
    expected, _ = run(plain.eval(), inputs, False)
    for model in (ours, copy.deepcopy(ours)):
        assert_close(run(model, inputs, False)[0], expected, 1e-5)
    if name not in NOT_TRAINED:
        (ys, grads), (expected_ys, expected_grads) = run(ours.train(), inputs, True), run(plain.train(), inputs, True)
        assert_close(ys, expected_ys, 1e-5)
        for key, g in expected_grads.items():
            assert (grads[key] - g).norm() <= 1e-3 * g.norm() + 1e-5 * max(x.norm() for x in expected_grads.values()), (
                key
            )
        stepped(ours, plain)
    zb.restore(ours)
    assert all(map(torch.equal, run(ours.eval(), inputs, False)[0], expected))


# ---- coverage() -----------------------------------------------------------------------------------------------------


def test_coverage_says_what_accelerate_does_and_changes_nothing():
    net = Net(guided_block(), Convs(32))
    kinds = [type(m) for m in net.modules()]
    report = zb.coverage(net)
    assert [type(m) for m in net.modules()] == kinds
    assert (report.blocks, len(report.branches)) == (1, 1)
    assert [(b.path, b.kind) for b in report.left_alone] == [("blocks.1", Reason.UNKNOWN)]
    assert zb.accelerate(net) == report


def test_coverage_refuses():
    with pytest.raises(TypeError, match="coverage: model must be an nn.Module"):
        zb.coverage(3)
    net = Net()
    zb.accelerate(net)
    with pytest.raises(RuntimeError, match=r"coverage: blocks\.0 is accelerated already"):
        zb.coverage(net)
    zb.restore(net)
    net.compile()
    with pytest.raises(RuntimeError, match="coverage: .* is compiled"):
        zb.coverage(net)
