"""What residual blocks of video hold at most in inference: no more than eager, which pads copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zeroblock as zb
from zeroblock.plan.mode import fixed_rule
from zeroblock.steps import taps
from zeroblock.testing import CPU_MISSING, use_backend

from ..ops.test_memory import allocations, most

pytestmark = pytest.mark.skipif(CPU_MISSING is not None, reason=f"the native kernels: {CPU_MISSING}")
FIRST = ("replicate", "zeros", "zeros")
SHAPE = (1, 32, 9, 80, 16)  # so large that the library's convolution is oneDNN's, which makes no columns


def _padded(x: Tensor, modes: tuple[str, ...]) -> Tensor:
    time, space = (mode.replace("zeros", "constant") for mode in modes[:2])
    return F.pad(F.pad(x, (0, 0, 0, 0, 2, 0), mode=time), (1, 1, 1, 1, 0, 0), mode=space)


def _eager(block: zb.nn.VideoResBlock, modes: tuple[str, ...], x: Tensor) -> Tensor:
    """As diffusers' blocks are written."""
    h = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        h = F.group_norm(h, norm.num_groups, norm.weight, norm.bias, norm.eps)
        h = F.silu(h)
        h = _convolved(conv, modes, h)
    return h + x


def _convolved(conv, modes: tuple[str, ...], h: Tensor) -> Tensor:
    h = _padded(h, modes)
    return F.conv3d(h, conv.weight, conv.bias)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last_3d))
@pytest.mark.parametrize("modes", (("replicate",) * 3, ("zeros",) * 3, FIRST), ids=("repeated", "zeros", "first"))
def test_a_block_holds_no_more_than_eager(modes, layout, monkeypatch):
    monkeypatch.setattr(taps, "LARGE", 1 << 8)
    torch.manual_seed(0)
    block = zb.nn.VideoResBlock(SHAPE[1], norm="group", padding_mode=modes).eval().to(memory_format=layout)
    torch.nn.init.normal_(block.conv2.weight, std=0.05)
    x = torch.randn(SHAPE).to(memory_format=layout)
    with torch.no_grad(), use_backend("cpu"), fixed_rule():
        torch.testing.assert_close(block(x), _eager(block, modes, x), rtol=1e-4, atol=1e-4)
        ours, theirs = allocations(lambda: block(x)), allocations(lambda: _eager(block, modes, x))
    assert most(ours) <= most(theirs), (most(ours) / x.nbytes, most(theirs) / x.nbytes)
    # The padded copy or what is activated, the result, and a few frames of it.
    assert most(ours) <= 3.4 * x.nbytes, most(ours) / x.nbytes


@pytest.mark.parametrize("mode", ("replicate", "zeros"))
def test_pieces_hold_no_more_than_eager(mode, monkeypatch):
    """Frames are kept from piece to piece; what a norm gave is not held beside what the next one gives."""
    monkeypatch.setattr(taps, "LARGE", 1 << 8)
    torch.manual_seed(0)
    block = zb.nn.VideoResBlock(SHAPE[1], padding_mode=(mode, "zeros", "zeros")).eval()
    torch.nn.init.normal_(block.conv2.weight, std=0.05)
    x = torch.randn(SHAPE)
    with torch.no_grad(), use_backend("cpu"), fixed_rule():
        _, cache = block.stream(x)
        held = most(allocations(lambda: block.stream(x, cache)))
    assert held <= 4.25 * x.nbytes, held / x.nbytes
