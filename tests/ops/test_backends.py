"""Every backend has every method: of its own, or inherited from the reference."""

import inspect
from pathlib import Path

import pytest

from zeroblock.backends import available
from zeroblock.backends.available import cuda, triton
from zeroblock.backends.base import Backend
from zeroblock.backends.eager import EAGER
from zeroblock.backends.gpu import GPU
from zeroblock.backends.reference import REFERENCE
from zeroblock.backends.select import CPU
from zeroblock.kernels._torch import OLDEST_NATIVE, VERSION

METHODS = [
    name
    for name, method in inspect.getmembers(Backend)
    if inspect.isfunction(method) and "raise NotImplementedError" in inspect.getsource(method)
]
FOUND = [backend for backend in (REFERENCE, EAGER, CPU, triton(), cuda(), GPU) if backend is not None]


@pytest.mark.parametrize("backend", FOUND, ids=lambda backend: backend.name)
def test_no_method_is_missing(backend):
    assert len(METHODS) >= 20
    missing = [name for name in METHODS if getattr(type(backend), name) is getattr(Backend, name)]
    assert not missing


def test_a_missing_method_would_be_seen():
    class Bare(Backend):
        name = "bare"

    assert all(getattr(Bare, name) is getattr(Backend, name) for name in METHODS)


def test_the_extension_that_is_there_loads():
    """Whichever torch built it: on an older one every test of the CPU's kernels would be left out in silence."""
    if VERSION < OLDEST_NATIVE or not list(Path(available.__file__).parents[1].glob("_C*.so")):
        pytest.skip("none is there, or this torch is too old for one")
    assert available.EXTENSION_MISSING is None
