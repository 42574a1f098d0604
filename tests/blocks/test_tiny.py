"""Tiny blocks run as they were written while no branch of theirs is zero, and keep the zero contract."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing, zero
from zeroblock.blocks import tiny
from zeroblock.steps.flag import is_seen_nonzero

from .cases import CASES, DTYPES, PHASES, check, pair

NAMES = [n for n in CASES if n.startswith(("ResBlock", "DiTBlock"))]
ONE_OF_EACH = "ResBlock-2d-film", "DiTBlock"


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Every block of these tests is tiny."""
    monkeypatch.setattr(tiny, "IMAGES", 1 << 17)
    monkeypatch.setattr(tiny, "TOKENS", 1 << 17)


def fused_calls(block, inputs):
    """The ops of zeroblock's own that a call runs."""
    with torch.no_grad(), torch.profiler.profile() as found:
        block(*inputs)
    return {e.name for e in found.events() if e.name.startswith("zeroblock::") and not e.name.endswith("_is_zero")}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "name, dtype", [(n, d) for n in NAMES for d in ("fp32", "bf16") if d == "fp32" or CASES[n].half]
)
def test_matches_eager(name, dtype, phase):
    block, oracle, inputs = pair(name, phase, DTYPES[dtype])
    testing.reset_counters()
    check(block, oracle, inputs)
    executed, skipped = testing.counters()[CASES[name].counter]
    assert (skipped > 0, executed > 0) == ((True, False) if phase == "zero" else (False, True))


@pytest.mark.parametrize("name", [n for n in NAMES if "checkpoint" not in n])
def test_float32_has_the_bits_of_eager(name):
    block, oracle, inputs = pair(name, "dense")
    ys, grads = [], []
    for module in (block, oracle):
        leaves = [t.clone().requires_grad_() for t in inputs]
        torch.manual_seed(5)  # dropout's
        y = module(*leaves)
        ys.append(y.detach())
        grads.append(torch.autograd.grad(y, [*leaves, *module.parameters()], torch.ones_like(y)))
    testing.assert_bitwise_equal(*ys)
    for got, expected in zip(*grads, strict=True):
        testing.assert_bitwise_equal(got, expected)
    assert not fused_calls(block, inputs)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_values_decide_at_each_call(name):
    """Zeroed between two calls through .data, of which no version tells, and given back."""
    block, _, inputs = pair(name, "dense")
    case, calls = CASES[name], []
    tail = case.weight(block)
    kept = tail.detach().clone()
    for values in (kept, torch.zeros_like(kept), kept):
        tail.data.copy_(values)
        if case.rows is not None and values is not kept:
            block.get_parameter(case.tail.replace("weight", "bias")).data.zero_()
        testing.reset_counters()
        with torch.no_grad():
            block(*inputs)
        calls.append(testing.counters()[case.counter])
    branches = 2 if name == "DiTBlock" else 1
    assert calls == [(branches, 0), (0, branches), (branches, 0)]


def test_a_gate_that_is_zero_at_this_call_skips_its_half():
    block, oracle, inputs = pair("DiTBlock", "dense")
    for module in (block, oracle):
        module.adaLN_modulation[-1].bias.data.zero_()
    inputs[1] = torch.zeros_like(inputs[1])  # silu(0) = 0: all vectors are zero
    testing.reset_counters()
    with torch.no_grad():
        y = block(*inputs)
    assert testing.counters()["DiTBlock"] == (0, 2)
    assert torch.equal(y, oracle(*inputs))


def test_a_last_weight_that_begins_with_zeros_is_not_taken_for_zero():
    block, oracle, inputs = pair("ResBlock-2d-film", "dense")
    for module in (block, oracle):
        module.out_layers[-1].weight.data.view(-1)[:-1] = 0
    testing.reset_counters()
    y = block(*inputs)
    assert testing.counters()["ResBlock"] == (1, 0)
    torch.testing.assert_close(y, oracle(*inputs))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_does_not_fit_is_refused_as_at_any_size(name):
    block, _, (x, condition) = pair(name, "dense")
    half = x.shape[1 if x.dim() == 4 else 2] // 2
    for wrong in (x[:, :half] if x.dim() == 4 else x[..., :half], x[0]):
        with pytest.raises(ValueError, match="must"):
            block(wrong, condition)


def test_a_norm_without_parameters():
    norm, x = zb.nn.resblock.GroupNorm32(4, 8, affine=False), torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(norm(x), nn.functional.group_norm(x, 4))
    with pytest.raises(ValueError, match="must"):
        zb.nn.resblock.GroupNorm32(4, 8)(x[:, :4])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_hooks_run(name):
    block, _, inputs = pair(name, "dense")
    seen = []
    last = block.out_layers[0] if name.startswith("ResBlock") else block.mlp
    last.register_forward_hook(lambda *_: seen.append(1))
    block(*inputs)
    assert seen


def test_what_is_not_tiny():
    x = torch.ones(2, 4, 8)
    assert tiny.is_tiny(x, x.numel()) and not tiny.is_tiny(x, x.numel() - 1) and not tiny.is_tiny(x[:0], 64)
    with testing.use_backend("reference"):
        assert not tiny.is_tiny(x, 64)
    holder, calls = nn.Parameter(torch.ones(3)), dict(name="ResBlock", policy="auto", x=x)

    def taken(*holders, **others):
        arguments = {**calls, **others}
        return tiny.runs_as_written(*arguments.values(), *holders)

    assert taken(holder) and taken(holder, policy="never")
    assert not taken(None) and not taken(holder, torch.zeros(3)) and not taken(holder, torch.tensor([0.0, 1.0]))
    assert not taken(holder, policy="sometimes")  # which the fused forward refuses
    with zero.reference_only():
        assert not taken(holder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_element_is_judged_by_its_bits(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormal
    for value, nonzero in ((0.0, False), (-0.0, False), (1.0, True), (smallest, True), (float("nan"), True)):
        t = torch.zeros(3, 4, dtype=dtype)
        t[1, 2] = value
        assert is_seen_nonzero(t, 6) is nonzero and not is_seen_nonzero(t) and not is_seen_nonzero(t, 12)
        assert is_seen_nonzero(t[1, 2:]) is nonzero
        assert not is_seen_nonzero(t.t(), 6)  # not at that place there


def test_what_may_not_be_tested_is_not_read():
    for t in (None, torch.ones(3, device="meta"), torch.ones(2, 2).to_sparse(), torch.ones(3, dtype=torch.int32)):
        assert not is_seen_nonzero(t)
    assert not is_seen_nonzero(torch.ones(1).expand(5), 3)  # whose memory ends before


def test_a_frozen_block_keeps_its_packed_weights():
    block = zb.nn.DiTBlock(32, 2).eval()
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.1)
        inputs = torch.randn(1, 4, 32), torch.randn(1, 32)
        expected = block(*inputs)
        assert not fused_calls(block, inputs)
        zb.freeze(block)
        torch.testing.assert_close(block(*inputs), expected)
        assert fused_calls(block, inputs)
        zb.unfreeze(block)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_whoever_records_or_transforms_a_call_is_left_alone(name):
    block, _, inputs = pair(name, "dense", torch.float32)
    with torch.no_grad():
        expected = block(*inputs)
        traced = torch.jit.trace(block, inputs)
        testing.assert_bitwise_equal(traced(*inputs), traced(*inputs))
        torch.testing.assert_close(traced(*inputs), expected, rtol=1e-4, atol=1e-4)
    twice = torch.func.vmap(block)(*(torch.stack([t, t]) for t in inputs))
    torch.testing.assert_close(twice[1], expected, rtol=1e-4, atol=1e-4)


def test_nothing_stored_is_not_read():
    """A sharded weight that is not gathered, torch's zero tensors, a tensor of a transform."""
    freed = torch.randn(4)
    freed.untyped_storage().resize_(0)
    for t in (freed, torch._efficientzerotensor((4,)), torch.empty(0), torch.empty(4, device="meta")):
        assert not is_seen_nonzero(t)
    torch.func.vmap(lambda t: (is_seen_nonzero(t), t)[1])(torch.randn(2, 4))
