"""What a frozen model still does, what folds away, and every way in which a frozen weight may change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.steps import packed as _packed

from .cases import LAYOUTS, blocks, call, compare, frozen_layers, model_and_input, needs_native, needs_onednn, randomise
from .cases import nothing_stays_frozen as _nothing_stays_frozen  # noqa: F401  (for every test)

pytestmark = needs_onednn


def test_gradients_flow_through_a_frozen_model():
    model, x = model_and_input()
    results = []
    for prepare in (lambda m: None, zb.freeze):
        prepare(model)
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (leaf, *model.parameters()))))
    for a, b in zip(*results, strict=True):
        testing.assert_bitwise_equal(b, a)
    assert frozen_layers(model) == 2


def test_gradients_flow_through_frozen_blocks():
    for name, model, oracle, inputs in blocks(torch.float32):
        zb.freeze(model)
        results = []
        for block, dtype in (
            (model, torch.float32),
            (oracle, torch.float32),
            (copy.deepcopy(oracle).double(), torch.float64),
        ):
            leaves = [t.to(dtype).requires_grad_() for t in inputs]
            results.append(torch.autograd.grad(block(*leaves).square().sum(), (*leaves, *block.parameters())))
        for got, expected, exact in zip(*results, strict=True):
            testing.assert_error_budget(got, expected, exact, name)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_contexts(context):
    model, x = model_and_input()
    with torch.no_grad(), context():
        expected = model(x)
        zb.freeze(model)
        got = model(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


def test_compiled_models_do_not_break():
    model, x = model_and_input()
    with torch.no_grad():
        expected = model(x)
        zb.freeze(model)
        torch._dynamo.reset()
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected)


def test_functional_call_uses_the_parameters_given():
    model, x = model_and_input()
    zb.freeze(model)
    others = {k: v * 2 for k, v in model.state_dict().items()}
    with torch.no_grad():
        got = torch.func.functional_call(model, others, (x,))
    model.load_state_dict(others)
    with torch.no_grad():
        testing.assert_bitwise_equal(got, model(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_layers_fold_to_their_bias(layout, bias):
    model = randomise(nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias)))
    tokens = randomise(nn.Linear(5, 7, bias=bias))
    x = torch.randn(2, 4, 9, 7).to(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        model[0].weight.zero_(), tokens.weight.zero_()
        expected, expected_tokens = model(x), tokens(torch.randn(2, 3, 5))
        report = zb.freeze(model)
        assert report.folded == ["0"] and not report.packed and report.nbytes == 0
        zb.freeze(tokens)
        testing.reset_counters()
        got = model(x)
        testing.assert_bitwise_equal(got, expected)
        assert got.stride() == expected.stride()
        testing.assert_bitwise_equal(tokens(torch.full((2, 3, 5), float("nan"))), expected_tokens)
    assert testing.counters() == {"frozen_conv": (0, 1), "frozen_linear": (0, 1)}


def test_zero_branches_are_decided_once(monkeypatch):
    from zeroblock import zero
    from zeroblock.backends.select import select

    torch.manual_seed(0)
    block, dit = zb.nn.ResBlock(32, 16, 0.0).eval(), zb.nn.DiTBlock(32, 2).eval()
    x, emb, t, c = torch.randn(1, 32, 4, 4), torch.randn(1, 16), torch.randn(1, 4, 32), torch.randn(1, 32)
    with torch.no_grad():
        expected = block(x, emb), dit(t, c)
        report = zb.freeze(block)
        assert report.folded == ["out_layers.3"]
        zb.freeze(dit)
        assert torch.equal(dit(t, c), t)  # the gates' rows are remembered by the first call
        testing.reset_counters()
        scanned = []
        primitives = select("is_zero", x)
        scan = primitives.is_zero
        monkeypatch.setattr(primitives, "is_zero", lambda t: (scanned.append(t.shape), scan(t))[1])
        for got, y in zip((block(x, emb), dit(t, c)), expected, strict=True):
            testing.assert_bitwise_equal(got, y)
    assert not scanned, "freeze decided"
    assert zero.counters()["ResBlock"] == (0, 1) and zero.counters()["DiTBlock"] == (0, 2)


def test_train_unfreezes():
    model, _ = model_and_input()
    zb.freeze(model)
    model.eval()
    assert frozen_layers(model) == 2
    model[0].train()
    assert frozen_layers(model) == 1 and type(model[0]) is nn.Conv2d and model[0].training
    model.train()
    assert frozen_layers(model) == 0 and not _packed.copies


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_unfreezes(assign):
    model, x = model_and_input()
    other = randomise(copy.deepcopy(model), seed=1)
    zb.freeze(model)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert frozen_layers(model) == 0 and not _packed.copies
    with torch.no_grad():
        testing.assert_bitwise_equal(model(x), other(x))


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(memory_format=torch.channels_last)])
def test_moving_and_casting_unfreeze(move):
    model, _ = model_and_input()
    zb.freeze(model)
    move(model)
    assert frozen_layers(model) == 0 and not _packed.copies


def test_unfreeze_and_freeze_again():
    model, x = model_and_input()
    with torch.no_grad():
        expected = model(x)
        first, second = zb.freeze(model), zb.freeze(model)
        assert first == second and frozen_layers(model) == 2
        zb.unfreeze(model)
        assert type(model[0]) is nn.Conv2d and not _packed.copies
        testing.assert_bitwise_equal(model(x), expected)
        zb.unfreeze(model)
        model[0].weight.mul_(2)
        zb.freeze(model)
        oracle = copy.deepcopy(model)
        compare(model, oracle, x)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p),
    "foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "fused": lambda p: torch.optim.Adam(p, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_optimizer_steps_on_frozen_parameters_raise(name, which):
    model, x = model_and_input()
    optimizer = OPTIMIZERS[name]([getattr(model[2], which)])
    model(x).sum().backward()
    zb.freeze(model)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=f"{type(optimizer).__name__}.step would change a frozen parameter"):
        optimizer.step()
    for p, kept in zip(model.parameters(), before, strict=True):
        testing.assert_bitwise_equal(p.detach(), kept.detach())
    model.train()
    optimizer.step()
    assert not torch.equal(getattr(model[2], which), before[2 + (which == "bias")])


def test_other_optimizers_step():
    model, x = model_and_input()
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    zb.freeze(model)
    other(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert frozen_layers(model) == 2


@pytest.mark.parametrize("write", [lambda p: p.mul_(2), lambda p: p.zero_(), lambda p: setattr(p, "data", p * 2)])
def test_writes_that_can_be_seen_raise(write):
    model, x = model_and_input()
    x = x.to(memory_format=torch.channels_last)
    zb.freeze(model)
    call(model, x)
    with torch.no_grad():
        write(model[0].weight)
    with pytest.raises(RuntimeError, match=r"shape \[16, 8, 3, 3\] was (written|moved) while frozen"):
        call(model, x)
    zb.unfreeze(model)
    call(model, x)


@pytest.mark.parametrize(
    "where", ["conv", pytest.param("linear", marks=needs_native), "ResBlock", pytest.param("DiT", marks=needs_native)]
)
def test_check_finds_writes_that_leave_no_trace(where):
    """One element written through .data: no version moves and no sample sees it."""
    torch.manual_seed(0)
    tokens = (torch.randn(2, 4, 32), torch.randn(2, 32))
    model, weight, inputs = {
        "conv": lambda m: (m, m.weight, (torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last),)),
        "linear": lambda m: (m, m.weight, (torch.randn(2, 8),)),
        "ResBlock": lambda m: (
            m,
            m.in_layers[2].weight,
            (torch.randn(1, 32, 4, 4).to(memory_format=torch.channels_last), torch.randn(1, 16)),
        ),
        "DiT": lambda m: (m, m.mlp.fc1.weight, tokens),
    }[where](
        randomise(
            {
                "conv": lambda: nn.Conv2d(8, 4, 3),
                "linear": lambda: nn.Linear(8, 4),
                "ResBlock": lambda: zb.nn.ResBlock(32, 16, 0.0),
                "DiT": lambda: zb.nn.DiTBlock(32, 2),
            }[where]()
        )
    )
    with torch.no_grad():
        plain, checked = zb.freeze(model), zb.freeze(model, check=True)
        assert checked.check and checked.nbytes > plain.nbytes and "compared" in str(checked)
        model(*inputs)
        weight.data.view(-1)[-1] += 1e-3
        with pytest.raises(RuntimeError, match="was written while frozen"):
            model(*inputs)


def test_a_zero_weight_that_is_written_raises_too():
    model = randomise(nn.Linear(4, 4))
    with torch.no_grad():
        model.weight.zero_()
        zb.freeze(model, check=True)
        model.weight.data[3, 3] = 1.0
        with pytest.raises(RuntimeError, match="was written while frozen"):
            model(torch.randn(2, 4))


def test_a_replaced_parameter_is_used():
    model, x = model_and_input()
    zb.freeze(model)
    model[0].weight = nn.Parameter(model[0].weight * 2)
    oracle = copy.deepcopy(model)
    testing.assert_bitwise_equal(call(model, x), call(oracle, x))
