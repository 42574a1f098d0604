"""Frozen layers beside other threads, and beside libraries that put classes of their own on them."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import zeroblock as zb
from zeroblock import testing
from zeroblock.plan import planned as _plan
from zeroblock.steps import packed as _packed

from .cases import call, compare, frozen_layers, needs_native, needs_onednn, randomise
from .cases import nothing_stays_frozen as _nothing_stays_frozen  # noqa: F401  (for every test)

pytestmark = needs_onednn


# ---- threads --------------------------------------------------------------------------------------------------------


@needs_native
def test_nothing_is_published_before_it_is_packed(monkeypatch):
    seen = []
    reorder = _packed._reorder_linear
    monkeypatch.setattr(_packed, "_reorder_linear", lambda w: (seen.append(len(_packed.copies)), reorder(w))[1])
    monkeypatch.setitem(_packed.CONV_PACKERS, "watched", lambda *_: seen.append(len(_packed.copies)))
    for layer in (nn.Linear(4, 4), nn.Conv2d(4, 4, 3)):
        zb.freeze(layer)
        zb.unfreeze(layer)
    assert seen == [0, 0]


def test_others_infer_while_a_model_is_frozen_and_unfrozen():
    torch.manual_seed(0)
    dit = randomise(zb.nn.DiTBlock(32, 2))
    layers = randomise(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(6, 6)))
    x = torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last)
    models = [(dit, (torch.randn(1, 8, 32), torch.randn(1, 32))), (layers, (x,))]
    with torch.no_grad():
        expected = [model(*inputs) for model, inputs in models]
    stop, errors = threading.Event(), []

    def infer():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    for (model, inputs), y in zip(models, expected, strict=True):
                        torch.testing.assert_close(model(*inputs), y)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(150):
        for model, _ in models:
            zb.freeze(model)
        for model, _ in models:
            zb.unfreeze(model)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.parametrize(
    "layer, size",
    [pytest.param(nn.Linear(8, 5), (3, 8), marks=needs_native), (nn.Conv2d(8, 5, 3), (2, 8, 5, 5))],
)
def test_a_layer_unfrozen_after_its_way_was_chosen(layer, size, monkeypatch):
    randomise(layer)
    x = torch.randn(size)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    expected = call(layer, x)
    zb.freeze(layer)
    find, found = _packed.find, []

    def unfrozen_meanwhile(t):
        zb.unfreeze(layer)
        found.append(find(t))
        return found[-1]

    with _plan.use(timer=lambda name, run, device: 0.5 if name == "packed" else 1.0):
        call(layer, x)
        monkeypatch.setattr(_packed, "find", unfrozen_meanwhile)
        torch.testing.assert_close(call(layer, x), expected)
    assert found == [None]


@needs_native
def test_two_threads_freeze_one_model():
    model = randomise(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))))
    threads = [threading.Thread(target=lambda: [zb.freeze(model) for _ in range(30)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert frozen_layers(model) == 4 and len(_packed.copies) == 8
    zb.unfreeze(model)
    assert frozen_layers(model) == 0 and not _packed.copies


# ---- classes of other libraries -------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _register(layer):
    parametrize.register_parametrization(layer, "weight", Scaled())


def _derive(layer):
    """As fully_shard and token merging do: a class made from the layer's own."""
    layer.__class__ = type(f"Derived{type(layer).__name__}", (type(layer),), {"derived": True})


SWAPS = {"weight_norm": parametrizations.weight_norm, "parametrized": _register, "derived": _derive}
ENDS = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "unfreeze": zb.unfreeze,
    "double": lambda m: m.double(),
    "load": lambda m: m.load_state_dict(m.state_dict()),
    "freeze": zb.freeze,
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize(
    "make, size",
    [(lambda: nn.Linear(8, 8), (2, 8)), (lambda: nn.Conv2d(4, 4, 3), (1, 4, 5, 5))],
    ids=["linear", "conv"],
)
def test_the_class_of_another_library_is_kept(make, size, swap, end):
    model = randomise(nn.Sequential(make()))
    oracle = copy.deepcopy(model)
    zb.freeze(model)
    x = torch.randn(size)
    for m in (model, oracle):
        SWAPS[swap](m[0])
    theirs = type(model[0])
    torch.testing.assert_close(call(model, x), call(oracle, x))
    ENDS[end](model), (zb.unfreeze if end == "freeze" else ENDS[end])(oracle)
    assert type(model[0]) is theirs
    dtype = next(model.parameters()).dtype
    torch.testing.assert_close(call(model, x.to(dtype)), call(oracle, x.to(dtype)))
    if end not in ("eval", "freeze"):
        assert not _packed.copies
    twin = copy.deepcopy(model)
    torch.testing.assert_close(call(twin, x.to(dtype)), call(oracle, x.to(dtype)))
    zb.unfreeze(model)
    if swap != "derived":
        parametrize.remove_parametrizations(model[0], "weight")
        zb.unfreeze(model)
        assert type(model[0]) is type(make())
        torch.testing.assert_close(call(model, x.to(dtype)), call(oracle, x.to(dtype)))


@needs_native
def test_a_derived_class_freezes_again():
    torch.manual_seed(0)
    layer = randomise(nn.Linear(8, 8))
    oracle, x = copy.deepcopy(layer), torch.randn(3, 8)
    zb.freeze(layer)
    _derive(layer)
    for _ in range(2):
        assert zb.freeze(layer).packed == [""] and layer.derived and "frozen" in repr(layer)
        compare(layer, oracle, x)
        zb.unfreeze(layer)
        assert layer.derived and "frozen" not in repr(layer) and not _packed.copies


def test_a_class_put_in_place_of_the_frozen_one_is_kept():
    class Other(nn.Linear):
        pass

    layer = randomise(nn.Linear(8, 8))
    zb.freeze(layer)
    layer.__class__ = Other
    zb.unfreeze(layer)
    assert type(layer) is Other and not _packed.copies


# ---- memory ---------------------------------------------------------------------------------------------------------


@needs_native
def test_copies_go_without_the_garbage_collector():
    layer = nn.Linear(64, 64)
    gc.collect()
    gc.disable()
    try:
        zb.freeze(layer)
        watched = weakref.ref(_packed.copies[id(layer.weight)])
        zb.unfreeze(layer)
        assert watched() is None
        zb.freeze(layer)
        watched = weakref.ref(_packed.copies[id(layer.weight)])
        del layer
        assert watched() is None and not _packed.copies
    finally:
        gc.enable()


@needs_native
def test_freezing_a_module_twice_owns_its_weight_once():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    zb.freeze(first), zb.freeze(second), zb.freeze(first)
    zb.unfreeze(first), zb.unfreeze(first)
    assert _packed.is_frozen(second.weight)
    testing.assert_bitwise_equal(call(second, torch.ones(1, 8)), call(second, torch.ones(1, 8)))
    zb.unfreeze(second)
    assert not _packed.copies
