"""A block's own forward where it is faster than ours: when it runs, when not, and what shows it."""

from __future__ import annotations

import functools

import pytest
import torch

import zeroblock as zb
from zeroblock.blocks import tiny
from zeroblock.convert.choice import BlockCall
from zeroblock.plan import planned as _plan
from zeroblock.testing import counters, reset_counters

from .cases import randomize_
from .diffusers_blocks import BLOCKS

flux = pytest.importorskip("diffusers.models.transformers.transformer_flux", reason="diffusers is not installed")


class Timer:
    """The forward `fast` is; counts how often a block was timed."""

    def __init__(self, fast: str):
        self.fast, self.calls = fast, 0

    def __call__(self, name: str, run, device) -> float:
        run()
        self.calls += isinstance(run.args[0], BlockCall)
        return 1.0 if name == self.fast else 2.0


def _inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 5, 16), torch.randn(2, 3, 16), torch.randn(2, 16)


class Own:
    """A class of blocks whose own forward is counted."""

    def __init__(self):
        self.calls = 0
        method = flux.FluxSingleTransformerBlock.forward

        @functools.wraps(method)
        def forward(*args, **kwargs):
            self.calls += 1
            return method(*args, **kwargs)

        fields = {"forward": forward, "__module__": flux.__name__}
        self.kind = type("FluxSingleTransformerBlock", (flux.FluxSingleTransformerBlock,), fields)

    def block(self, prefer: str = "memory"):
        torch.manual_seed(0)
        block = self.kind(16, 2, 8).eval()
        zb.accelerate(block, prefer=prefer)
        return block

    def calls_of(self, block, inputs) -> int:
        """How often it is called in one call of the block."""
        self.calls = 0
        block(*inputs)
        return self.calls


@pytest.mark.parametrize("fast", ["library", "fused"])
def test_inference_takes_the_faster_forward_once_it_was_measured(fast):
    own, inputs, timer = Own(), _inputs(), Timer(fast)
    block = own.block()
    name = block._zeroblock.family.name
    with torch.no_grad():
        expected = block(*inputs)
        assert "fixed rule" in str(zb.explain(block, *inputs)) and not timer.calls
        with _plan.use(timer=timer):
            before = sum(zb.testing.counters().get(name, (0, 0)))
            block(*inputs)
            measured = timer.calls
            counted = sum(zb.testing.counters().get(name, (0, 0))) - before
            assert measured and counted == (fast == "fused")  # what is measured is not counted
            assert own.calls_of(block, inputs) == (fast == "library") and timer.calls == measured
            found = block(*inputs)
            (plan,) = zb.explain(block, *inputs).plans
            assert plan.choice == fast and set(plan.milliseconds) == {"library", "fused"}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_training_takes_ours_unless_speed_is_preferred():
    for prefer, calls in (("memory", 0), ("speed", 1)):
        own, inputs = Own(), tuple(t.requires_grad_() for t in _inputs())
        block = own.block(prefer)
        with _plan.use(timer=Timer("library")):
            block(*inputs)
            assert all(p.grad is None for p in (*block.parameters(), *inputs))
            assert own.calls_of(block, inputs) == calls
            sum(t.sum() for t in block(*inputs)).backward()
            assert all(t.grad is not None for t in inputs)
    with pytest.raises(ValueError, match="accelerate: prefer must"):
        zb.accelerate(block, prefer="size")


def test_a_zero_branch_is_skipped_whatever_was_faster():
    """Its weights decide at each call, also when the original was chosen; while they are zero nothing is measured."""
    own, inputs, timer = Own(), _inputs(), Timer("library")
    block = own.block()
    weight = block.proj_out.weight.detach().clone()
    with torch.no_grad(), _plan.use(timer=timer):
        block.proj_out.weight.zero_()
        assert own.calls_of(block, inputs) == 0 and not timer.calls
        for values, calls in ((weight, 1), (0 * weight, 0), (weight, 1)):
            block.proj_out.weight.data = values.clone()
            block(*inputs)
            assert own.calls_of(block, inputs) == calls


def test_a_block_that_leaves_a_trace_is_not_run_for_a_measurement():
    own, inputs, timer, seen = Own(), _inputs(), Timer("library"), []
    block = own.block()
    block.attn.register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad(), _plan.use(timer=timer):
        block(*inputs)
        block(*inputs)
    assert not timer.calls and len(seen) == 2


class Cache(list):
    """A list that nobody knows how to copy."""


@pytest.mark.parametrize(("kind", "measured"), [(list, True), (Cache, False)])
def test_what_a_block_leaves_in_its_arguments_is_left_once(kind, measured):
    """The cache of frames and the place in it, while both forwards are measured."""
    wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    block, x, timer, results = (
        randomize_(wan.WanResidualBlock(8, 8)).eval(),
        torch.randn(1, 8, 1, 4, 4),
        Timer("fused"),
        [],
    )
    with torch.no_grad(), _plan.use(timer=timer):
        for accelerated in (False, True):
            if accelerated:
                zb.accelerate(block, strict=True)
            cache, place = kind([None, None]), kind([0])
            for _ in range(3):  # each looks back at the ones before
                place[0] = 0
                y = block(x, feat_cache=cache, feat_idx=place)
            results.append((y, *cache))
            assert place == [2]
    assert bool(timer.calls) == measured
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


WITH_A_TABLE = ("WanTransformerBlock", "SkyReelsV2TransformerBlock", "LTXVideoTransformerBlock", "SanaTransformerBlock")
OF_TWO_LINEARS = ("CogVideoXBlock", "EasyAnimateTransformerBlock")


@pytest.mark.parametrize("name", [*WITH_A_TABLE, "AceStepTransformerBlock", "AllegroTransformerBlock", *OF_TWO_LINEARS])
def test_gates_of_a_table_leave_a_choice(name):
    """A branch cannot be zero while its row of the table is not, whatever the timestep's is."""
    block = randomize_(BLOCKS[name].make()).eval()
    zb.accelerate(block, strict=True)
    inputs, timer = tuple(BLOCKS[name].inputs(torch.Generator()).values()), Timer("library")
    with torch.no_grad(), _plan.use(timer=timer):
        expected = block(*inputs)
        assert timer.calls, "nothing was measured"
        reset_counters()
        block(*inputs)
        assert BLOCKS[name].name not in counters()  # the original ran
        for row in (2, 5):
            if name in OF_TWO_LINEARS:
                for norm in (block.norm1, block.norm2):
                    for t in (norm.linear.weight, norm.linear.bias):
                        t.chunk(6)[row].zero_()
            else:
                table = block.scale_shift_table
                table.view(-1, table.shape[-1])[row].zero_()
        block(*inputs)
        assert counters()[BLOCKS[name].name], expected


@pytest.fixture
def all_are_tiny(monkeypatch):
    monkeypatch.setattr(tiny, "TOKENS", 1 << 15)


def test_a_tiny_block_runs_its_own_forward(all_are_tiny):
    """In training too: neither time nor memory is to be won. While a branch is zero, ours."""
    own, inputs = Own(), _inputs()
    block = own.block()
    randomize_(block)
    assert own.calls_of(block, inputs) == 1
    with torch.no_grad():
        assert own.calls_of(block, inputs) == 1
        assert "library (tiny" in str(zb.explain(block, *inputs))
        block.norm.linear.weight.zero_()
        block.norm.linear.bias.zero_()
        assert own.calls_of(block, inputs) == 0
        assert "tiny" not in str(zb.explain(block, *inputs))


@pytest.mark.parametrize("policy", ["fixed", "measure"])
def test_a_proof_is_about_the_fused_forward(all_are_tiny, policy):
    """Small as its inputs are, and whatever were faster."""

    class FluxSingleTransformerBlock(flux.FluxSingleTransformerBlock):
        def forward(self, *args, **kwargs):
            return tuple(2 * t for t in super().forward(*args, **kwargs))

    FluxSingleTransformerBlock.__module__ = flux.__name__
    with _plan.use(policy, timer=Timer("library")):
        report = zb.accelerate(torch.nn.Sequential(FluxSingleTransformerBlock(16, 2, 8)))
    assert report.fused == 0 and "another formula" in str(report)
