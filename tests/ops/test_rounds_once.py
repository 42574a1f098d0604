"""A gated residual in half precision is rounded once, at its end: the product of two such numbers is exact in fp32, so
that its sum with the residual has one right result, bit for bit. Products rounded before the sum, as eager rounds them,
stay within the error budget of test_parity.py."""

import pytest
import torch

import zeroblock as zb

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
GATES = {"sample": (2, 48), "token": (2, 7, 48)}


def _of_linear(residual, gate, branch):
    """Of a branch whose last layer passes its input on."""
    weight = torch.eye(branch.shape[-1], dtype=branch.dtype, device=branch.device)
    return zb.linear_gate_residual(branch, weight, None, gate, residual)


def _with_norm(residual, gate, branch):
    return zb.gate_residual_layer_norm_modulate(residual, gate, branch, gate, gate)[0]


def _with_rms_norm(residual, gate, branch):
    return zb.residual_norm_modulate(residual, branch, gate=gate, norm="rms")[0]


OPS = {
    "gate_residual": zb.gate_residual,
    "linear_gate_residual": _of_linear,
    "gate_residual_layer_norm_modulate": _with_norm,
    "residual_norm_modulate": _with_rms_norm,
}


@dtypes
@pytest.mark.parametrize("rows", GATES)
@pytest.mark.parametrize("op", OPS)
def test_a_gated_residual_is_rounded_once(backend, device, op, rows, dtype):
    torch.manual_seed(0)
    residual, branch = (torch.randn(2, 7, 48, device=device).to(dtype) for _ in range(2))
    gate = torch.randn(GATES[rows], device=device).to(dtype)
    rows_of_tokens = gate if gate.dim() == 3 else gate[:, None]
    once = (residual.float() + rows_of_tokens.float() * branch.float()).to(dtype)
    assert not torch.equal(residual + rows_of_tokens * branch, once)  # else nothing here tells them apart
    assert torch.equal(OPS[op](residual, gate, branch), once)
