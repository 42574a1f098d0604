"""Rules 5 and 7 of the zero contract: gradients equal eager's, zeros are real tensors, inf and NaN do not spread."""

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import reference as ref
from zeroblock.testing import assert_bitwise_equal, assert_error_budget, eager

from ..twins import assert_gradients, random_like, run
from .cases import CASES, TAILED, assert_parity, conv_branch, image, was_skipped

# ---- rule 5: equal to eager's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_eager(name, phase):
    case = CASES[name]
    ours, theirs = case.pair()
    if phase == "dense":
        torch.manual_seed(3)
        fresh = torch.randn_like(case.weight(ours)) * 0.3
        for module in (ours, theirs):
            case.weight(module).data.copy_(fresh)
    assert_parity(case, ours, theirs, case.example(), skipped=phase == "zero")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_eager_in_half_precision(name, dtype):
    case = CASES[name]
    ours, theirs = case.pair(dtype)
    assert_parity(case, ours, theirs, case.example(dtype))


@pytest.mark.parametrize("name", ["ResBlock", "ResidualBranch-conv", "ZeroConv2d"])
def test_gradients_equal_eager_channels_last(name):
    case = CASES[name]
    ours, theirs = (m.to(memory_format=torch.channels_last) for m in case.pair())
    inputs = [t.detach().contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in case.example()]
    assert_parity(case, ours, theirs, tuple(t.requires_grad_() for t in inputs))


@pytest.mark.parametrize("name", [name for name in CASES if name != "FinalLayer"])
def test_dx_through_the_shortcut_is_eagers_to_the_bit(name):
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = case.example()
    i = len(inputs) - 1 if name.startswith("Zero") else 0
    assert_bitwise_equal(run(ours, inputs)[1][f"input {i}"], run(theirs, inputs)[1][f"input {i}"])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["conv_residual", "group_norm_silu_conv_residual", "linear_gate_residual"])
def test_op_gradients_equal_the_references(op, dtype, bias):
    torch.manual_seed(0)

    def leaf(*size, value=None):
        return torch.randn(size) if value is None else torch.full(size, value)

    if op == "linear_gate_residual":
        inputs = {"h": leaf(2, 5, 16), "weight": leaf(24, 16, value=-0.0), "bias": leaf(24) if bias else None}
        inputs |= {"gate": leaf(2, 24), "residual": leaf(2, 5, 24)}
        options = {"activation": "gelu_tanh"}
    else:
        inputs = {"weight": leaf(8, 16, 3, 3, value=0.0), "bias": leaf(8) if bias else None}
        inputs |= {"residual": leaf(2, 8, 6, 5), ("h" if op == "conv_residual" else "x"): leaf(2, 16, 6, 5)}
        options = {}
    if op == "group_norm_silu_conv_residual":
        inputs |= {"norm_weight": leaf(16), "norm_bias": leaf(16), "scale": leaf(2, 16), "shift": leaf(2, 16)}
        options = {"num_groups": 4}

    def step(ns, dtype):
        leaves = {n: t if t is None else t.to(dtype).requires_grad_() for n, t in inputs.items()}
        y = getattr(ns, op)(**leaves, **options)
        wanted = {n: t for n, t in leaves.items() if t is not None}
        found = torch.autograd.grad(y, list(wanted.values()), random_like(y))
        return dict(zip(wanted, found, strict=True))

    got = {}
    assert was_skipped(op, lambda: got.update(step(zb, dtype)))
    assert_gradients((got, step(ref, dtype), step(ref, torch.float64)))
    assert sum(bool(g.any()) for g in got.values()) == 2 + bias + (bias and op == "linear_gate_residual")


# ---- rule 5: zeros are tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_upstream_gradients_are_zero_tensors_and_hooks_receive_them(name):
    case = CASES[name]
    ours, _ = case.pair()
    seen = {}
    for key, p in ours.named_parameters():
        p.register_hook(lambda g, key=key: seen.__setitem__(key, g))
        p.register_post_accumulate_grad_hook(lambda p, key=key: seen.__setitem__(f"after {key}", p.grad))
    inputs = case.example()
    ours(*inputs).square().sum().backward()
    assert all(isinstance(g, torch.Tensor) for g in seen.values()) and len(seen) == 2 * len(list(ours.parameters()))
    assert all(t.grad is not None and t.grad.shape == t.shape and t.grad.dtype == t.dtype for t in inputs)
    assert all(p.grad.shape == p.shape and p.grad.dtype == p.dtype for p in ours.parameters())


def test_zero_gradients_are_fresh():
    """Optimizers, clipping and scalers write into gradients: no two may share memory, now or at the next backward."""
    case = CASES["ResBlock"]
    ours, _ = case.pair()
    for _ in range(2):
        ours.zero_grad()
        ours(*case.example()).sum().backward()
        grads = [p.grad for p in ours.parameters()]
        assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)
        assert not ours.in_layers[2].weight.grad.any()
        for g in grads:
            g.fill_(7.0)
    inputs = case.example()
    grads = torch.autograd.grad(ours(*inputs).sum(), [*inputs, *ours.parameters()])
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)


DIRECT = ("out_layers.3.bias", "bias2b")  # these have a gradient that is not zero
OPTIMIZERS = {
    "SGD momentum decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["ResBlock", "ResidualBranch-gate", "FixupBasicBlock"])
def test_optimizer_trajectory_of_upstream_parameters_is_eagers_to_the_bit(name, optimizer):
    """Zero gradients, unlike missing ones, decay weights and momenta and count steps. The first gradient is given."""
    case = CASES[name]
    finals = []
    for module in case.pair():
        tail = case.weight(module)
        upstream = [p for n, p in module.named_parameters() if p is not tail and n not in DIRECT]
        step = OPTIMIZERS[optimizer](upstream)
        for p in upstream:
            p.grad = torch.full_like(p, 0.5)
        for _ in range(4):
            step.step()
            module.zero_grad()
            module(*case.example()).square().sum().backward()
        finals.append(upstream)
    for a, b in zip(*finals, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("name", ["ResBlock", "DiTBlock"])
def test_gradient_accumulation(name):
    """Micro-batches add up in the zero phase, and across its end."""
    case = CASES[name]
    pair = case.pair(torch.float64)
    for module in pair:
        for seed in range(3):
            inputs = tuple(t.double() for t in case.example(seed=seed))
            module(*inputs).square().sum().backward()
            if seed == 1:
                case.weight(module).data.fill_(0.5)
    for (key, a), b in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=key)


def test_partial_backward_asks_only_for_what_is_wanted():
    branch = conv_branch()
    x = image(requires_grad=True)
    y = branch(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert_bitwise_equal(dx, dy)
    (dw,) = torch.autograd.grad(y, branch.tail.weight, dy, retain_graph=True)
    assert dw.any()
    (dnorm,) = torch.autograd.grad(y, branch.body[0].weight, dy)
    assert torch.equal(dnorm, torch.zeros(32))


def test_deepcopy_and_unused_output():
    branch = copy.deepcopy(conv_branch())
    x = image(requires_grad=True)
    y = branch(x)
    (x * 2).sum().backward()
    assert branch.tail.weight.grad is None and y.requires_grad


# ---- rule 7: non-finite values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ResBlock", "ResidualBranch-conv", "DiTBlock", "ReZero"])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_inf_in_x_stays_where_it_is(name, grad):
    case = CASES[name]
    ours, theirs = case.pair()
    inputs = case.example()
    inputs[0].data.view(-1)[3] = float("inf")
    with torch.set_grad_enabled(grad):
        y, expected = ours(*inputs), theirs(*inputs)
        assert torch.equal(y.isfinite(), inputs[0].isfinite())
        assert expected.isnan().any()
        ours.zero_skip = "never"
        assert torch.equal(ours(*inputs).isnan(), expected.isnan())


@pytest.mark.parametrize("name", TAILED)
def test_never_runs_every_matmul(name):
    case = CASES[name]
    ours, theirs = case.pair()
    ours.zero_skip = "never"
    inputs = case.example()
    y, got = run(ours, inputs)
    expected_y, expected = run(theirs, inputs)
    assert_error_budget(y, expected_y, run(theirs.double(), tuple(t.double() for t in inputs))[0])
    assert all(torch.equal(got[key], g) for key, g in expected.items() if not g.any())
    inputs[0].data.fill_(float("nan"))
    assert ours(*inputs).isnan().all()


def scaler_skips_the_step(module):
    """Whether a GradScaler finds an inf after a backward through a body that overflows."""
    with torch.no_grad():
        module.body[2].weight.fill_(1e38)
    module.tail.requires_grad_(False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    scaler.scale(module(image() * 1e3).square().mean()).backward()
    scaler.unscale_(optimizer)
    found = sum(v.item() for v in scaler._found_inf_per_device(optimizer).values())
    return bool(found)


def test_frozen_zero_tail_reports_no_found_inf():
    assert scaler_skips_the_step(conv_branch(eager))
    assert not scaler_skips_the_step(conv_branch())
    never = conv_branch()
    never.zero_skip = "never"
    assert scaler_skips_the_step(never)


def test_overflow_in_the_body_reaches_a_trainable_tails_gradient():
    """So a loss scaler still sees the overflow that eager sees."""
    branch = conv_branch()
    with torch.no_grad():
        branch.body[2].weight.fill_(1e38)
    y = branch(image() * 1e3)
    assert y.isfinite().all()
    y.sum().backward()
    assert not branch.tail.weight.grad.isfinite().all()


class _Unused(nn.Module):
    """Has a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("tail", ["zero", "dense"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable tail", "frozen tail"])
def test_parameters_that_a_body_does_not_use(tail, trainable):
    """Rule 5: eager has no gradient of them; neither has a dense branch, and a zero one has zeros."""
    branch = zb.nn.ResidualBranch(_Unused(), nn.Linear(16, 16))
    branch.tail.requires_grad_(trainable)
    if tail == "zero":
        nn.init.zeros_(branch.tail.weight)
    branch(torch.randn(2, 5, 16, requires_grad=True)).sum().backward()
    assert branch.body.used.weight.grad is not None
    assert [p.grad is None for p in branch.body.unused.parameters()] == [tail == "dense"] * 2
    assert tail == "dense" or not any(p.grad.any() for p in branch.body.parameters())
