"""What the tests of the zero contract share: the blocks, what they skipped, and which matmuls were executed."""

import copy
from collections import Counter

import torch
from torch import nn
from torch.profiler import profile

import zeroblock as zb
from zeroblock.testing import assert_bitwise_equal, assert_error_budget, counters, eager, reset_counters

from ..twins import Case, assert_gradients, judged, run

MATMULS = {
    "aten::convolution": "conv",
    "aten::convolution_backward": "conv backward",
    "aten::mm": "gemm",
    "aten::addmm": "gemm",
    "aten::bmm": "gemm",
    "aten::baddbmm": "gemm",
    "mkldnn::_linear_pointwise": "gemm",
    "zeroblock::_winograd_conv": "conv",  # of the gradient's, too
    "zeroblock::_winograd_weight_grad": "conv backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention backward",
}


def image(channels=32, size=6, **kwargs):
    return torch.randn(2, channels, size, size, **kwargs)


def conv_body(channels=32):
    return nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))


def linear_body(features=16):
    return nn.Sequential(nn.LayerNorm(features), nn.Linear(features, features), nn.GELU())


def zeroed(layer):
    return eager.zero_module(layer)


def conv_branch(ns=zb.nn, **kwargs):
    torch.manual_seed(0)
    return ns.ResidualBranch(conv_body(), zeroed(nn.Conv2d(32, 32, 3, padding=1)), **kwargs)


IMAGE, TOKENS, VECTOR = (2, 32, 6, 6), (2, 5, 16), (2, 16)
CASES = {
    "ResBlock": Case(
        lambda ns: ns.ResBlock(32, 16, 0.0, use_scale_shift_norm=True),
        (IMAGE, VECTOR),
        "out_layers.3.weight",
        "ResBlock",
    ),
    "ResBlock-add-1x1": Case(
        lambda ns: ns.ResBlock(32, 16, 0.0, out_channels=64),
        (IMAGE, VECTOR),
        "out_layers.3.weight",
        "ResBlock",
    ),
    "ResBlock-down": Case(
        lambda ns: ns.ResBlock(32, 16, 0.0, use_scale_shift_norm=True, down=True),
        (IMAGE, VECTOR),
        "out_layers.3.weight",
        "ResBlock",
    ),
    "DiTBlock": Case(
        lambda ns: ns.DiTBlock(16, 2),
        (TOKENS, VECTOR),
        "adaLN_modulation.1.weight",
        "DiTBlock",
        rows=(2, 5),
    ),
    "FinalLayer": Case(
        lambda ns: ns.FinalLayer(16, 2, 3),
        (TOKENS, VECTOR),
        "linear.weight",
        "FinalLayer",
    ),
    "ResidualBranch-conv": Case(
        lambda ns: ns.ResidualBranch(conv_body(), zeroed(nn.Conv2d(32, 32, 3, padding=1))),
        (IMAGE,),
        "tail.weight",
        "ResidualBranch",
    ),
    "ResidualBranch-linear": Case(
        lambda ns: ns.ResidualBranch(linear_body(), zeroed(nn.Linear(16, 16)), nn.Parameter(torch.randn(16))),
        (TOKENS,),
        "tail.weight",
        "ResidualBranch",
    ),
    "ResidualBranch-gate": Case(
        lambda ns: ns.ResidualBranch(linear_body(), nn.Linear(16, 16), nn.Parameter(torch.zeros(16))),
        (TOKENS,),
        "gate",
        "ResidualBranch",
    ),
    "ResidualBranch-conv-gate": Case(
        lambda ns: ns.ResidualBranch(conv_body(), nn.Conv2d(32, 32, 1), nn.Parameter(torch.zeros(32))),
        (IMAGE,),
        "gate",
        "ResidualBranch",
    ),
    "ReZero": Case(lambda ns: ns.ReZero(linear_body()), (TOKENS,), "resweight", "ReZero"),
    "ZeroConv2d": Case(lambda ns: ns.ZeroConv2d(32, 32, 3, padding=1), (IMAGE, IMAGE), "weight", "ZeroConv2d"),
    "ZeroLinear": Case(lambda ns: ns.ZeroLinear(16, 16), (TOKENS, TOKENS), "weight", "ZeroLinear"),
    "FixupBasicBlock": Case(lambda ns: ns.FixupBasicBlock(8, 8), ((2, 8, 6, 6),), "conv2.weight", "FixupBasicBlock"),
}
GATED = ["DiTBlock", "ResidualBranch-gate", "ResidualBranch-conv-gate", "ReZero"]  # zero by their gate
TAILED = [name for name in CASES if name not in GATED]


def assert_parity(case, ours, theirs, inputs, skipped=True, autocast=None):
    """Forward equal and gradients in budget, and the branch was skipped or executed as expected."""
    oracle = copy.deepcopy(theirs).double()
    wide = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)

    def sample(seed):
        exact_y, exact = run(oracle, wide, seed)
        expected_y, expected = run(theirs, inputs, seed, autocast)
        reset_counters()
        y, got = run(ours, inputs, seed, autocast)
        executed_count, skipped_count = counters()[case.counter]
        assert bool(skipped_count) == skipped and bool(executed_count) != skipped, counters()
        if skipped:
            assert torch.equal(y, expected_y)
        assert_error_budget(y, expected_y, exact_y, "y")
        return got, expected, exact

    judged(lambda seeds: assert_gradients(*map(sample, seeds)))


def was_skipped(name, fn):
    """Whether every branch that fn() met in the module `name` was skipped; it must have met one."""
    reset_counters()
    fn()
    executed, skipped = counters()[name]
    assert (executed == 0) != (skipped == 0), counters()
    return executed == 0


def matmuls(fn):
    """{kind: calls} of the convolutions, GEMMs and attentions that fn() executed, by the profiler."""
    with profile(record_shapes=True) as recorded:
        fn()
    calls = Counter()
    for event in recorded.events():
        if event.name in MATMULS:
            # A convolution's backward is up to two convolutions, as its output mask asks.
            wanted = event.concrete_inputs[-1][:2] if event.name.endswith("convolution_backward") else [True]
            calls[MATMULS[event.name]] += sum(wanted)
    return dict(calls)


def same(a, b, what="result"):
    """Bitwise, strides included."""
    assert_bitwise_equal(a, b, what)
    assert a.stride() == b.stride(), f"{what}: strides {a.stride()}, expected {b.stride()}"
