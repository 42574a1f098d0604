"""freeze: the results of packed layers, blocks and models are those of the library, within its error."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.backends.select import select
from zeroblock.plan import planned as _plan
from zeroblock.steps import conv as _conv
from zeroblock.steps import linear as _linear
from zeroblock.steps import packed as _packed

from .cases import DTYPES, LAYOUTS, blocks, compare, needs_native, needs_onednn, randomise
from .cases import nothing_stays_frozen as _nothing_stays_frozen  # noqa: F401  (for every test)

pytestmark = needs_onednn


_USED: dict[str, int] = {}


@pytest.fixture
def packed_runs(monkeypatch):
    """Counts the calls that used copies: a test that compares results must also know that they were."""
    _USED.clear()
    backend = select("conv_residual", torch.zeros(1))
    if backend.winograd is not None:
        winograd = backend.winograd

        def watched(x, affine, weight, prepared, *rest):
            _USED["conv"] = _USED.get("conv", 0) + (prepared is not None)
            return winograd.conv(x, affine, weight, prepared, *rest)

        monkeypatch.setattr(backend, "winograd", winograd._replace(conv=watched))
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


@needs_native
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


@pytest.mark.parametrize("layer, size", [(nn.Linear(8, 5), (3, 8)), (nn.Conv2d(8, 5, 3), (2, 8, 5, 5))])
def test_the_input_by_keyword(layer, size):
    """diffusers calls its projections so."""
    x = torch.randn(size)
    zb.freeze(layer)
    with torch.no_grad():
        testing.assert_bitwise_equal(layer(input=x), layer(x))
    zb.unfreeze(layer)


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


@needs_native
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


@needs_native
def test_a_whole_model(packed_runs):
    def model():
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.GroupNorm(8, 32),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.Flatten(2),
            nn.Linear(64, 16),
            nn.GELU(),
            nn.Linear(16, 4),
        )

    oracle = randomise(model())
    frozen = copy.deepcopy(oracle)
    report = zb.freeze(frozen)
    assert report.packed == ["0", "3", "5", "7"]
    compare(frozen, oracle, torch.randn(2, 3, 8, 8))
    assert packed_runs("linear") == 2
    assert "4 layers packed" in str(report) and "frozen" in repr(frozen)
    assert report.nbytes == sum(c.nbytes() for c in _packed.copies.values())


@needs_native
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [64, 1536])
def test_activations_after_packed_linears(features, dtype, activation, packed_runs):
    from zeroblock.blocks.layers import linear
    from zeroblock.reference import apply_activation

    layer = randomise(nn.Linear(features, 96)).to(DTYPES[dtype])
    torch.manual_seed(0)
    x = torch.randn(8, 21, features).to(DTYPES[dtype])
    with torch.no_grad():
        expected = apply_activation(layer(x), activation)
        exact = apply_activation(F.linear(x.double(), layer.weight.double(), layer.bias.double()), activation)
        zb.freeze(layer)
        got = linear(x, layer.weight, layer.bias, activation)
        testing.assert_error_budget(got, expected, exact, draws=True)
    assert packed_runs("linear") == 1
