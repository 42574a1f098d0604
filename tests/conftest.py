"""Fixtures of all tests.

With TRITON_INTERPRET=1 in the environment the triton backend runs on CPU tensors, in Triton's interpreter with the
repairs of triton/interpret.py, and is then the only one that `backend` yields (`make test` runs the suite both ways).
"""

import contextlib
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

# `python -m pytest` puts the source tree on the path, where transformers takes kernels/ for a package of that name.
sys.path[:] = [p for p in sys.path if pathlib.Path(p).resolve() != pathlib.Path(__file__).resolve().parents[1]]

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETS and importlib.util.find_spec("triton") and importlib.util.find_spec("ml_dtypes"):
    from .triton import interpret

    interpret.install()
    torch.backends.cudnn.allow_tf32 = False  # eager on the CPU has no tf32 either

from .cuda.simt import emulated  # noqa: E402

# The tensors here are too small to share between threads: on a busy machine the hand-over takes longer than the work.
# Tests about threads set their own number.
torch.set_num_threads(1)

TESTS = pathlib.Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"

# Tests of the interpreted kernels: their modules would switch this process to the interpreter. All but one.
collect_ignore = [
    str(path) for path in (TESTS / "triton").glob("test_*.py") if not INTERPRETS and path.name != "test_compile.py"
]


@pytest.fixture(scope="module")
def benchmark_path():
    """The benchmarks import each other as plain modules from their own folder."""
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


# Too much work for interpreted and for emulated kernels: the arithmetic of the dtypes does not depend on the strides
# (fp32 runs dense, nhwc and strided, bf16 dense and nhwc, fp16 dense), and kernels tell fp16 from bf16 in loads, stores
# and the operands of products alone: the first case of each op shows that.
REPEATED = ("strided-bfloat16", "strided-float16", "nhwc-float16")
FIRST = {case.op: str(case) for case in reversed(CASES) if not case.large}.values()
# For the interpreter also the cases that are large by name, and what differs in the gradients that are wanted: in most
# ops kernels do not see which.
SLOW_INTERPRETED = ("test_group_of_a_million_elements", "test_gradient_of_one_input_alone", "test_without_gradients")
# For the emulator the group norm's: it computes all gradients whichever are wanted, and its dense loop over chunks is
# that of the case "large".
SLOW_EMULATED = (
    "test_group_of_a_million_elements[cuda-dense]",
    "test_gradient_of_one_input_alone[cuda-group_norm_silu",
    "test_without_gradients[cuda-group_norm_silu",
)


# Their tests share what takes long to build, so that one of pytest-xdist's workers runs them all.
ONE_WORKER = (
    "tools/test_benchmarks.py",
    "tools/test_benchmarks_gpu.py",
    "cuda/test_build.py",
    "cuda/test_static.py",
    "doctor/test_html.py",
    "ops/test_isa.py",
    "tools/test_packaging.py",
)


def name(path: str | pathlib.Path) -> str:
    """Folder and file below tests/."""
    return "/".join(pathlib.Path(path).parts[-2:])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files of ONE_WORKER go to a worker as a whole and, being the largest, first; other tests one by one.

    The mark xdist_group would say so too, but pytest-xdist 3.8 writes groups where pytest 9.2 does not read them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return path if name(path) in ONE_WORKER else nodeid

    return Scheduling(config, log) if config.getvalue("dist") in ("load", "loadgroup") else None


# Left out of the reduced set, beside what is slow: the emulator, its tables and the doctor's page hold no line of
# torch; benchmarks are run with one torch alone. Of the emulated kernels that set keeps the cases of
# ops/test_unusual_input, which take every op forward and backward through the bindings.
ONE_TORCH = (
    "tools/test_benchmarks.py",
    "tools/test_benchmarks_gpu.py",
    "tools/test_benchmarks_run.py",
    "cuda/test_emulator.py",
    "cuda/test_static.py",
    "cuda/test_traffic.py",
    "doctor/test_html.py",
)


def parameters(item) -> dict:
    return getattr(getattr(item, "callspec", None), "params", {})


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
    """Interpreted and emulated kernels run the quick part; an interpreting process only what tests the kernels."""
    for item in items:
        if name(item.path) in ONE_TORCH or (emulates(item) and name(item.path) != "ops/test_unusual_input.py"):
            item.add_marker(pytest.mark.slow)

    def wanted(item):
        if not INTERPRETS:
            return not emulates(item) or not (item.name.startswith(SLOW_EMULATED) or repeats(item))
        if "triton" in item.path.parent.name or "interpreted" in item.keywords:
            return True
        quick = item.originalname not in SLOW_INTERPRETED and "large" not in item.name
        return "backend" in item.fixturenames and quick and not repeats(item)

    rest = [item for item in items if not wanted(item)]
    items[:] = [item for item in items if wanted(item)]
    config.hook.pytest_deselected(items=rest)


def pytest_collection_finish(session):
    """Modules and test items stay to the end: the garbage collector need not walk them again and again."""
    gc.collect()
    gc.freeze()
