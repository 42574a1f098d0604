"""Bad arguments of compiled calls."""

from __future__ import annotations

import pytest
import torch

import zeroblock as zb

from .test_compile import _r, fresh_compiler  # noqa: F401

REFUSED = {
    "num_groups": lambda x, t: zb.group_norm_silu(x, 3),
    "weight": lambda x, t: zb.group_norm_silu(x, 4, x[0, :4, 0, 0]),
    "scale": lambda x, t: zb.channel_rms_norm_silu(x, scale=x[0, :, 0, 0]),
    "eps": lambda x, t: zb.group_norm_silu(x, 4, eps=-1.0),
    "residual": lambda x, t: zb.conv_residual(x, x[:, :, :3], None, x[:, :2, :1, :1]),
    "padding": lambda x, t: zb.conv_residual(x, x[:, :, :3], None, None, padding=(1, 1, 1, 1, 0, 0)),
    "bias": lambda x, t: zb.group_norm_silu_conv_residual(x, 4, None, None, x[:, :, :3], x[0, :3, 0, 0]),
    "shift": lambda x, t: zb.layer_norm_modulate(t, t[:, 0, :4], None),
    "weight of a norm": lambda x, t: zb.rms_norm_modulate(t, None, None, weight=t[0, 0, :1]),
    "weight of a linear": lambda x, t: zb.linear_gate_residual(t, t[0, :, :7], None, None, None),
    "gate": lambda x, t: zb.gate_residual(t, t[:, 0, :3], t),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_compiled_call_is_refused_in_the_same_words(what):
    """A compiler traces no checks; the fakes of the ops make them before anything is computed."""
    operands = _r(2, 8, 5, 3), _r(2, 3, 8)
    with pytest.raises(ValueError) as eager:
        REFUSED[what](*operands)
    with torch.no_grad(), pytest.raises(Exception) as compiled:
        torch.compile(REFUSED[what], backend="eager", fullgraph=True)(*operands)
    assert str(eager.value).replace("\n", " ") in str(compiled.value)
