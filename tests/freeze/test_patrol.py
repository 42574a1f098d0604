"""Writes that no sample sees: found by the patrol, a piece at a time, for a share of the time that is fixed."""

from __future__ import annotations

import gc
import itertools
import time
import weakref

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import testing
from zeroblock.steps import packed as _packed
from zeroblock.steps import patrol as _patrol

from .cases import call, needs_onednn, randomise
from .cases import nothing_stays_frozen as _nothing_stays_frozen  # noqa: F401  (for every test)

pytestmark = needs_onednn
LONG = 20.0  # seconds, of which the rounds below take a small part


@pytest.fixture(autouse=True)
def a_patrol_of_its_own(monkeypatch):
    monkeypatch.setattr(_packed, "_patrol", _patrol.Patrol(_packed.copies.values()))


def one_element(w):
    w.data.view(-1)[1] += 1e-3


def one_row(w):
    w.data[1] += 1e-2


def one_column(w):
    w.data[:, 1] *= 2


def swapped_rows(w):
    w.data[[3, 5]] = w.data[[5, 3]]


def lost_in_rounding(w):
    w.data += torch.where(torch.arange(w.numel()).view(w.shape) % 97 == 1, 1e-3, 1e-12)


WRITES = [one_element, one_row, one_column, swapped_rows, lost_in_rounding]
LAYERS = {
    "linear": (lambda: nn.Linear(384, 640), (2, 384)),
    "conv": (lambda: nn.Conv2d(96, 160, 3), (1, 96, 3, 3)),
    "zero": (lambda: nn.Linear(256, 320), (2, 256)),
    "bfloat16": (lambda: nn.Linear(384, 640).bfloat16(), (2, 384)),
}


def unseen(layer, write):
    """Whether the write is one that the sample passes over."""
    copy = _packed.current(layer.weight)
    write(layer.weight)
    return copy.changed() is None


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_no_sample_sees_raises_after_a_round(write, name):
    make, size = LAYERS[name]
    layer = randomise(make())
    if name == "zero":
        nn.init.zeros_(layer.weight)
    other = randomise(nn.Linear(256, 320))
    x = torch.randn(size).to(layer.weight.dtype)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    zb.freeze(other)
    report = zb.freeze(layer)
    assert report.nbytes <= 6 * layer.weight.nbytes
    call(layer, x)
    before = layer.weight.detach().clone()
    hidden = unseen(layer, write)
    if torch.equal(before, layer.weight):
        pytest.skip("this write changes nothing here")
    assert hidden or write is not one_element
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="was written while frozen"):
        while time.perf_counter() - start < LONG:
            call(layer, x)
    with pytest.raises(RuntimeError, match="was written while frozen"):
        call(layer, x)
    call(other, torch.randn(2, 256))
    zb.freeze(layer)
    expected = nn.functional.linear if isinstance(layer, nn.Linear) else nn.functional.conv2d
    torch.testing.assert_close(call(layer, x), expected(x, layer.weight, layer.bias).detach())
    zb.unfreeze(layer)
    zb.unfreeze(other)


def test_nothing_is_reported_where_nothing_was_written():
    torch.manual_seed(0)
    layer, x = randomise(nn.Linear(300, 500)), torch.randn(2, 300)
    zb.freeze(layer)
    expected = call(layer, x)
    patrol = _packed._patrol
    for _ in range(50):  # several rounds
        patrol.walk()
    testing.assert_bitwise_equal(call(layer, x), expected)
    zb.unfreeze(layer)


def test_every_piece_of_every_weight_has_its_turn():
    layers = [randomise(nn.Linear(n, 300)) for n in (3, 100, 200, 300)]
    for layer in layers:
        zb.freeze(layer)
    copies = list(_packed.copies.values())
    pieces = sum(len(c.checksums) for c in copies)
    assert pieces > len(copies) == 8
    for element in (1, 300 * 300 - 2):
        layers[3].weight.data.view(-1)[element] += 1e-3
        assert _packed.current(layers[3].weight).changed() is None
        for _ in range(2 * pieces):
            _packed._patrol.walk()
        assert _packed.current(layers[3].weight).changed() == "written"
        zb.freeze(layers[3])
    for layer in layers:
        zb.unfreeze(layer)


def test_the_walk_takes_its_share_of_the_time_and_no_more(monkeypatch):
    """By a clock of its own: each piece takes 30 microseconds, each use of the weight 1 millisecond."""
    layer = randomise(nn.Linear(384, 640, bias=False))
    zb.freeze(layer)
    copy = _packed.current(layer.weight)
    now = [0.0]
    walked = []

    def crc32(memory):
        now[0] += 30e-6
        walked.append(len(memory))
        return copy.checksums[(len(walked) - 1) % len(copy.checksums)]

    monkeypatch.setattr(_packed, "_now", lambda: now[0])
    monkeypatch.setattr(_patrol.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(_patrol.zlib, "crc32", crc32)
    for _ in range(10_000):
        copy.verify()
        now[0] += 1e-3
    spent = 30e-6 * len(walked)
    assert 0.5 * _patrol.SHARE < spent / now[0] <= 1.01 * _patrol.SHARE
    monkeypatch.undo()
    zb.unfreeze(layer)


def test_the_patrol_holds_no_model_alive():
    first, second = randomise(nn.Linear(300, 500)), randomise(nn.Linear(300, 500))
    for layer in (first, second):
        zb.freeze(layer)
    _packed._patrol.walk()
    gone = [weakref.ref(layer.weight) for layer in (first, second)]
    storages = [layer.weight.untyped_storage()._cdata for layer in (first, second)]
    assert len(set(storages)) == 2
    del first, second, layer
    gc.collect()
    assert [ref() for ref in gone] == [None, None] and not _packed.copies
    _packed._patrol.walk()


@pytest.mark.parametrize("road", ["emptied", "another storage"])
def test_memory_that_went_away_is_not_read(road):
    first, second = randomise(nn.Linear(300, 500)), randomise(nn.Linear(300, 500))
    for layer in (first, second):
        zb.freeze(layer)
    if road == "emptied":
        first.weight.untyped_storage().resize_(0)
    else:
        first.weight.data = torch.randn(500, 300)
    x = torch.randn(2, 300)
    for _ in range(40):
        _packed._patrol.walk()
    call(second, x)
    with pytest.raises(RuntimeError, match="was moved while frozen"):
        call(first, x)
    for layer in (first, second):
        zb.unfreeze(layer)


def test_threads_walk_one_at_a_time():
    layer = randomise(nn.Linear(300, 500))
    zb.freeze(layer)
    patrol = _packed._patrol
    with patrol._lock:
        for _ in range(3):
            patrol.walk()  # returns at once
        assert patrol.due == 0.0
    patrol.walk()
    assert patrol.due > 0.0
    zb.unfreeze(layer)


def test_checksums_see_order_and_single_bits():
    memory = memoryview(bytearray(itertools.chain.from_iterable((i, 0, 0, 1) for i in range(200))))
    before = _patrol.checksums(memory)
    for change in ((0, 1), (399, 7), (796, 255)):
        memory[change[0]] ^= change[1]
        assert _patrol.checksums(memory) != before
        memory[change[0]] ^= change[1]
    memory[:4], memory[4:8] = bytes(memory[4:8]), bytes(memory[:4])
    assert _patrol.checksums(memory) != before
