"""Plans that take forward by one backend and backward by another: a branch that is zero has the gradients of eager.

What a kernel leaves behind where the flag stops it is read by kernels that know no flag.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import zeroblock as zb
from zeroblock.backends import available as _backends
from zeroblock.plan import planned as _plan
from zeroblock.testing import assert_error_budget, poison_empty

from ..cuda.simt import emulated
from .gpu_cases import always_flagged, planned_on_the_cpu, prefer

pytestmark = pytest.mark.interpreted
INTERPRETS = _backends.interprets()
OWN = ("triton 64x64x64", "triton folded") if INTERPRETS else ("cuda", "cuda fused")
BACKWARD = "triton" if INTERPRETS else "cuda"
G, C, K = 4, 16, 8


@contextlib.contextmanager
def planned(forward: str, backward: str):
    with contextlib.ExitStack() as stack:
        if not INTERPRETS and not torch.cuda.is_available():
            if emulated.missing() is not None:
                pytest.skip(str(emulated.missing()))
            stack.enter_context(emulated.emulated())
        patch = stack.enter_context(planned_on_the_cpu())
        always_flagged(patch)
        stack.enter_context(_plan.use("fixed"))
        stack.enter_context(poison_empty())
        yield prefer(patch, forward, backward)


def _inputs(kernel: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        t = torch.randn(size, generator=generator).bfloat16()
        return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t

    norm = {"norm_weight": draw(C), "norm_bias": draw(C), "scale": draw(2, C), "shift": draw(2, C)}
    tail = {"weight": torch.zeros_like(draw(K, C, kernel, kernel)), "bias": draw(K), "residual": draw(2, K, 6, 5)}
    return {"x": draw(2, C, 6, 5), **norm, **tail}


def _eager(x, norm_weight, norm_bias, scale, shift, weight, bias, residual):
    h = F.group_norm(x, G, norm_weight, norm_bias) * (1 + scale[..., None, None]) + shift[..., None, None]
    return residual + F.conv2d(F.silu(h), weight, bias, padding=weight.shape[2] // 2)


def _gradients(function, inputs, dtype=None):
    leaves = {name: t.to(dtype or t.dtype).requires_grad_() for name, t in inputs.items()}
    y = function(**leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


@pytest.mark.parametrize("backward", ("library", BACKWARD))
@pytest.mark.parametrize("forward", ("library", *OWN))
def test_a_zero_branch_has_the_gradients_of_eager(forward, backward):
    kernel = 1 if "folded" in forward else 3

    def ours(x, norm_weight, norm_bias, weight, **rest):
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
        return zb.group_norm_silu_conv_residual(x, G, **norm, weight=weight, padding=kernel // 2, **rest)

    inputs = _inputs(kernel)
    with planned(forward, backward) as ran:
        got = _gradients(ours, inputs)
    ways = {step: way for step, way in ran}
    assert ways["flagged group_norm_silu_conv_residual"].startswith(forward)
    assert ways["group_norm_silu_bwd"].startswith(backward)
    plain, exact = _gradients(_eager, inputs), _gradients(_eager, inputs, torch.float64)
    for name, expected in exact.items():
        if expected.any():
            assert_error_budget(got[name], plain[name], expected, name)
        else:
            assert torch.equal(got[name], torch.zeros_like(got[name])), name
