"""The kernels of the zero test: one launch, whose words are zeros before and after. Triton's in the interpreter or on a
GPU, CUDA's in the emulator."""

import contextlib
import random

import pytest
import torch

from zeroblock.backends import available as _backends
from zeroblock.backends.cuda import CUDA
from zeroblock.kernels import _counters
from zeroblock.steps import flag

from ..cuda.simt import emulated

pytestmark = [pytest.mark.interpreted, pytest.mark.gpu]
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
SIZES = 1, 7, 2048, 2049, 4097, 20000


@pytest.fixture(name="kernels")
def kernels_fixture():
    """(backend, device)"""
    with contextlib.ExitStack() as stack:
        if _backends.missing("triton") is None:
            yield _backends.triton(), "cpu" if _backends.interprets() else "cuda"
        elif emulated.missing() is None and not _backends.interprets():
            stack.enter_context(emulated.emulated())
            yield CUDA, "cpu"
        else:
            pytest.skip(f"neither triton nor the emulator: {emulated.missing()}")


def test_flags_of_each_and_of_any(kernels):
    """Whatever ran before: the words are shared by all launches of a stream."""
    backend, device = kernels
    draw = random.Random(0)
    words = _counters.counters(torch.zeros(1, device=device).device)
    for _ in range(12):
        tensors, zero = [], []
        for _ in range(draw.randint(1, 4)):
            t = torch.zeros(draw.choice(SIZES), dtype=draw.choice(DTYPES))
            zero.append(draw.random() < 0.5)
            t[0] = -0.0
            if not zero[-1]:
                t[draw.randrange(t.numel())] = draw.choice(
                    (float("nan"), 1.0, torch.finfo(t.dtype).smallest_normal / 4)
                )
            tensors.append(t.to(device))
        assert backend.are_zero(tensors).tolist() == zero
        flag = backend.zero_flag(tensors)
        assert flag.dtype == torch.int32 and flag.tolist() == [int(any(zero))]
        assert _counters.counters(words.device) is words and not words.any()


@pytest.mark.skipif(_backends.missing("triton") is not None, reason="triton cannot run")
def test_programs_stride_over_their_tensor(monkeypatch):
    """Three for two tensors: one each, which takes block after block until it finds something."""
    from zeroblock.kernels import zero_flag

    monkeypatch.setattr(zero_flag, "PROGRAMS", 3)
    device = "cpu" if _backends.interprets() else "cuda"
    for places in ((), (0,), (2 * zero_flag.BLOCK,), (20000 - 1,)):
        t, zeros = torch.zeros(20000, device=device), torch.zeros(9000, device=device)
        for i in places:
            t[i] = 1.0
        assert zero_flag.zero_flag([t, zeros]).tolist() == [int(not places), 1]


def test_a_word_counts_all_programs():
    zero_flag = pytest.importorskip("zeroblock.kernels.zero_flag")
    assert zero_flag.PROGRAMS < 2**zero_flag.SEEN and zero_flag.PROGRAMS < 2**zero_flag.DONE
    assert zero_flag.DONE + zero_flag.MOST_TOGETHER * zero_flag.SEEN <= 64


def test_more_tensors_than_a_launch_takes(kernels):
    backend, device = kernels
    tensors = [torch.zeros(5, device=device) for _ in range(70)]
    tensors[66][3] = 1
    assert backend.are_zero(tensors).tolist() == [i != 66 for i in range(70)]


def test_one_launch(kernels):
    backend, device = kernels
    tensors = [torch.zeros(5000, device=device), torch.zeros(9, device=device)]
    if backend is CUDA:
        assert len(emulated.recorded(lambda: backend.zero_flag(tensors))) == 1
        return
    from zeroblock.kernels import _launch

    with _launch.recording() as launches:
        backend.zero_flag(tensors)
    assert len(launches) == 1


def test_a_graph_has_words_of_its_own(monkeypatch):
    """Its replays may run beside any other launch."""
    device = torch.device("cpu")
    shared = _counters.counters(device)
    with torch.inference_mode():
        assert _counters.counters(device) is shared
    monkeypatch.setattr(_counters, "capturing", lambda device: True)
    one, two = _counters.counters(device), _counters.counters(device)
    assert one is not two and one is not shared and two is not shared and not one.any()
    monkeypatch.undo()
    monkeypatch.setattr(_counters, "stream_of", lambda device: -7)
    assert _counters.counters(device) is not shared, "another stream"
    del _counters._words[device, -7]


def test_what_is_reported_of_an_untested_weight_belongs_to_a_stream(monkeypatch):
    """It is written by a kernel of that stream, which others do not wait for; in a graph by each replay."""
    like, stream = torch.zeros(1), [1]
    monkeypatch.setattr(flag, "_executed", {})
    monkeypatch.setattr(flag, "_addresses", set())
    monkeypatch.setattr(flag, "stream_of", lambda device: stream[0])
    one = flag.executed(like)
    assert flag.executed(like) is one and flag.is_executed(one)
    stream[0] = 2
    two = flag.executed(like)
    assert two is not one and flag.executed(like) is two
    stream[0] = 3
    monkeypatch.setattr(flag, "capturing", lambda device: True)
    assert flag.executed(like) is not flag.executed(like) and len(flag._executed) == 2
