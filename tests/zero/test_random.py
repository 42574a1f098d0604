"""Rule 6 of the zero contract: the random stream, and the masks, are eager's, whether or not anything is skipped."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeroblock as zb
from zeroblock.testing import assert_bitwise_equal, assert_error_budget, eager

from ..twins import gradients, run
from .cases import image, linear_body, was_skipped, zeroed

DIMS = {1: (2, 32, 9), 2: (2, 32, 6, 5), 3: (2, 32, 2, 3, 4)}


def blocks(p, dtype=torch.float32, layout=torch.contiguous_format, dims=2, **kwargs):
    """(ours, eager, eager in fp64) with the same weights."""
    modules = []
    for ns in (zb.nn, eager, eager):
        torch.manual_seed(0)
        modules.append(ns.ResBlock(32, 16, p, dims=dims, **kwargs))
        modules[-1].load_state_dict(modules[0].state_dict())
    if dims == 2:
        modules[:2] = [m.to(memory_format=layout) for m in modules[:2]]
    return *(m.to(dtype) for m in modules[:2]), modules[2].double()


def example(dtype=torch.float32, layout=torch.contiguous_format, dims=2):
    torch.manual_seed(1)
    x, emb = torch.randn(DIMS[dims]).to(dtype), torch.randn(2, 16).to(dtype)
    return (x.contiguous(memory_format=layout) if dims == 2 else x).requires_grad_(), emb.requires_grad_()


def seeded(fn, seed=5):
    """(result, random state after it, the next draw)"""
    torch.manual_seed(seed)
    result = fn()
    return result, torch.get_rng_state(), torch.rand(3)


def assert_same_stream(fns, seed=5):
    """Runs both from one seed, checks that they leave the stream alike, and returns their results."""
    (a, state, draw), (b, expected_state, expected_draw) = (seeded(fn, seed) for fn in fns)
    assert torch.equal(state, expected_state)
    assert_bitwise_equal(draw, expected_draw)
    return a, b


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("phase", ["zero", "dense"])
def test_stream_and_mask_are_eagers(p, train, layout, dtype, phase):
    """dW sees the mask: had it been another one, dW would be far off."""
    ours, theirs, exact = (m.train(train) for m in blocks(p, dtype, layout, use_scale_shift_norm=True))
    if phase == "dense":
        torch.manual_seed(4)
        w = torch.randn_like(exact.out_layers[3].weight) * 0.2
        for m in (ours, theirs, exact):
            m.out_layers[3].weight.data.copy_(w)
    inputs = example(dtype, layout)
    skipped = []
    fns = lambda: skipped.append(was_skipped("ResBlock", lambda: ours(*inputs))), lambda: theirs(*inputs)  # noqa: E731
    assert_same_stream(fns)
    assert skipped == [phase == "zero"]
    (y, got), (expected_y, expected) = assert_same_stream((lambda: run(ours, inputs), lambda: run(theirs, inputs)))
    wide = tuple(t.detach().to(torch.float64, memory_format=torch.preserve_format).requires_grad_() for t in inputs)
    exact_dw = seeded(lambda: run(exact.to(memory_format=layout), wide))[0][1]["out_layers.3.weight"]
    assert_error_budget(got["out_layers.3.weight"], expected["out_layers.3.weight"], exact_dw)
    if p == 1.0 and train:
        assert not got["out_layers.3.weight"].any()
    if phase == "zero":
        assert torch.equal(y, expected_y)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("options", [{}, {"up": True}, {"down": True}, {"out_channels": 64}], ids=str)
def test_stream_in_every_shape_of_a_resblock(dims, options):
    ours, theirs, _ = blocks(0.3, dims=dims, **options)
    inputs = tuple(t.detach() for t in example(dims=dims))
    a, b = assert_same_stream((lambda: ours(*inputs), lambda: theirs(*inputs)))
    assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["no grad", "frozen tail", "inference mode"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_stream_when_the_body_is_skipped_too(how, layout):
    ours, theirs, _ = blocks(0.3, layout=layout)
    inputs = example(layout=layout)
    if how == "frozen tail":
        for m in (ours, theirs):
            m.out_layers[3].requires_grad_(False)
    context = {"no grad": torch.no_grad, "inference mode": torch.inference_mode}.get(how, torch.enable_grad)
    with context():
        skipped = []
        fns = (
            lambda: skipped.append(was_skipped("ResBlock", lambda: ours(*inputs))),
            lambda: theirs(*inputs),
        )
        assert_same_stream(fns)
    assert skipped == [True]


def test_backward_draws_nothing():
    ours, _, _ = blocks(0.3)
    y = ours(*example())
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_mask_survives_a_checkpoint(reentrant):
    ours, theirs, _ = blocks(0.3)
    ours, theirs = ours.double(), theirs.double()
    inputs = example(torch.float64)

    def step(m):
        checkpoint(m, *inputs, use_reentrant=reentrant).square().sum().backward()
        return m.out_layers[3].weight.grad

    a, b = assert_same_stream((lambda: step(ours), lambda: step(theirs)))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.3, self.training)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


RANDOM = {
    "Dropout": lambda: nn.Dropout(0.3),
    "Dropout p=0": lambda: nn.Dropout(0.0),
    "Dropout p=1": lambda: nn.Dropout(1.0),
    "AlphaDropout": lambda: nn.AlphaDropout(0.3),
    "RReLU": nn.RReLU,
    "F.dropout": FunctionalDropout,
    "noise": Noise,
    "attention dropout": SelfAttention,
}


def random_branch(ns, layer, gate=None):
    torch.manual_seed(0)
    body = nn.Sequential(linear_body(), RANDOM[layer]())
    return ns.ResidualBranch(body, zeroed(nn.Linear(16, 16)), gate).double()


@pytest.mark.parametrize("layer", RANDOM)
@pytest.mark.parametrize("mode", ["training", "frozen tail", "no grad", "eval"])
def test_stream_of_a_random_body(layer, mode):
    """A body that draws leaves the stream as eager does, also where its result is not needed."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, 16).double().requires_grad_()

    def step(ns):
        branch = random_branch(ns, layer).train(mode != "eval")
        branch.tail.requires_grad_(mode != "frozen tail")
        torch.manual_seed(6)
        with torch.set_grad_enabled(mode != "no grad"):
            y = branch(x)
        return y, run(branch, (x,))[1] if mode == "training" else {}

    (y, got), (expected_y, expected) = assert_same_stream((lambda: step(zb.nn), lambda: step(eager)))
    assert torch.equal(y, expected_y)
    for key, g in expected.items():
        torch.testing.assert_close(got[key], g, rtol=1e-12, atol=1e-12, msg=key)


class AlwaysNoise(nn.Module):
    """Draws in eval mode too, and says so."""

    draws_random_numbers = True

    def forward(self, x):
        return x + torch.randn_like(x)


class Silent(AlwaysNoise):
    draws_random_numbers = None  # says nothing


def noisy(ns, what, noise):
    """A zero branch that draws in its body, its attention or its block's attention."""
    torch.manual_seed(0)
    if what == "ResidualBranch":
        module = ns.ResidualBranch(nn.Sequential(linear_body(), noise()), zeroed(nn.Linear(16, 16)))
    elif what == "gate":
        gate = nn.Parameter(torch.zeros(1))
        module = ns.ResidualBranch(nn.Sequential(linear_body(), noise()), nn.Linear(16, 16), gate)
    elif what == "ReZero":
        module = ns.ReZero(nn.Sequential(linear_body(), noise()))
    else:
        module = ns.DiTBlock(16, 2)
        module.attn = nn.Sequential(module.attn, noise())
    return module.double().eval()


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("what", ["ResidualBranch", "gate", "ReZero", "DiTBlock"])
def test_stream_of_a_body_that_draws_in_eval_mode(what, gradients):
    """Rule 6: a module that declares it is called in eval mode too, whatever its branch is."""
    torch.manual_seed(1)
    inputs = (torch.randn(2, 5, 16).double(), *([torch.randn(2, 16).double()] if what == "DiTBlock" else []))
    with torch.set_grad_enabled(gradients):
        y, expected = assert_same_stream([lambda ns=ns: noisy(ns, what, AlwaysNoise)(*inputs) for ns in (zb.nn, eager)])
    assert torch.equal(y, expected)


def test_a_body_that_says_nothing_is_taken_to_draw_nothing_in_eval_mode():
    """As the contract says: it is skipped, and the stream shifted if it draws all the same."""
    x = torch.randn(2, 5, 16).double()
    with torch.no_grad():
        branch = noisy(zb.nn, "ResidualBranch", Silent)
        assert was_skipped("ResidualBranch", lambda: branch(x))
        before = torch.get_rng_state()
        branch(x)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["ResBlock", "Dropout", "F.dropout", "attention dropout"])
def test_create_graph_replays_the_masks(kind):
    """And the replay leaves no trace in the stream."""
    inputs = example(torch.float64) if kind == "ResBlock" else (torch.randn(2, 5, 16).double().requires_grad_(),)

    def step(ns):
        module = blocks(0.3, torch.float64)[ns is eager] if kind == "ResBlock" else random_branch(ns, kind)
        torch.manual_seed(6)
        y = module(*inputs)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (dx,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
            penalty = (1 + dx).square().sum()
            return gradients(module, inputs, penalty, torch.ones_like(penalty))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        got, expected = assert_same_stream((lambda: step(zb.nn), lambda: step(eager)))
    for key, g in expected.items():
        torch.testing.assert_close(got[key], g, rtol=1e-9, atol=1e-9, msg=key)


def test_rezero_with_dropout():
    def step(ns):
        torch.manual_seed(0)
        module = ns.ReZero(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Dropout2d(0.3)))
        torch.manual_seed(6)
        return run(module, (image(requires_grad=True),))

    (y, got), (expected_y, expected) = assert_same_stream((lambda: step(zb.nn), lambda: step(eager)))
    assert torch.equal(y, expected_y)
    torch.testing.assert_close(got["resweight"], expected["resweight"])
