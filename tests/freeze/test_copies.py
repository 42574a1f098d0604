"""Copies of a frozen model, shared weights, and what freeze leaves alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.plan import planned as _plan
from zeroblock.steps import conv as _conv
from zeroblock.steps import packed as _packed

from .cases import LAYOUTS, call, compare, frozen_layers, model_and_input, needs_native, needs_onednn, randomise
from .cases import nothing_stays_frozen as _nothing_stays_frozen  # noqa: F401  (for every test)

pytestmark = needs_onednn


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


@needs_native
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


@needs_native
def test_tied_weights_share_a_copy():
    model = randomise(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[1].weight = model[0].weight
    report = zb.freeze(model)
    assert report.packed == ["0", "1"] and report.nbytes == _packed.copies[id(model[0].weight)].nbytes()
    zb.unfreeze(model[0])
    assert _packed.is_frozen(model[1].weight) and not _packed.is_frozen(model[0].bias)
    zb.unfreeze(model[1])
    assert not _packed.copies


def test_no_copy_that_nothing_computes_with():
    """Without native kernels a linear layer is the library's, frozen or not; convolutions use their copies."""
    model = randomise(nn.ModuleDict({"linear": nn.Linear(8, 8), "conv": nn.Conv2d(4, 4, 3), "zero": nn.Linear(8, 8)}))
    nn.init.zeros_(model["zero"].weight)
    with testing.use_backend("reference"):
        report = zb.freeze(model)
    assert (report.packed, report.folded) == (["conv"], ["zero"])
    assert "without zeroblock's own kernels" in report.skipped["linear"] and not _packed.is_frozen(
        model["linear"].weight
    )


def test_copies_die_with_the_model():
    model, _ = model_and_input()
    zb.freeze(model)
    assert len(_packed.copies) == 4
    del model
    gc.collect()
    assert not _packed.copies


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@needs_native
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
    monkeypatch.setitem(_packed.CONV_PACKERS, "sum", lambda backend, w, geometry: w.detach().sum((2, 3)).contiguous())
    model = randomise(nn.Conv2d(8, 4, 3, padding=1))
    report = zb.freeze(model)
    copies = _packed.copies[id(model.weight)]
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
            assert {e.choice for e in _plan.open_store().entries.values()} == {winner}
