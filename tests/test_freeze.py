"""freeze and unfreeze: the same results, faster weights, and every way in which a frozen weight may change."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeroblock as zb
from zeroblock import _conv, _linear, _packed, _plan, _winograd, testing
from zeroblock.testing import eager

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
needs_onednn = pytest.mark.skipif(not _packed.ONEDNN, reason="this build of torch has no oneDNN")
pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def nothing_stays_frozen():
    yield
    gc.collect()
    left = len(_packed._copies)
    _packed._copies.clear()
    assert not left, "a test's copies outlive its modules"


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(1000 + seed)  # a stream of its own: inputs must not resemble weights
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 / max(1, p[0].numel()) ** 0.5 if p.dim() > 1 else 0.3))
    return model.eval()


_USED: dict[str, int] = {}


@pytest.fixture
def packed_runs(monkeypatch):
    """Counts the calls that used copies: a test that compares results must also know that they were."""
    _USED.clear()
    winograd = _winograd.conv

    def watched(*args, packed=None, **kwargs):
        _USED["conv"] = _USED.get("conv", 0) + (packed is not None)
        return winograd(*args, packed=packed, **kwargs)

    monkeypatch.setattr(_winograd, "conv", watched)
    for op in (_conv.CONV, _linear.LINEAR):
        candidate = op.candidates["packed"]

        def spy(*args, run=candidate.run, name=op.name):
            _USED[name] = _USED.get(name, 0) + 1
            return run(*args)

        replaced = _plan.Candidate("packed", spy, candidate.why_not)
        monkeypatch.setitem(op.candidates, "packed", replaced)
    _plan.forget()
    yield lambda name: _USED.get(name, 0)
    _plan.forget()


def compare(model: nn.Module, oracle: nn.Module, *inputs: torch.Tensor, draws: bool = False) -> None:
    with torch.no_grad():
        expected = oracle(*inputs)
        exact = copy.deepcopy(oracle).double()(*(t.double() for t in inputs))
        got = model(*inputs)
    testing.assert_error_budget(got, expected, exact, draws=draws)
    assert got.stride() == expected.stride()
    assert all(got.data_ptr() != t.data_ptr() for t in inputs)


# ---- results --------------------------------------------------------------------------------------------------------

CONVS = {
    "3x3": lambda: nn.Conv2d(19, 13, 3, padding=1),
    "1x1-no-bias": lambda: nn.Conv2d(19, 40, 1, bias=False),
    "strided": lambda: nn.Conv2d(19, 13, 3, stride=2, padding=1),
    "dilated-valid": lambda: nn.Conv2d(19, 13, 3, padding="valid", dilation=2),
    "same": lambda: nn.Conv2d(19, 13, (3, 5), padding="same"),
    "grouped": lambda: nn.Conv2d(18, 12, 3, padding=1, groups=3),
    "depthwise": lambda: nn.Conv2d(18, 18, 3, padding=1, groups=18),
    "7x7": lambda: nn.Conv2d(3, 13, 7, padding=3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name, layout, weights, dtype, packed_runs):
    torch.manual_seed(0)
    oracle = randomise(CONVS[name]()).to(DTYPES[dtype]).to(memory_format=LAYOUTS[weights])
    model = copy.deepcopy(oracle)
    report = zb.freeze(model)
    assert report.packed == [""] and not report.skipped and report.nbytes >= model.weight.nbytes
    for size in ((2, oracle.in_channels, 11, 13), (3, oracle.in_channels, 8, 9)):
        x = torch.randn(size).to(DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
        compare(model, oracle, x)
    if layout == "nhwc":
        assert packed_runs("conv") == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions_of_volumes(dtype):
    oracle = randomise(nn.Conv3d(5, 7, 3, padding=1)).to(DTYPES[dtype])
    model = copy.deepcopy(oracle)
    assert zb.freeze(model).packed == [""]
    x = torch.randn(2, 5, 4, 5, 6).to(DTYPES[dtype])
    compare(model, oracle, x)
    compare(model, oracle, x.to(memory_format=torch.channels_last_3d))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [48, 1152])
def test_linears(features, dtype, bias, packed_runs):
    oracle = randomise(nn.Linear(features, 37, bias=bias)).to(DTYPES[dtype])
    model = copy.deepcopy(oracle)
    assert zb.freeze(model).packed == [""]
    torch.manual_seed(0)
    sizes = ((9, features), (8, 20, features), (8, 3, 5, features))
    inputs = [torch.randn(s).to(DTYPES[dtype]) for s in sizes]
    for x in (*inputs, inputs[0].t().contiguous().t(), inputs[1][:, ::2]):
        compare(model, oracle, x, draws=True)
    assert packed_runs("linear") == 5


@pytest.mark.parametrize("size", [(0, 8), (3, 0, 8), (8,)])
def test_unusual_inputs_of_linears(size):
    model = randomise(nn.Linear(8, 5))
    x = torch.randn(size)
    with torch.no_grad():
        expected = model(x)
        zb.freeze(model)
        testing.assert_bitwise_equal(model(x), expected)


@pytest.mark.parametrize("layer, size", [(nn.Linear(8, 5), (3, 7)), (nn.Conv2d(8, 5, 3), (2, 7, 5, 5))])
def test_wrong_inputs_raise_as_before(layer, size):
    messages = []
    for prepare in (lambda m: None, zb.freeze):
        prepare(layer)
        with pytest.raises(RuntimeError) as error, torch.no_grad():
            layer(torch.randn(size))
        messages.append(str(error.value))
    zb.unfreeze(layer)
    assert messages[0] == messages[1]


def blocks(dtype):
    """name: (model, oracle, inputs), the tails not zero."""
    torch.manual_seed(3)
    x, emb = torch.randn(2, 64, 8, 8), torch.randn(2, 48)
    tokens, c = torch.randn(2, 16, 64), torch.randn(2, 64)
    makers = {
        "film": (lambda m: m.ResBlock(64, 48, 0.0, use_scale_shift_norm=True), (x, emb)),
        "wider": (lambda m: m.ResBlock(64, 48, 0.1, out_channels=96), (x, emb)),
        "down": (lambda m: m.ResBlock(64, 48, 0.0, down=True), (x, emb)),
        "dit": (lambda m: m.DiTBlock(64, 4), (tokens, c)),
        "final": (lambda m: m.FinalLayer(64, 2, 4), (tokens, c)),
    }
    for name, (make, inputs) in makers.items():
        oracle, model = randomise(make(eager)).to(dtype), make(zb.nn).to(dtype).eval()
        model.load_state_dict(oracle.state_dict())
        yield name, model, oracle, [t.to(dtype) for t in inputs]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks(dtype, layout, packed_runs):
    for name, model, oracle, inputs in blocks(DTYPES[dtype]):
        if layout == "nhwc":
            if inputs[0].dim() != 4:
                continue
            inputs[0] = inputs[0].to(memory_format=torch.channels_last)
        _USED.clear()
        report = zb.freeze(model)
        assert not report.skipped and not report.folded
        compare(model, oracle, *inputs)
        if name == "dit":
            assert packed_runs("linear") == 5, "the modulation, qkv, proj, fc1, fc2"
        if layout == "nhwc":
            assert packed_runs("conv") == len([m for m in model.modules() if isinstance(m, nn.Conv2d)])


def test_a_whole_model(packed_runs):
    def model():
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1),
            nn.Flatten(2), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 4),
        )  # fmt: skip

    oracle = randomise(model())
    frozen = copy.deepcopy(oracle)
    report = zb.freeze(frozen)
    assert report.packed == ["0", "3", "5", "7"]
    compare(frozen, oracle, torch.randn(2, 3, 8, 8))
    assert packed_runs("linear") == 2
    assert "4 layers packed" in str(report) and "frozen" in repr(frozen)
    assert report.nbytes == sum(c.nbytes() for c in _packed._copies.values())


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [64, 1536])
def test_activations_after_packed_linears(features, dtype, activation, packed_runs):
    from zeroblock.nn import _common
    from zeroblock.reference import apply_activation

    layer = randomise(nn.Linear(features, 96)).to(DTYPES[dtype])
    torch.manual_seed(0)
    x = torch.randn(8, 21, features).to(DTYPES[dtype])
    with torch.no_grad():
        expected = apply_activation(layer(x), activation)
        exact = apply_activation(F.linear(x.double(), layer.weight.double(), layer.bias.double()), activation)
        zb.freeze(layer)
        testing.assert_error_budget(_common.linear(layer, x, activation), expected, exact, draws=True)
    assert packed_runs("linear") == 1


# ---- what a frozen model still does ---------------------------------------------------------------------------------


def model_and_input():
    return randomise(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 8, 1))), torch.randn(
        2, 8, 6, 6
    )


def frozen_layers(model) -> int:
    return sum(hasattr(type(m), "_zeroblock_original") for m in model.modules())


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


# ---- zero -----------------------------------------------------------------------------------------------------------


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
    from zeroblock import _backends, zero

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
        primitives = _backends.select("is_zero", x)
        scan = primitives.is_zero
        monkeypatch.setattr(primitives, "is_zero", lambda t: (scanned.append(t.shape), scan(t))[1])
        for got, y in zip((block(x, emb), dit(t, c)), expected, strict=True):
            testing.assert_bitwise_equal(got, y)
    assert not scanned, "freeze decided"
    assert zero.counters()["ResBlock"] == (0, 1) and zero.counters()["DiTBlock"] == (0, 1)


# ---- when the weights change ----------------------------------------------------------------------------------------


def test_train_unfreezes():
    model, _ = model_and_input()
    zb.freeze(model)
    model.eval()
    assert frozen_layers(model) == 2
    model[0].train()
    assert frozen_layers(model) == 1 and type(model[0]) is nn.Conv2d and model[0].training
    model.train()
    assert frozen_layers(model) == 0 and not _packed._copies


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_unfreezes(assign):
    model, x = model_and_input()
    other = randomise(copy.deepcopy(model), seed=1)
    zb.freeze(model)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert frozen_layers(model) == 0 and not _packed._copies
    with torch.no_grad():
        testing.assert_bitwise_equal(model(x), other(x))


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(memory_format=torch.channels_last)])
def test_moving_and_casting_unfreeze(move):
    model, _ = model_and_input()
    zb.freeze(model)
    move(model)
    assert frozen_layers(model) == 0 and not _packed._copies


def test_unfreeze_and_freeze_again():
    model, x = model_and_input()
    with torch.no_grad():
        expected = model(x)
        first, second = zb.freeze(model), zb.freeze(model)
        assert first == second and frozen_layers(model) == 2
        zb.unfreeze(model)
        assert type(model[0]) is nn.Conv2d and not _packed._copies
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


def call(model, x):
    with torch.no_grad():
        return model(x)


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


@pytest.mark.parametrize("where", ["conv", "linear", "ResBlock", "DiT"])
def test_check_finds_writes_that_leave_no_trace(where):
    """Through .data no version moves: without check the copy is stale, as documented; with it the call raises."""
    torch.manual_seed(0)
    tokens = (torch.randn(2, 4, 32), torch.randn(2, 32))
    model, weight, inputs = {
        "conv": lambda m: (m, m.weight, (torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last),)),
        "linear": lambda m: (m, m.weight, (torch.randn(2, 8),)),
        "ResBlock": lambda m: (
            m, m.in_layers[2].weight, (torch.randn(1, 32, 4, 4).to(memory_format=torch.channels_last),
            torch.randn(1, 16)),
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
    )  # fmt: skip
    with torch.no_grad():
        plain, checked = zb.freeze(model), None
        before = model(*inputs)
        weight.data.add_(1.0)
        testing.assert_bitwise_equal(model(*inputs), before)
        weight.data.sub_(1.0)
        checked = zb.freeze(model, check=True)
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


# ---- copies of a frozen model ---------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle-2": lambda m: pickle.loads(pickle.dumps(m, protocol=2)),
    "save": lambda m: _saved(m),
}


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_not_frozen(name):
    model = randomise(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), zb.nn.ZeroConv2d(8, 8, 1), zb.nn.ZeroLinear(6, 6)))
    x = torch.randn(2, 8, 6, 6)
    types, expected = [type(m) for m in model], call(model, x)
    zb.freeze(model)
    twin = COPIES[name](model)
    assert [type(m) for m in twin] == types and frozen_layers(model) == 3
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        testing.assert_bitwise_equal(a.detach(), b.detach())
        assert a.data_ptr() != b.data_ptr()
    testing.assert_bitwise_equal(call(twin, x), expected)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()


def test_the_state_dict_is_that_of_the_model():
    model, _ = model_and_input()
    before = model.state_dict()
    zb.freeze(model)
    after = model.state_dict()
    assert list(before) == list(after) and all(before[k].data_ptr() == after[k].data_ptr() for k in before)
    assert all(isinstance(m, nn.Conv2d) for m in (model[0], model[2]))


def test_tied_weights_share_a_copy():
    model = randomise(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[1].weight = model[0].weight
    report = zb.freeze(model)
    assert report.packed == ["0", "1"] and report.nbytes == _packed._copies[id(model[0].weight)].nbytes()
    zb.unfreeze(model[0])
    assert _packed.is_frozen(model[1].weight) and not _packed.is_frozen(model[0].bias)
    zb.unfreeze(model[1])
    assert not _packed._copies


def test_copies_die_with_the_model():
    model, _ = model_and_input()
    zb.freeze(model)
    assert len(_packed._copies) == 4
    del model
    gc.collect()
    assert not _packed._copies


# ---- what is left alone ---------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_cannot_be_frozen_is_named():
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict(
        {
            "subclass": Doubled(4, 4),
            "circular": nn.Conv2d(4, 4, 3, padding_mode="circular"),
            "signal": nn.Conv1d(4, 4, 3),
            "even": nn.Conv2d(4, 4, 2, padding="same"),
            "wide": nn.Linear(4, 4).double(),
            "parametrized": parametrized,
            "meta": nn.Linear(4, 4, device="meta"),
            "good": nn.Linear(4, 4),
        }
    )
    report = zb.freeze(model)
    assert report.packed == ["good"] and set(report.skipped) == set(model) - {"good"}
    assert "float64" in report.skipped["wide"] and "one side" in report.skipped["even"]
    assert "left alone: wide: oneDNN packs no torch.float64" in str(report)


@pytest.mark.parametrize("function", [zb.freeze, zb.unfreeze])
def test_only_modules(function):
    with pytest.raises(TypeError, match="model must be a Module, got Tensor"):
        function(torch.zeros(1))


def test_other_preparations_register(monkeypatch):
    """The hook for Winograd: a packer's copy is kept beside oneDNN's, counted, and found by geometry."""
    monkeypatch.setitem(_packed.CONV_PACKERS, "sum", lambda w, geometry: w.detach().sum((2, 3)).contiguous())
    model = randomise(nn.Conv2d(8, 4, 3, padding=1))
    report = zb.freeze(model)
    copies = _packed._copies[id(model.weight)]
    geometry = _conv.unit_geometry([1, 1])
    assert set(copies.convs) == {("onednn", geometry), ("sum", geometry)}
    assert report.nbytes == copies.nbytes() > 8 * 4 * 4 + model.weight.nbytes


def test_explain_names_the_packed_way():
    layer = randomise(nn.Conv2d(8, 8, 3, padding=1))
    h = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    zb.freeze(layer)
    assert zb.explain("conv_residual", h, layer.weight, layer.bias, h).plans[0].choice == "packed"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_measured_choices_of_frozen_layers_are_right(layout):
    oracle = randomise(nn.Conv2d(64, 64, 3, padding=1)).bfloat16()
    model = copy.deepcopy(oracle)
    zb.freeze(model)
    x = torch.randn(1, 64, 32, 32).bfloat16().to(memory_format=LAYOUTS[layout])
    for winner in ("library", "packed"):
        fake = lambda name, run, device: 0.5 if name == winner else 1.0  # noqa: B023, E731
        with _plan.use(timer=fake):
            compare(model, oracle, x)
            assert {e.choice for e in _plan._open_store().entries.values()} == {winner}
