"""Bitwise the same results whatever the number of threads, and again on every run."""

import pytest
import torch

from zeroblock.testing import CPU_MISSING, use_backend
from zeroblock.testing.cases import CASES, Case
from zeroblock.testing.parity import assert_deterministic

pytestmark = pytest.mark.skipif(CPU_MISSING is not None, reason=f"the cpu backend cannot run: {CPU_MISSING}")
# Convolutions and GEMMs are the library's: it may cut a sum differently for another number of threads.
LIBRARY = ("conv_residual", "group_norm_silu_conv_residual", "layer_norm_modulate_linear", "linear_gate_residual")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(c, layout, id=f"{c}-{layout}")
        for c in CASES
        if c.large
        for layout in c.layouts
        if layout != "strided"
    ],
)
def test_same_bits_for_any_number_of_threads_and_every_run(case, layout, dtype):
    with use_backend("cpu"):
        assert_deterministic(case, dtype, layout, (2, 2) if case.op in LIBRARY else (1, 2, 3))


def test_the_check_catches_results_that_depend_on_the_threads():
    class Uneven(Case):
        def run(self, **inputs):
            return super().run(**inputs) + torch.get_num_threads() * 1e-6

    case = next(c for c in CASES if c.op == "layer_norm_modulate")
    with pytest.raises(AssertionError, match="y0, 2 threads against 1: .* elements differ"):
        assert_deterministic(Uneven(case.op, "uneven", case.sizes), torch.float32, "dense", (1, 2))
