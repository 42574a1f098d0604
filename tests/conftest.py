"""Fixtures of all tests."""

import contextlib

import pytest
import torch

from zeroblock.testing import BACKENDS, use_backend
from zeroblock.testing.parity import device_of

from .simt import emulated

# The tensors here are too small to share between threads: on a busy machine the hand-over takes longer than the work.
# Tests about threads set their own number.
torch.set_num_threads(1)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test once per backend, with that backend for every tensor it takes; skips one that cannot run here.

    Without a GPU the CUDA kernels run in the emulator (tests/simt), on CPU tensors.
    """
    with contextlib.ExitStack() as stack:
        if request.param == "cuda" and not torch.cuda.is_available() and emulated.missing() is None:
            stack.enter_context(emulated.emulated())
        try:
            stack.enter_context(use_backend(request.param))
        except RuntimeError as missing:
            pytest.skip(str(missing))
        yield request.param


@pytest.fixture
def device(backend):
    return device_of(backend)
