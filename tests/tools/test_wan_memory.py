"""The account of a Wan 2.2 block's memory: its page is current, all ways compute one block, the allocator agrees."""

from __future__ import annotations

import sys

import pytest
import torch

from zeroblock.testing import CPU_MISSING

from ..ops.test_memory import allocations, most
from ..support import BENCHMARKS

SMALL = {"D": 48, "hidden": 96, "text": 3}


@pytest.fixture
def wan(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import wan_memory

    return wan_memory


@pytest.mark.slow  # another torch may allocate otherwise
def test_page_is_current_and_says_what_is_claimed(wan):
    assert wan.PAGE.read_text() == wan.render(), "run python benchmarks/wan_memory.py"
    for T in wan.TOKENS:
        theirs, tokens, rows = (wan.count(way, T) for way in wan.WAYS.values())
        assert (theirs.large, tokens.large, rows.large) == (2, 1, 0)  # table + temb and its gradient, temb's, none
        assert tokens.saved <= 0.6 * theirs.saved and rows.saved <= 0.6 * theirs.saved
        assert rows.most <= tokens.most <= 1.01 * theirs.most


def test_all_ways_compute_the_same(wan):
    results = []
    for name, way in wan.WAYS.items():
        torch.manual_seed(0)
        block, x, _, _, text = wan.inputs(31, **SMALL, indexed=False, dtype=torch.float32)
        rows, index = torch.randn(1, 2, 6, SMALL["D"]), (torch.arange(31) >= 1).int()[None]
        temb = rows.requires_grad_() if way[1] else rows[:, index[0].long()].requires_grad_()
        forward, both = wan.step(way, (block, x, temb, index if way[1] else None, text), 2)
        torch.manual_seed(1)
        grads = list(both())
        if not way[1]:
            grads[1] = torch.zeros_like(rows).index_add_(1, index[0], grads[1])
        results.append((name, [forward(), *grads]))
    for name, tensors in results[1:]:
        for a, b in zip(tensors, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.skipif(CPU_MISSING is not None, reason=f"the native kernels: {CPU_MISSING}")
@pytest.mark.parametrize("indexed", (False, True))
def test_the_account_is_what_is_allocated(wan, indexed):
    """On a CPU, in bytes held at most; beside it what a kernel takes for itself."""
    way, T = (wan.fused, indexed), 512
    counted = wan.count(way, T, **SMALL, heads=2)
    _, both = wan.step(way, wan.inputs(T, **SMALL, indexed=indexed, dtype=torch.bfloat16), 2)
    assert 0.9 * counted.most <= most(allocations(both)) <= 1.25 * counted.most


def test_a_tensor_more_shows(wan):
    def wasteful(block, x, temb, *rest):
        return wan.fused(block, x, temb + 0.0, *rest)

    plain, more = (wan.count((way, False), 64, **SMALL, heads=2) for way in (wan.fused, wasteful))
    assert more.large == plain.large + 1 and more.saved > plain.saved and more.most > plain.most
