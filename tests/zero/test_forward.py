"""Rules 3, 4 and 10 of the zero contract: what a skipped branch returns, and that its matmuls really did not run."""

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import reference as ref
from zeroblock.testing import assert_bitwise_equal, counters, reset_counters

from ..twins import run
from .cases import CASES, TAILED, assert_parity, conv_branch, image, matmuls, same, was_skipped, zeroed

# The matmuls left in a zero phase. Training: the body once, for the gradient of the tail or the gate, and that.
INFERENCE = dict.fromkeys(CASES, {}) | {
    "ResBlock-add-1x1": {"conv": 1},  # the shortcut
}
TRAINING = {
    "ResBlock": {"conv": 1, "gemm": 1, "conv backward": 1},  # the GEMM embeds
    "ResBlock-add-1x1": {"conv": 2, "gemm": 1, "conv backward": 3},
    "ResBlock-down": {"conv": 1, "gemm": 1, "conv backward": 1},
    "DiTBlock": {"gemm": 7, "attention": 1},  # the modulation and its two gradients, and four that the gates need
    "FinalLayer": {"gemm": 2},
    "ResidualBranch-conv": {"conv": 1, "conv backward": 1},
    "ResidualBranch-linear": {"gemm": 2},
    "ResidualBranch-gate": {"gemm": 2},
    "ResidualBranch-conv-gate": {"conv": 2},
    "ReZero": {"gemm": 1},
    "ZeroConv2d": {"conv backward": 1},
    "ZeroLinear": {"gemm": 1},
    "FixupBasicBlock": {"conv": 1, "conv backward": 1},
}


# ---- rule 10: nothing ran -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_inference_runs_no_matmul(name):
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = case.example()
    with torch.no_grad():
        executed = {}
        assert was_skipped(case.counter, lambda: executed.update(matmuls(lambda: ours(*inputs))))
        assert executed == INFERENCE[name]
        assert sum(matmuls(lambda: theirs(*inputs)).values()) > sum(executed.values())


@pytest.mark.parametrize("name", CASES)
def test_training_runs_only_the_tails_gradient(name):
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = case.example()
    executed = {}
    assert was_skipped(case.counter, lambda: executed.update(matmuls(lambda: run(ours, inputs))))
    assert executed == TRAINING[name]
    assert sum(matmuls(lambda: run(theirs, inputs)).values()) > sum(executed.values())


@pytest.mark.parametrize("name", CASES)
def test_frozen_tail_and_gate_run_no_matmul_in_training(name):
    """Everything upstream still requires its gradient, and gets zeros."""
    case = CASES[name]
    ours, theirs = case.pair()
    for module in (ours, theirs):
        case.weight(module).requires_grad_(False)
        for frozen in ("gate", "scale", "adaLN_modulation.1.bias"):
            if frozen in dict(module.named_parameters()) and name != "FinalLayer":
                module.get_parameter(frozen).requires_grad_(False)
    inputs = case.example()
    if name == "DiTBlock":  # the modulation itself is computed, and its gates want no gradient only where c wants none
        inputs[1].requires_grad_(False)
    expected_y, expected = run(theirs, inputs)
    results = []
    executed = matmuls(lambda: results.append(run(ours, inputs)))
    shortcut = {"conv": 1, "conv backward": 2} if name == "ResBlock-add-1x1" else {}
    assert executed == ({"gemm": 1} if name == "DiTBlock" else shortcut)
    y, got = results[0]
    assert torch.equal(y, expected_y) and got.keys() == expected.keys()
    assert all(got[key].any() == g.any() for key, g in expected.items())


def test_counters_of_every_op_with_a_zero_path():
    torch.manual_seed(0)
    x, h, gate = torch.randn(1, 32, 5, 5), torch.randn(1, 5, 8), torch.randn(8)
    w, v = torch.zeros(32, 32, 3, 3, requires_grad=True), torch.zeros(8, 8, requires_grad=True)
    reset_counters()
    calls = (
        lambda: zb.conv_residual(x, w, None, x),
        lambda: zb.group_norm_silu_conv_residual(x, 8, None, None, w, None, x),
        lambda: zb.linear_gate_residual(h, v, None, gate, h),
    )
    assert all(matmuls(call) == {} for call in calls)
    ops = ("conv_residual", "group_norm_silu_conv_residual", "linear_gate_residual")
    assert counters() == dict.fromkeys(ops, (0, 1))
    executed = [matmuls(lambda call=call: call().sum().backward()) for call in calls]
    assert executed == [{"conv backward": 1}, {"conv backward": 1}, {"gemm": 1}]
    with torch.no_grad():
        w.view(-1)[-1] = v.view(-1)[-1] = 1.0
    assert [matmuls(call) for call in calls] == [{"conv": 1}, {"conv": 1}, {"gemm": 1}]


class Counted(nn.Module):
    """Counts its calls without a hook, which would stop the skip."""

    draws_random_numbers = False

    def __init__(self, module):
        super().__init__()
        self.module, self.calls, self.graphs = module, 0, 0

    def forward(self, x):
        self.calls += 1
        self.graphs += torch.is_grad_enabled()
        return self.module(x)


def test_body_runs_once_and_without_a_graph_for_a_trainable_tail():
    branch = conv_branch()
    branch.body = Counted(branch.body)
    branch(image()).sum().backward()
    assert (branch.body.calls, branch.body.graphs) == (1, 0)


@pytest.mark.parametrize("frozen", ["tail", "all but bias", "all but x"])
def test_body_of_a_frozen_tail_does_not_run(frozen):
    branch = conv_branch()
    branch.body = Counted(branch.body)
    branch.tail.weight.requires_grad_(False)
    if frozen != "tail":
        branch.requires_grad_(False)
    branch.tail.bias.requires_grad_(frozen == "all but bias")
    x = image(requires_grad=frozen != "all but bias")
    dy = torch.randn(2, 32, 6, 6)
    branch(x).backward(dy)
    assert branch.body.calls == 0
    if frozen == "all but bias":
        assert torch.equal(branch.tail.bias.grad, dy.sum((0, 2, 3)))
        assert x.grad is None
    else:
        assert_bitwise_equal(x.grad, dy)
    if frozen == "tail":
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in branch.body.parameters())


# ---- rule 3: the result ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("bias", ["random", "zero"])
@pytest.mark.parametrize("name", CASES)
def test_forward_is_eagers_to_the_bit(name, bias, grad):
    """Signs of zero included, as -0.0 + 0.0 is +0.0; for a zero gate they are unspecified."""
    case = CASES[name]
    ours, theirs = case.pair()
    tail_bias = case.tail.replace("weight", "bias")
    for module in (ours, theirs):
        if bias == "zero" and case.rows is None and tail_bias in dict(module.named_parameters()):
            module.get_parameter(tail_bias).data.zero_()
    inputs = case.example()
    for t in inputs:
        t.data.view(-1)[::3] = -0.0
    with torch.set_grad_enabled(grad):
        y, expected = ours(*inputs), theirs(*inputs)
    if name in TAILED:
        assert_bitwise_equal(y, expected)
    else:
        assert torch.equal(y, expected)
    assert y.stride() == expected.stride() and y.requires_grad == grad


@pytest.mark.parametrize(
    "name, grad",
    # Fixup ends in a ReLU, which eager autograd does not let anyone write to.
    [(name, grad) for name in CASES for grad in (False, True) if not (grad and name == "FixupBasicBlock")],
)
def test_consumers_may_add_in_place(name, grad):
    """ControlNet adds into the result; the inputs must not change and autograd must not raise."""
    case = CASES[name]
    ours, theirs = case.pair()
    before = [t.detach().clone() for t in case.example()]
    grads = []
    for module in (ours, theirs):
        inputs = case.example()
        with torch.set_grad_enabled(grad):
            y = module(*inputs)
            control = torch.full_like(y, 2.0)
            y += control
            y.mul_(2.0)
            if grad:
                y.sum().backward()
                grads.append(inputs[-1 if name.startswith("Zero") else 0].grad)
        for t, expected in zip(inputs, before, strict=True):
            assert_bitwise_equal(t.detach(), expected)
            assert y.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()
    if grad:
        assert torch.equal(*grads)


def permuted(x):
    return x.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": permuted,
    "strided slice": lambda x: torch.cat([x, x], 1)[:, ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=["nchw model", "nhwc model"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["ResBlock", "ResBlock-add-1x1", "ResidualBranch-conv", "ZeroConv2d"])
def test_memory_format_is_eagers(name, layout, weights, grad):
    case = CASES[name]
    ours, theirs = (m.to(memory_format=weights) for m in case.pair())
    inputs = [t.detach() for t in case.example()]
    inputs = [LAYOUTS[layout](t) if t.dim() == 4 else t for t in inputs]
    with torch.set_grad_enabled(grad):
        assert was_skipped(case.counter, lambda: ours(*inputs))
        same(ours(*inputs).detach(), theirs(*inputs).detach())
        if name == "ZeroConv2d":
            same(ours(inputs[0]).detach(), theirs(inputs[0]).detach())


@pytest.mark.parametrize("name", ["FinalLayer", "ReZero", "ResidualBranch-linear", "ZeroLinear"])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_token_strides_are_eagers(name, grad):
    """Patch embedding hands over [B, T, D] as a transposed [B, D, T]. (Transformer blocks: test_formats.py.)"""
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = [t.detach() for t in case.example()]
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    with torch.set_grad_enabled(grad):
        y, expected = ours(*inputs).detach(), theirs(*inputs).detach()
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ops_return_the_reference_to_the_bit(dtype, bias):
    """With and without a residual, negative zeros in it and in the bias."""
    torch.manual_seed(0)
    x, r = (image().to(dtype) for _ in range(2))
    h, q = (torch.randn(2, 5, 16).to(dtype) for _ in range(2))
    for t in (r, q):
        t.view(-1)[::3] = -0.0
    w, v = torch.zeros(32, 32, 3, 3, dtype=dtype), torch.full((16, 16), -0.0, dtype=dtype)
    b, c = (torch.tensor([-0.0, 0.5], dtype=dtype).repeat(n) if bias else None for n in (16, 8))
    for residual, other in ((r, q), (None, None)):
        calls = {
            "conv_residual": lambda ns, residual=residual: ns.conv_residual(x, w, b, residual),
            "group_norm_silu_conv_residual": lambda ns, residual=residual: ns.group_norm_silu_conv_residual(
                x, 8, None, None, w, b, residual
            ),
            "linear_gate_residual": lambda ns, other=other: ns.linear_gate_residual(h, v, c, None, other),
        }
        for op, call in calls.items():
            assert was_skipped(op, lambda call=call: call(zb)), op
            same(call(zb), call(ref), op)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_empty_batch(name, dtype):
    case = CASES[name]
    ours, theirs = case.pair(dtype)
    inputs = tuple(t[:0].detach().requires_grad_() for t in case.example(dtype))
    (y, got), (expected_y, expected) = run(ours, inputs), run(theirs, inputs)
    assert y.shape == expected_y.shape
    for key, g in expected.items():
        assert torch.equal(got[key], g), key


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_branch_that_does_not_fit_its_residual_raises(grad):
    """As it does once the weight is not zero any more."""
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError)):
        zb.nn.ResidualBranch(nn.Identity(), zeroed(nn.Linear(16, 8, bias=False)))(torch.randn(2, 5, 16))


def test_half_converted_unet_block():
    """guided-diffusion's fp16 training: only convolutions are halved, norms and embedding stay fp32."""
    case = CASES["ResBlock"]
    ours, theirs = case.pair()
    for module in (ours, theirs):
        for conv in (module.in_layers[2], module.out_layers[3]):
            conv.weight.data, conv.bias.data = conv.weight.data.half(), conv.bias.data.half()
    x, emb = case.example()
    assert_parity(case, ours, theirs, (x.detach().half().requires_grad_(), emb))
