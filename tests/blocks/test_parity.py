"""Every module against its eager counterpart: constructor, state_dict, forward, every gradient, saved bytes, copies."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.testing import eager

from ..twins import EAGER, results
from .cases import CASES, DTYPES, NEVER_SKIPPED, PHASES, check, pair


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name, dtype", [(n, d) for n, c in CASES.items() for d in DTYPES if c.half or d == "fp32"])
def test_matches_eager(name, dtype, phase):
    block, oracle, inputs = pair(name, phase, DTYPES[dtype])
    testing.reset_counters()
    check(block, oracle, inputs)
    skipped = sum(s for _, s in testing.counters().values())
    assert (skipped > 0) == (phase == "zero" and name not in NEVER_SKIPPED)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_matches_eager_without_gradients(name, phase):
    block, oracle, inputs = pair(name, phase)
    exact = copy.deepcopy(oracle).double()
    before = [t.clone() for t in inputs]
    with torch.no_grad():
        for mode in (True, False):
            ys = []
            for module, tensors in ((block, inputs), (oracle, inputs), (exact, [t.double() for t in inputs])):
                torch.manual_seed(3)
                ys.append(module.train(mode)(*tensors))
            assert ys[0].stride() == ys[1].stride()
            testing.assert_error_budget(*ys, f"training={mode}")
            assert all(ys[0].data_ptr() != t.data_ptr() for t in inputs), "the result must be a fresh tensor"
    for t, kept in zip(inputs, before, strict=True):
        testing.assert_bitwise_equal(t, kept, "input")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("weights", ["weights-nchw", "weights-nhwc"])
@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if len(c.shapes[0]) in (4, 5) and "checkpoint" not in n and c.half]
)
def test_matches_eager_channels_last(name, weights, phase):
    block, oracle, inputs = pair(name, phase)
    layout = torch.channels_last if inputs[0].dim() == 4 else torch.channels_last_3d
    inputs = [t.to(memory_format=layout) if t.dim() >= 4 else t for t in inputs]
    if weights == "weights-nhwc":
        for m in (*block.modules(), *oracle.modules()):  # of their parameters some have a dimension less: no format
            if isinstance(m, (nn.Conv2d, nn.Conv3d)):
                m.to(memory_format=layout)
    check(block, oracle, inputs)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if n.startswith("ResBlock") and c.half])
def test_matches_eager_with_half_convolutions(name, phase):
    """guided-diffusion's fp16 mode: the convolutions and x in fp16, norms, embedding layer and embedding in fp32."""
    block, oracle, inputs = pair(name, phase)
    for module in (block, oracle):
        for m in module.modules():
            if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                m.half()
    check(block, oracle, [inputs[0].half(), inputs[1]])


@pytest.mark.parametrize("name", CASES)
def test_state_dict_and_parameter_order(name):
    block, oracle, inputs = pair(name, "dense")
    assert list(block.state_dict()) == list(oracle.state_dict())
    for (key, a), (other, b) in zip(block.named_parameters(), oracle.named_parameters(), strict=True):
        assert (key, a.shape, a.dtype) == (other, b.shape, b.dtype)
    fresh = CASES[name].build(zb.nn)
    fresh.load_state_dict(oracle.state_dict())
    torch.manual_seed(3)
    expected = block(*inputs)
    torch.manual_seed(3)
    testing.assert_bitwise_equal(fresh(*inputs), expected)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("Zero")])
def test_same_seed_gives_eager_initial_weights(name):
    torch.manual_seed(11)
    block = CASES[name].build(zb.nn)
    torch.manual_seed(11)
    oracle = CASES[name].build(EAGER)
    for (key, a), b in zip(block.state_dict().items(), oracle.state_dict().values(), strict=True):
        testing.assert_bitwise_equal(a, b, key)


@pytest.mark.parametrize("name", ["ResBlock", "DiTBlock", "FinalLayer", "FixupBasicBlock", "FixupBottleneck", "ReZero"])
def test_constructor_is_eagers(name):
    ours, theirs = (inspect.signature(getattr(ns, name)).parameters.values() for ns in (zb.nn, eager))
    ours = [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY]
    assert ours == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("name", CASES)
def test_copies_conversions_and_printing(name):
    block, oracle, inputs = pair(name, "zero")
    torch.manual_seed(3)
    expected = block(*inputs)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(twin) is type(block)
        torch.manual_seed(3)
        testing.assert_bitwise_equal(twin(*inputs), expected)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.parameters(), block.parameters(), strict=True))
    assert all(key in repr(block) for key, _ in block.named_children()) and type(block).__name__ in repr(block)
    for dtype in (torch.float16, torch.bfloat16) if CASES[name].half else ():
        assert copy.deepcopy(block).to(dtype)(*(t.to(dtype) for t in inputs)).dtype == dtype
    got, exact = (results(module.double(), [t.double() for t in inputs]) for module in (block, oracle))
    for key, value in exact.items():
        torch.testing.assert_close(got[key], value, msg=lambda text, key=key: f"fp64 {key}: {text}")


def _saved(block: nn.Module, inputs: list[torch.Tensor]) -> int:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    exclude = [*leaves, *block.parameters()]
    return testing.saved_activation_bytes(lambda: block(*leaves), exclude)


@pytest.mark.parametrize("name", [n for n in CASES if "checkpoint" not in n])
def test_zero_phase_saves_no_more_than_dense(name):
    zero, _, inputs = pair(name, "zero")
    dense, oracle, _ = pair(name, "dense")
    assert _saved(zero, inputs) <= _saved(dense, inputs) <= _saved(oracle, inputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("film", [False, True], ids=["add", "film"])
def test_resblock_saves_a_quarter_of_eager(film, phase, layout):
    torch.manual_seed(0)
    block, oracle = (ns.ResBlock(64, 32, 0.0, use_scale_shift_norm=film) for ns in (zb.nn, eager))
    if phase == "dense":
        nn.init.normal_(block.out_layers[3].weight, std=0.1)
    oracle.load_state_dict(block.state_dict())
    inputs = [torch.randn(4, 64, 16, 16).to(memory_format=layout), torch.randn(4, 32)]
    assert _saved(block, inputs) <= 0.25 * _saved(oracle, inputs)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("VideoResBlock")])
def test_video_block_saves_a_third_of_eager(name):
    block, oracle, inputs = pair(name, "dense")
    assert _saved(block, inputs) <= 0.33 * _saved(oracle, inputs)


@pytest.mark.parametrize("phase", PHASES)
def test_dit_block_saves_seven_tenths_of_eager(phase):
    torch.manual_seed(0)
    block, oracle = (ns.DiTBlock(96, 4) for ns in (zb.nn, eager))
    if phase == "dense":
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    oracle.load_state_dict(block.state_dict())
    inputs = [torch.randn(4, 64, 96), torch.randn(4, 96)]
    assert _saved(block, inputs) <= 0.7 * _saved(oracle, inputs)
