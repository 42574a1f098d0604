"""Fixtures of all tests.

With TRITON_INTERPRET=1 in the environment the triton backend runs on CPU tensors, in Triton's interpreter with the
repairs of triton/interpret.py, and is then the only one that `backend` yields (`make test` runs the suite both ways).
"""

import contextlib
import os
import pathlib
import sys

import pytest
import torch

# Before zeroblock is imported: a measurement must not decide what a test sees, nor write into the user's cache.
os.environ["ZEROBLOCK_PLAN"] = "fixed"
os.environ["ZEROBLOCK_CACHE_DIR"] = ""

from zeroblock.testing import BACKENDS, use_backend  # noqa: E402
from zeroblock.testing.parity import device_of  # noqa: E402

# `python -m pytest` puts the source tree on the path, where transformers takes kernels/ for a package of that name.
sys.path[:] = [p for p in sys.path if pathlib.Path(p).resolve() != pathlib.Path(__file__).resolve().parents[1]]

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETS:
    from .triton import interpret

    interpret.install()

from .simt import emulated

# The tensors here are too small to share between threads: on a busy machine the hand-over takes longer than the work.
# Tests about threads set their own number.
torch.set_num_threads(1)


@pytest.fixture(params=("triton",) if INTERPRETS else BACKENDS)
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
