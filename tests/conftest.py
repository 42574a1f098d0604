"""Fixtures of all tests."""

import contextlib
import os

import pytest
import torch

# Before zeroblock is imported: a measurement must not decide what a test sees, nor write into the user's cache.
os.environ["ZEROBLOCK_PLAN"] = "fixed"
os.environ["ZEROBLOCK_CACHE_DIR"] = ""

from zeroblock.testing import BACKENDS, use_backend  # noqa: E402
from zeroblock.testing.parity import device_of  # noqa: E402

# The tensors here are too small to share between threads: on a busy machine the hand-over takes longer than the work.
# Tests about threads set their own number.
torch.set_num_threads(1)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test once per backend, with that backend for every tensor it takes; skips one that cannot run here."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(use_backend(request.param))
        except RuntimeError as missing:
            pytest.skip(str(missing))
        yield request.param


@pytest.fixture
def device(backend):
    return device_of(backend)
