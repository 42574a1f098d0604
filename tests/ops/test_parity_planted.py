"""The parity check itself: what it catches, each by a planted fault."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from zeroblock.testing import CPU_MISSING, poison_empty
from zeroblock.testing.cases import CASES, Case
from zeroblock.testing.parity import assert_parity

SMALL = {str(case): case for case in CASES if not case.large}


def _forgets_weight(case):
    return lambda **t: case.run(**{**t, "weight": torch.ones_like(t["weight"]) + 0 * t["weight"]})


def _ignores_strides(case):
    return lambda **t: case.run(**{**t, "shift": t["shift"].as_strided(t["shift"].shape, (t["shift"].shape[1], 1))})


def _leaves_one_element_unwritten(case):
    def run(**t):
        y = case.run(**t)
        mask = torch.zeros_like(y, dtype=torch.bool)
        mask.view(-1)[-1] = True
        return torch.where(mask, torch.empty_like(y), y)

    return run


def _one_pass_variance(case):
    def run(x, num_groups=4, **t):
        grouped = x.reshape(x.shape[0], num_groups, -1)
        var = grouped.square().mean(2, keepdim=True) - grouped.mean(2, keepdim=True).square()
        xhat = ((grouped - grouped.mean(2, keepdim=True)) * (var + 1e-5).rsqrt()).reshape(x.shape)
        identity = {"eps": 0.0, "weight": t["weight"], "bias": t["bias"], "scale": t["scale"], "shift": t["shift"]}
        z = xhat * identity["weight"][None, :, None] + identity["bias"][None, :, None]
        return F.silu(z * (1 + t["scale"][..., None]) + t["shift"][..., None])

    return run


def _writes_its_input(case):
    return lambda **t: (t["x"].data.add_(1), case.run(**t))[1]


_LARGE_MEAN = Case(
    "group_norm_silu", "mean", {"N": 2, "C": 8, "S": (50,), "film": True, "mean": 1000.0, "std": 1.0}, {"num_groups": 4}
)


@pytest.mark.parametrize(
    ("fault", "case", "message"),
    [
        (_forgets_weight, SMALL["group_norm_silu-film"], "y0: L2 error"),
        (_ignores_strides, SMALL["layer_norm_modulate-chunks"], "y0: L2 error"),
        (_leaves_one_element_unwritten, SMALL["group_norm_silu-affine"], "y0: 4 of 26880 elements not finite"),
        (_one_pass_variance, _LARGE_MEAN, "y0: L2 error"),
        (_writes_its_input, SMALL["layer_norm_modulate-chunks"], "x was written to"),
    ],
    ids=lambda v: v.__name__.strip("_") if callable(v) and not isinstance(v, Case) else "",
)
def test_the_check_catches(fault, case, message):
    with pytest.raises(AssertionError, match=message):
        assert_parity(case, torch.float32, run=fault(case))


def test_the_check_catches_a_lost_gradient():
    case = SMALL["layer_norm_modulate-chunks"]
    with pytest.raises(AssertionError, match="no gradient for scale"):
        assert_parity(case, torch.float32, run=lambda **t: case.run(**{**t, "scale": t["scale"].detach()}))


def test_the_check_catches_a_wrong_memory_format():
    case = SMALL["group_norm_silu-film"]
    with pytest.raises(AssertionError, match="y0: strides"):
        assert_parity(case, torch.float32, "nhwc", run=lambda **t: case.run(**t).contiguous())


@pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
def test_poison_reaches_memory_allocated_in_the_extension():
    """Each result of the private C++ op is filled before the kernel writes it, and only under poison_empty."""
    x, gate = torch.randn(2, 3, 8), torch.randn(2, 8)

    def fills():
        with profile(activities=[ProfilerActivity.CPU]) as record:
            torch.ops.zeroblock._gate_residual_bwd(x, gate, x, True, True)
        return sum(event.name == "aten::fill_" for event in record.events())

    assert fills() == 0
    with poison_empty():
        assert fills() == 2  # dgate, dbranch
    assert fills() == 0 and not torch.are_deterministic_algorithms_enabled()
