"""The eager fast path past the dispatcher gives the bits of the registered op."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zeroblock as zb
from zeroblock import testing

from .op_calls import DTYPES, F32, forward_calls, maker, public_call

FORWARD = tuple(op for op in forward_calls(maker(F32, "contiguous")) if hasattr(zb, op))  # under names of their own


class _NoChange(TorchDispatchMode):
    """Dispatch as usual; its presence alone sends a call through the registered op."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("op", FORWARD)
def test_the_eager_path_gives_the_bits_of_the_op(op, dtype):
    results = []
    for mode in (contextlib.nullcontext(), _NoChange()):
        torch.manual_seed(0)
        args, kwargs = public_call(op, DTYPES[dtype])
        leaves = [t for t in args if isinstance(t, torch.Tensor)]
        for t in leaves:
            t.requires_grad_()
        with mode:
            out = getattr(zb, op)(*args, **kwargs)
            outputs = list(out) if isinstance(out, tuple) else [out]
            grads = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)
        results.append([*(y.detach() for y in outputs), *grads])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert a.stride() == b.stride()
        testing.assert_bitwise_equal(a, b, f"result {i}")
