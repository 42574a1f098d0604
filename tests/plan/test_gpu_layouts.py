"""What surrounds the library's convolutions on a GPU: no copies to another layout, and bias and residual in one pass.

CPU tensors stand for those of a GPU; Triton's launches are recorded and not run, so that nothing but torch's own
operators shows in the profile.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import zeroblock as zb
from zeroblock.backends import available as _backends
from zeroblock.backends.gpu import norms_gates, one_read
from zeroblock.plan import planned as _plan

from .gpu_cases import NORMS_GATES, planned_on_the_cpu, prefer
from .gpu_cases import backends_fixture as _backends_fixture  # noqa: F401  (the tests' `backends`)

TRITON = _backends.triton()
pytestmark = pytest.mark.skipif(TRITON is None or _backends.interprets(), reason="needs triton, not interpreting")
NHWC = torch.channels_last
COPIES = ("aten::copy_", "aten::clone", "aten::_to_copy")
ADDS = ("aten::add", "aten::add_")


def _is_library_s_own(event):
    """Whether it is a part of torch's backward of a convolution, which on a CPU lays out the gradient of the weight."""
    parent = event.cpu_parent
    return parent is not None and (parent.name == "aten::convolution_backward" or _is_library_s_own(parent))


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
    events = [(e.name, e.input_shapes[0]) for e in found.events() if e.input_shapes and not _is_library_s_own(e)]
    return events, [launch.kernel.__name__ for launch in launches]


@pytest.mark.parametrize("film", (False, True), ids=("", "film"))
@pytest.mark.parametrize("layout", (torch.contiguous_format, NHWC), ids=("nchw", "nhwc"))
def test_a_block_copies_no_activation(layout, film):
    """Nor a weight, which lies as the model was laid out, once. Forward and backward: norms read and write the layout
    that the convolutions take."""
    block = zb.nn.ResBlock(64, 32, 0.0, use_scale_shift_norm=film).bfloat16().to(memory_format=layout)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_()
    x = torch.randn(2, 64, 16, 16).bfloat16().to(memory_format=layout).requires_grad_()
    emb = torch.randn(2, 32).bfloat16()
    events, kernels = _events(block, x, emb, layout, backward=True)
    assert [e for e in events if e[0] in COPIES and e[1] == list(x.shape)] == []
    weights = [list(p.shape) for p in block.parameters() if p.dim() == 4]
    assert len(weights) == 2 and [e for e in events if e[0] in COPIES and e[1] in weights] == []
    assert sum(name == "aten::convolution" for name, _ in events) == 2
    assert kernels.count("_add_bias") == 1, "bias and residual of the second convolution"
    adds = [e for e in events if e[0] in ADDS and e[1] == list(x.shape)]
    assert len(adds) == (1 if film else 2), "the residual's gradient, and the embedding where it is added"


def test_the_copies_would_be_seen():
    """Of a block whose weights are channels-last, called with an image that is not; of a weight that is laid out."""
    block = zb.nn.ResBlock(64, 32, 0.0).to(memory_format=NHWC)
    x, emb, weight = torch.randn(2, 64, 16, 16), torch.randn(2, 32), block.out_layers[-1].weight
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        block(x, emb).contiguous(memory_format=NHWC)
        x.to(memory_format=NHWC)
        weight.contiguous()
    copied = [e.input_shapes[0] for e in found.events() if e.input_shapes and e.name in COPIES]
    assert list(x.shape) in copied and list(weight.shape) in copied


def _launched(way, grad):
    """Copies of weights, and what is launched, in a channels-last call of the own kernels."""
    from zeroblock.kernels import _launch

    h, residual = (torch.randn(2, 64, 8, 8).bfloat16().to(memory_format=NHWC).requires_grad_(grad) for _ in range(2))
    weight = torch.randn(128, 64, 3, 3).bfloat16()[:64].to(memory_format=NHWC).requires_grad_(grad)
    with planned_on_the_cpu() as patch, _plan.use("fixed"), _launch.recording(run=False) as launches:
        patch.setattr(TRITON, "device", "cpu")
        prefer(patch, way)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            y = zb.conv_residual(h, weight, None, residual, zero_skip="never")
            if grad:
                torch.autograd.grad(y, (h, weight, residual), torch.ones_like(y))
    names = [e.name for e in found.events() if e.input_shapes and e.input_shapes[0] == list(weight.shape)]
    return names.count("aten::copy_"), [launch.kernel.__name__ for launch in launches]


def test_own_convolutions_take_the_weight_as_it_lies():
    """The gradient by the input alone multiplies with mirrored taps, one copy of them."""
    assert _launched("triton 64x64x64", False) == (0, ["_conv_residual"])
    copies, kernels = _launched("triton 64x64x64", True)
    assert kernels.count("_conv_residual") == 2 and copies == 1


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
def test_the_rule_takes_the_kernels_that_read_an_image_once(backward, backends, monkeypatch):
    """A large channels-last group norm, where there are clusters: Triton's kernels would read it twice."""
    monkeypatch.setattr(one_read, "cluster_shared", lambda device: shared)
    step = norms_gates.GROUP_NORM_SILU_BWD if backward else norms_gates.GROUP_NORM_SILU

    def chosen(C, side, last=True):
        x = torch.empty(2, C, side, side, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last) if last else x
        stat, none = torch.empty(2, 32), [None] * 4
        if backward:
            return step._fixed(x, x, stat, stat, *none, 32, True).name
        return step._fixed(x, 32, None, None, 1e-5, None, None, True).name

    shared = 227 << 10
    assert [chosen(320, 64), chosen(640, 32)] == ["cuda"] * 2
    read_once_or_by_none = chosen(320, 64, last=False), chosen(1280, 8), chosen(960, 128)
    assert read_once_or_by_none == ("triton",) * 3
    assert chosen(960, 64) == ("triton" if backward else "cuda")
    shared = 0
    assert chosen(320, 64) == "triton"
