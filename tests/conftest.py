"""Fixtures of all tests, which stand in folders that mirror zeroblock/ (tests/ops, tests/blocks, ...).

`pytest -k layer_norm_modulate` runs the tests of one op: they have it in their names or ids (`-k winograd` for the
convolutions of that kind).

With TRITON_INTERPRET=1 in the environment the triton backend runs on CPU tensors, in Triton's interpreter with the
repairs of triton/interpret.py, and is then the only one that `backend` yields (`make test` runs the suite both ways).
"""

import contextlib
import functools
import gc
import importlib.util
import os
import pathlib
import sys

import pytest
import torch

# Before zeroblock is imported: a measurement must not decide what a test sees, nor write into the user's cache.
os.environ["ZEROBLOCK_PLAN"] = "fixed"
os.environ["ZEROBLOCK_CACHE_DIR"] = ""

from zeroblock.testing import BACKENDS, use_backend  # noqa: E402
from zeroblock.testing.cases import CASES  # noqa: E402
from zeroblock.testing.parity import device_of  # noqa: E402

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETS and importlib.util.find_spec("triton") and importlib.util.find_spec("ml_dtypes"):
    from .triton import interpret

    interpret.install()
    torch.backends.cudnn.allow_tf32 = False  # eager on the CPU has no tf32 either

from zeroblock.blocks import tiny  # noqa: E402

from .cuda.simt import emulated  # noqa: E402
from .support import BENCHMARKS  # noqa: E402

# The tensors here are too small to share between threads: on a busy machine the hand-over takes longer than the work.
# Tests about threads set their own number.
torch.set_num_threads(1)

# The blocks of the tests are tiny and would run as they were written; tests/blocks/test_tiny.py lets them.
tiny.IMAGES = tiny.TOKENS = 0

TESTS = pathlib.Path(__file__).parent

# Tests of the interpreted kernels: their modules would switch this process to the interpreter. All but one.
collect_ignore = [
    str(path) for path in (TESTS / "triton").glob("test_*.py") if not INTERPRETS and path.name != "test_compile.py"
]


@pytest.fixture(scope="module")
def benchmark_path():
    """Puts the entries of the benchmarks and their package zbench on the path, as `python benchmarks/x.py` does."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(params=("triton",) if INTERPRETS else BACKENDS)
def backend(request):
    """Runs the test once per backend, with that backend for every tensor it takes; skips one that cannot run here.

    Without a GPU the CUDA kernels run in the emulator (tests/cuda/simt), on CPU tensors.
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


# Too much work for interpreted and for emulated kernels, beside what is marked so: the arithmetic of the dtypes does
# not depend on the strides (fp32 runs dense, nhwc and strided, bf16 dense and nhwc, fp16 dense), and kernels tell fp16
# from bf16 in loads, stores and the operands of products alone: the first case of each op shows that.
REPEATED = ("strided-bfloat16", "strided-float16", "nhwc-float16")
FIRST = {case.op: str(case) for case in reversed(CASES) if not case.large}.values()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files marked one_worker go to a worker as a whole and, being the largest, first; other tests one by one.

    The process that schedules sees the tests' names alone, so it looks for the mark in the file's text. The mark
    xdist_group would do, but pytest-xdist 3.8 writes groups where pytest 9.2 does not read them.
    """
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def stays_whole(path: str) -> bool:
        return "pytest.mark.one_worker" in (config.rootpath / path).read_text()

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return path if stays_whole(path) else nodeid

    return Scheduling(config, log) if config.getvalue("dist") in ("load", "loadgroup") else None


def parameters(item) -> dict:
    return getattr(getattr(item, "callspec", None), "params", {})


def runs_on_gpu(item) -> bool:
    """Whether the fixture `backend` has the test run on a GPU."""
    return parameters(item).get("backend") in ("triton", "cuda") and not INTERPRETS and torch.cuda.is_available()


def emulates(item) -> bool:
    """Whether the test runs the CUDA kernels without a GPU."""
    return parameters(item).get("backend") == "cuda" and not INTERPRETS and not torch.cuda.is_available()


def repeats(item) -> bool:
    """Whether another test shows the same of interpreted or emulated kernels."""
    case = parameters(item).get("case")
    halves = case is not None and item.name.endswith("dense-float16]") and str(case) not in FIRST
    return halves or any(ids in item.name for ids in REPEATED)


@pytest.hookimpl(tryfirst=True)  # -m reads the marks in a hook of the same name
def pytest_collection_modifyitems(config, items):
    """Interpreted and emulated kernels run the quick part; an interpreting process only what tests the kernels.

    Emulated kernels hold no line of torch: the reduced set has those of files marked every_torch.
    """
    for item in items:
        if runs_on_gpu(item):
            item.add_marker(pytest.mark.gpu)
        if emulates(item) and "every_torch" not in item.keywords:
            item.add_marker(pytest.mark.slow)

    def wanted(item):
        if not INTERPRETS:
            return not emulates(item) or not ("slow_emulated" in item.keywords or repeats(item))
        if item.path.parent.name == "triton" or "interpreted" in item.keywords:
            return True
        quick = "slow_interpreted" not in item.keywords and "large" not in item.name
        return "backend" in item.fixturenames and quick and not repeats(item)

    rest = [item for item in items if not wanted(item)]
    items[:] = [item for item in items if wanted(item)]
    config.hook.pytest_deselected(items=rest)


def pytest_collection_finish(session):
    """Modules and test items stay to the end: the garbage collector need not walk them again and again."""
    gc.collect()
    gc.freeze()
