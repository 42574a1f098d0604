"""The kernels of the instruction set that this processor would not pick, through the same parity check.

The test compiles bindings and kernels once more under another namespace, with a choice that is always AVX2, and
puts those ops in the place of the installed ones. AVX-512 is what the rest of the suite runs on where it can run.
"""

import importlib
import os
import shlex
import shutil
import subprocess

import pytest
import torch

from zeroblock.backends.select import select
from zeroblock.testing import CPU_MISSING, use_backend
from zeroblock.testing.cases import CASES, DTYPES
from zeroblock.testing.parity import assert_deterministic, assert_parity

from ..support import ROOT, TORCH_TARGET
from ..zero import test_kernel as zero_kernel
from . import test_extremes as extremes
from . import test_operands as operands
from . import test_winograd as winograd

CSRC = ROOT / "csrc"
CXX = shlex.split(os.environ.get("CXX", "g++"))
NATIVE = (
    "group_norm_silu",
    "channel_rms_norm_silu",
    "layer_norm_modulate",
    "rms_norm_modulate",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "residual_norm_modulate",
    "linear_gate_residual",  # the activations
)
PICK_ISA = """
#include "cpu/tables.h"
namespace zeroblock {
ZB_TABLES(avx2)
const CpuKernels* cpu_kernels() {
  static const CpuKernels avx2 = ZB_KERNELS(avx2);
  return &avx2;
}
}
"""


def _missing() -> str | None:
    if CPU_MISSING is not None:
        return f"the cpu backend cannot run: {CPU_MISSING}"
    if not (CSRC / "torch").exists():
        return "the C++ sources are not here"
    if shutil.which(CXX[0]) is None:
        return f"the compiler {CXX[0]} is not installed"
    if torch.ops.zeroblock._cpu_isa() != "avx512":
        return "this processor has no AVX-512: the suite runs on the AVX2 kernels as it is"
    return None


@pytest.fixture(scope="module")
def avx2_library(tmp_path_factory):
    """Loads the private ops on the AVX2 kernels as torch.ops.zeroblock_avx2._*."""
    from torch.utils import cpp_extension

    folder = tmp_path_factory.mktemp("avx2")
    (folder / "pick_isa.cpp").write_text(PICK_ISA)
    headers = [f"-I{CSRC}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    common = [
        *CXX,
        "-std=c++20",
        "-fPIC",
        "-Dzeroblock=zeroblock_avx2",
        TORCH_TARGET,
    ]
    avx2 = ["-mavx2", "-mfma", "-mf16c", "-DZB_ISA=avx2"]
    jobs = [
        *(
            [*common, "-O1", *avx2, "-c", str(path), "-o", f"{path.stem}.o"]
            for path in sorted((CSRC / "cpu").glob("table_*.cpp"))
        ),
        [*common, "-O0", *headers, "-c", "pick_isa.cpp", "-o", "pick_isa.o"],
        *(
            [*common, "-O0", *headers, "-c", str(path), "-o", f"{path.stem}.o"]
            for path in sorted((CSRC / "torch").glob("cpu_*.cpp"))
        ),
    ]
    running = [subprocess.Popen(job, cwd=folder, stderr=subprocess.PIPE, text=True) for job in jobs]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    link = [*CXX, "-shared", *(job[-1] for job in jobs), "-o", "avx2.so"]
    subprocess.run(
        [*link, *(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"], cwd=folder, check=True
    )
    torch.ops.load_library(str(folder / "avx2.so"))
    return torch.ops.zeroblock_avx2


@pytest.fixture
def avx2(avx2_library, monkeypatch):
    """The cpu backend on the AVX2 kernels."""
    modules = [importlib.import_module(f"zeroblock.backends.{name}") for name in ("cpu", "cpu_images", "cpu_rows")]
    replaced = 0
    of_avx2 = lambda op: getattr(avx2_library, op._opname).default  # noqa: E731
    for module in modules:
        for name, op in vars(module).copy().items():
            if isinstance(op, torch._ops.OpOverload) and op.namespace == "zeroblock":
                monkeypatch.setattr(module, name, of_avx2(op))
                replaced += 1
    backend = modules[0].CPU
    monkeypatch.setattr(backend, "winograd", type(backend.winograd)(*map(of_avx2, backend.winograd)))
    monkeypatch.setattr(backend, "residual_if_zero", of_avx2(backend.residual_if_zero))
    assert replaced >= 13 and select("group_norm_silu", torch.empty(1)) is backend
    assert avx2_library._cpu_isa() == "avx2"
    with use_backend("cpu"):
        yield backend


MISSING = _missing()
pytestmark = [pytest.mark.one_worker, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("case", "layout"),
    [pytest.param(c, layout, id=f"{c}-{layout}") for c in CASES if c.op in NATIVE for layout in c.layouts],
)
def test_avx2_kernels(avx2, case, layout, dtype):
    assert_parity(case, dtype, layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(c, layout, id=f"{c}-{layout}")
        for c in CASES
        if c.op in NATIVE[:-1] and c.large
        for layout in c.layouts
        if layout != "strided"
    ],
)
def test_avx2_kernels_give_the_same_bits_for_any_number_of_threads(avx2, case, layout):
    assert_deterministic(case, torch.float32, layout, (1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_avx2_operands_and_extremes(avx2, dtype):
    on = ("cpu", "cpu")
    for of in set(DTYPES) - {dtype}:
        operands.test_operands_are_used_as_they_are(*on, "layer_norm_modulate", dtype, of, "btd")
        operands.test_operands_are_used_as_they_are(*on, "gate_residual_layer_norm_modulate", dtype, of, "btd")
    for D in (2, 37, 768, 1152, 10007):
        extremes.test_a_constant_row_has_no_norm(*on, D, 100.7, dtype)
    extremes.test_a_row_of_one_has_no_gradient(*on, dtype)
    extremes.test_rows_of_two(*on, dtype)
    extremes.test_a_group_of_one_has_no_gradient(*on, "nhwc", "silu", dtype)
    for name in ("silu", "gelu", "gelu_tanh"):
        extremes.test_activations_of_extreme_values(*on, name, dtype)
    if dtype != torch.float16:
        extremes.test_a_variance_that_overflows_shows(*on, 768, dtype)
    for norm in extremes.NORMS:
        extremes.test_long_rows_far_from_zero(*on, norm, 16384, 1e6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "layout"), [pytest.param(c, layout, id=f"{c}-{layout}") for c in winograd.CASES for layout in c.layouts]
)
def test_avx2_winograd(avx2, case, layout):
    assert_parity(case, torch.float32, layout)
    assert_deterministic(case, torch.float32, layout, (1, 2))


@pytest.mark.slow
@winograd.layouts
@pytest.mark.parametrize("weight_layout", winograd.FORMATS, ids=("oihw", "ohwi"))
def test_avx2_winograd_is_exact_on_small_integers(avx2, layout, weight_layout):
    winograd.test_small_tile_is_exact_on_small_integers(layout, weight_layout, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=lambda d: str(d)[6:])
def test_avx2_is_zero(avx2, dtype):
    t = torch.zeros(1003, dtype=dtype)
    assert avx2.is_zero(t) and avx2.is_zero(-t)
    for position in (*range(70), 1000, 1001, 1002):
        t[position] = torch.finfo(dtype).tiny
        assert not avx2.is_zero(t)
        t[position] = 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_avx2_residual_if_zero(avx2, dtype):
    zero_kernel.test_residual_if_zero_is_test_and_sum(dtype, flush=False)
    zero_kernel.test_sums_with_a_bias_in_both_layouts((2, 64, 33, 31), dtype, threads=2)
    zero_kernel.test_residual_if_zero_reads_the_parts_it_is_asked_for()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_avx2_winograd_weight_grad_of_a_panel_half_full(avx2_library, dtype):
    """24 output channels: the last panel of 16 has none in its second vector, and nothing is read for it."""
    x, dy = (torch.randn(1, c, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last) for c in (16, 24))
    weight = torch.empty(24, 16, 3, 3, dtype=dtype)
    got = avx2_library._winograd_weight_grad(dy, x, None, weight, 1, 2, True).double()
    exact = torch.nn.grad.conv2d_weight(x.double(), list(weight.shape), dy.double(), padding=1)
    largest = exact.abs().max().item()
    torch.testing.assert_close(got, exact, rtol=0, atol=largest * max(1e-5, 2 * torch.finfo(dtype).eps))
