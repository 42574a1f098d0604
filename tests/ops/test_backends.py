"""Every backend has every method: of its own, or inherited from the reference."""

import inspect

import pytest

from zeroblock.backends.available import cuda, triton
from zeroblock.backends.base import Backend
from zeroblock.backends.eager import EAGER
from zeroblock.backends.gpu import GPU
from zeroblock.backends.reference import REFERENCE
from zeroblock.backends.select import CPU

METHODS = [
    name
    for name, method in vars(Backend).items()
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
