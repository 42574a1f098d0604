"""What surrounds the library's convolutions on a GPU: no copies to another layout, and bias and residual in one pass.

CPU tensors stand for those of a GPU; Triton's launches are recorded and not run, so that nothing but torch's own
operators shows in the profile.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import zeroblock as zb
from zeroblock.backends import available as _backends
from zeroblock.plan import planned as _plan

from .gpu_cases import NORMS_GATES, planned_on_the_cpu

TRITON = _backends.triton()
pytestmark = pytest.mark.skipif(TRITON is None or _backends.interprets(), reason="needs triton, not interpreting")
NHWC = torch.channels_last
COPIES = ("aten::copy_", "aten::clone", "aten::_to_copy")
ADDS = ("aten::add", "aten::add_")


def _events(block, x, emb, layout, backward):
    """(name, size of the first argument) of what runs beside our kernels, and the names of those."""
    from zeroblock.kernels import _launch

    with planned_on_the_cpu() as patch, _plan.use("fixed"), _launch.recording(run=False) as launches:
        patch.setattr(TRITON, "device", "cpu")
        for step in NORMS_GATES:
            patch.setattr(step, "rule", lambda *args: "triton")
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            y = block(x, emb)
            dy = torch.ones_like(y)
            if backward:
                y.backward(dy)
    assert y.is_contiguous(memory_format=layout)
    events = [(e.name, e.input_shapes[0]) for e in found.events() if e.input_shapes]
    return events, [launch.kernel.__name__ for launch in launches]


@pytest.mark.parametrize("film", (False, True), ids=("", "film"))
@pytest.mark.parametrize("layout", (torch.contiguous_format, NHWC), ids=("nchw", "nhwc"))
def test_a_block_copies_no_activation(layout, film):
    """Forward and backward: norms read and write the layout that the convolutions take."""
    block = zb.nn.ResBlock(64, 32, 0.0, use_scale_shift_norm=film).bfloat16().to(memory_format=layout)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_()
    x = torch.randn(2, 64, 16, 16).bfloat16().to(memory_format=layout).requires_grad_()
    emb = torch.randn(2, 32).bfloat16()
    events, kernels = _events(block, x, emb, layout, backward=True)
    assert [e for e in events if e[0] in COPIES and e[1] == list(x.shape)] == []
    assert sum(name == "aten::convolution" for name, _ in events) == 2
    assert kernels.count("_add_bias") == 1, "bias and residual of the second convolution"
    adds = [e for e in events if e[0] in ADDS and e[1] == list(x.shape)]
    assert len(adds) == (1 if film else 2), "the residual's gradient, and the embedding where it is added"


def test_the_copies_would_be_seen():
    """Of a block whose weights are channels-last, called with an image that is not."""
    block = zb.nn.ResBlock(64, 32, 0.0).to(memory_format=NHWC)
    x, emb = torch.randn(2, 64, 16, 16), torch.randn(2, 32)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        block(x, emb).contiguous(memory_format=NHWC)
        x.to(memory_format=NHWC)
    assert any(e.name in COPIES and e.input_shapes[0] == list(x.shape) for e in found.events() if e.input_shapes)
