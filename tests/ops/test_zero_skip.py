"""The registered ops under every way to test a weight, where the public functions would choose another."""

import pytest
import torch

from zeroblock import testing
from zeroblock.steps.flag import DEVICE, NEVER

from .op_calls import F32, differentiable, forward_calls, maker, registered


@pytest.mark.parametrize("op", ("conv_residual", "group_norm_silu_conv_residual", "linear_gate_residual"))
@pytest.mark.parametrize("zero_weight", (False, True), ids=("dense", "zero"))
def test_a_program_that_tests_on_the_device_runs_on_the_cpu(op, zero_weight):
    """zero_skip=DEVICE on CPU tensors, as in a program exported on a GPU: the dense result and gradients."""
    args = list(forward_calls(maker(F32, "contiguous"))[op][0])
    place = {"conv_residual": 1, "group_norm_silu_conv_residual": 9, "linear_gate_residual": 1}[op]
    if zero_weight:
        args[place] = torch.zeros_like(args[place])
    results = []
    for zero_skip in (NEVER, DEVICE):
        given = [a.detach().requires_grad_() if i in differentiable(op, args) else a for i, a in enumerate(args)]
        given[-2 if op == "linear_gate_residual" else -1] = zero_skip
        y = registered(op)(*given)[0]
        wanted = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    for i, (dense, device) in enumerate(zip(*results, strict=True)):
        testing.assert_bitwise_equal(device, dense, f"{op} {i}")
