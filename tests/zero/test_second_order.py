"""Rule 8 of the zero contract: create_graph, checkpointing, torch.func transforms and forward-mode AD equal eager's."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import zeroblock as zb
from zeroblock import reference as ref
from zeroblock.testing import counters, eager, reset_counters

from ..twins import gradients
from .cases import CASES, conv_body, image, linear_body, was_skipped, zeroed

CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # of fp64 runs


@pytest.fixture(autouse=True)
def differentiable_attention():
    """Only the plain attention has a second derivative and a forward-mode one."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def penalty_grads(module, inputs):
    """Gradients of |1 + d(sum y^2 / 2)/dx|^2 with respect to everything."""
    y = module(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(y.square().sum() / 2, wanted, create_graph=True)
    penalty = sum((1 + g).square().sum() for g in found)
    return gradients(module, inputs, penalty, torch.ones_like(penalty))


@pytest.mark.parametrize("name", CASES)
def test_gradient_penalty_equals_eager(name):
    """d|dx|^2/dW is not zero although W is."""
    case = CASES[name]
    ours, theirs = case.pair(torch.float64)
    inputs = case.example(torch.float64)
    expected = penalty_grads(theirs, inputs)
    got = {}
    assert was_skipped(case.counter, lambda: got.update(penalty_grads(ours, inputs)))
    assert expected[case.tail].any()
    for key, g in expected.items():
        assert (got[key] is None) == (g is None), key
        if g is not None:
            torch.testing.assert_close(got[key], g, **CLOSE, msg=lambda m, key=key: f"{key}: {m}")


def test_gradient_penalty_under_autocast_equals_eager():
    case = CASES["ResBlock"]
    pair = case.pair()
    inputs = case.example()
    results = []
    for module in (*pair, case.pair()[1].double()):
        bf16 = module.in_layers[2].weight.dtype != torch.float64
        x, emb = inputs if bf16 else (t.detach().double().requires_grad_() for t in inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y = module(x, emb)
        (dx,) = torch.autograd.grad(y.float().square().sum() if bf16 else y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), module.out_layers[3].weight)[0])
    got, expected, exact = results
    zb.testing.assert_error_budget(got, expected, exact)


@pytest.mark.parametrize("op", ["conv_residual", "linear_gate_residual", "group_norm_silu_conv_residual"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_op_second_order_equals_reference(op, bias):
    torch.manual_seed(0)

    def leaf(*size, zero=False):
        return (torch.zeros(size) if zero else torch.randn(size)).double().requires_grad_()

    if op == "linear_gate_residual":
        tensors = [leaf(2, 3, 4), leaf(5, 4, zero=True), leaf(5) if bias else None, leaf(2, 5), leaf(2, 3, 5)]
        call = lambda ns, t: ns.linear_gate_residual(*t, activation="silu")  # noqa: E731
    elif op == "conv_residual":
        tensors = [leaf(2, 4, 5, 5), leaf(3, 4, 3, 3, zero=True), leaf(3) if bias else None, leaf(2, 3, 5, 5)]
        call = lambda ns, t: ns.conv_residual(*t)  # noqa: E731
    else:
        tensors = [leaf(2, 4, 5, 5), leaf(4), leaf(4), leaf(3, 4, 3, 3, zero=True), leaf(3) if bias else None]
        tensors += [leaf(2, 3, 5, 5), leaf(2, 4), leaf(2, 4)]
        call = lambda ns, t: ns.group_norm_silu_conv_residual(t[0], 2, *t[1:6], scale=t[6], shift=t[7])  # noqa: E731
    leaves = [t for t in tensors if t is not None]

    def second(ns):
        y = call(ns, tensors)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    results = {}
    assert was_skipped(op, lambda: results.update(ours=second(zb)))
    for a, b in zip(results["ours"], second(ref), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", ["ResidualBranch-linear", "ResidualBranch-gate", "ReZero", "ZeroLinear", "FinalLayer"])
def test_gradcheck_and_gradgradcheck(name):
    """Around the inputs: a perturbed weight is dense, so finite differences cannot see the skipped branch's own."""
    case = CASES[name]
    ours, _ = case.pair(torch.float64)
    inputs = tuple(t[:1, :2].detach().requires_grad_() if t.dim() == 3 else t[:1] for t in case.example(torch.float64))
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


def test_gradcheck_by_the_zero_weight():
    """Finite differences step out of the zero phase and must find the slope that the skipped backward gives."""
    torch.manual_seed(0)
    branch = zb.nn.ResidualBranch(linear_body(4), zeroed(nn.Linear(4, 4)), torch.randn(4)).double()
    x = torch.randn(1, 2, 4).double()
    weight = branch.tail.weight

    y = branch(x)
    for k in range(0, weight.numel(), 3):
        with torch.no_grad():
            weight.view(-1)[k] = 1e-6
            slope = (branch(x) - y) / 1e-6
            weight.view(-1)[k] = 0
        dy = torch.randn_like(y)
        (dw,) = torch.autograd.grad(branch(x), weight, dy)
        torch.testing.assert_close(dw.view(-1)[k], (slope * dy).sum(), rtol=1e-7, atol=1e-7)


# ---- activation checkpointing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen tail"])
@pytest.mark.parametrize("name", ["ResBlock", "DiTBlock", "ResidualBranch-conv", "ZeroConv2d", "FinalLayer"])
def test_checkpoint_gives_eagers_gradients(name, reentrant, frozen):
    """The first pass of a reentrant checkpoint runs without gradients and may skip more than the recomputation."""
    case = CASES[name]
    results = []
    for module in case.pair(torch.float64):
        case.weight(module).requires_grad_(not frozen)
        inputs = case.example(torch.float64)
        y = checkpoint(module, *inputs, use_reentrant=reentrant)
        y.square().sum().backward()
        results.append((y, *(t.grad for t in inputs), *(p.grad for p in module.parameters())))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, **CLOSE)


def test_checkpoint_of_the_blocks_own():
    pair = [ns.ResBlock(32, 16, 0.0, use_checkpoint=True).double() for ns in (zb.nn, eager)]
    pair[1].load_state_dict(pair[0].state_dict())
    inputs = CASES["ResBlock"].example(torch.float64)
    for module in pair:
        module(*inputs).square().sum().backward()
    for (key, a), b in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE, msg=key)
    assert pair[0].out_layers[3].weight.grad.any()


# ---- torch.func and forward-mode AD: equal to eager, nothing skipped -------------------------------------------------


def skips(fn):
    reset_counters()
    fn()
    return any(skipped for _, skipped in counters().values())


TRANSFORMED = ["ResBlock", "DiTBlock", "ResidualBranch-conv", "ResidualBranch-gate", "ZeroConv2d", "FinalLayer"]


@pytest.mark.parametrize("name", TRANSFORMED)
def test_func_grad_of_the_weights(name):
    case = CASES[name]
    inputs = tuple(t.detach() for t in case.example(torch.float64))
    results = []
    for module in case.pair(torch.float64):
        parameters = {n: p.detach() for n, p in module.named_parameters()}
        loss = lambda p, module=module: functional_call(module, p, inputs).square().sum()  # noqa: E731
        assert not skips(lambda loss=loss, parameters=parameters: results.append(grad(loss)(parameters)))
    assert results[0][case.tail].any()
    for key in results[1]:
        torch.testing.assert_close(results[0][key], results[1][key], **CLOSE)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_vmap_over_samples_and_weights(name):
    """Per-sample weights, one of them zero: no Python branch may decide for all."""
    case = CASES[name]
    inputs = tuple(t.detach() for t in case.example(torch.float64))
    results = []
    for module in case.pair(torch.float64):
        parameters = {n: torch.stack([p.detach(), p.detach() + 0.1]) for n, p in module.named_parameters()}
        call = lambda p, module=module: functional_call(module, p, inputs)  # noqa: E731
        assert not skips(lambda call=call, parameters=parameters: results.append(vmap(call)(parameters)))
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_jvp_and_forward_mode(name):
    case = CASES[name]
    inputs = tuple(t.detach() for t in case.example(torch.float64))
    tangents = tuple(torch.ones_like(t) for t in inputs)
    results = []
    for module in case.pair(torch.float64):
        weight = case.weight(module)
        assert not skips(lambda module=module: results.append(jvp(module, inputs, tangents)[1]))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
            outputs = []
            assert not skips(lambda m=module, duals=duals, outputs=outputs: outputs.append(m(*duals)))
            results.append(forward_ad.unpack_dual(outputs[0]).tangent)
        parameters = {n: p.detach() for n, p in module.named_parameters()}
        of_weight = lambda w, m=module, p=parameters: functional_call(m, p | {case.tail: w}, inputs)  # noqa: E731
        results.append(jvp(of_weight, (weight.detach(),), (torch.ones_like(weight),))[1])
        assert results[-1].any()
    for a, b in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_functional_call_outside_transforms(name):
    """Zero weights come from the arguments, the module's own are not zero; create_graph must use the arguments too."""
    case = CASES[name]
    inputs = case.example(torch.float64)
    results = []
    for module in case.pair(torch.float64):
        given = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(0.5)
        y = functional_call(module, given, inputs)
        found = torch.autograd.grad(y.square().sum(), [*inputs, *given.values()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in found), [*given.values()], allow_unused=True)
        results.append([y, *found, *second])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, **CLOSE)


def test_ops_do_not_skip_under_transforms():
    torch.manual_seed(0)
    x, w = image(), torch.zeros(32, 32, 3, 3)
    h, v = torch.randn(1, 5, 8), torch.zeros(8, 8)
    assert not skips(lambda: grad(lambda w: zb.conv_residual(x, w, None, x).sum())(w))
    assert not skips(lambda: grad(lambda w: zb.group_norm_silu_conv_residual(x, 8, None, None, w, None, x).sum())(w))
    dv = grad(lambda v: zb.linear_gate_residual(h, v, None, None, h).sum())(v)
    torch.testing.assert_close(dv, h.sum((0, 1)).expand(8, 8))
    assert not skips(lambda: conv_jvp(x, w))


def conv_jvp(x, w):
    body = conv_body()
    tangent = jvp(lambda w: zb.conv_residual(body(x), w, None, x), (w,), (torch.ones_like(w),))[1]
    assert tangent.any()
