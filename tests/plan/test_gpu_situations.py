"""A situation of a planned step says everything that Triton compiles a kernel for: a way that ran in it before compiles
nothing in a later call, a captured one among them."""

import collections

import pytest
import torch

import zeroblock as zb
from zeroblock.backends import available as _backends
from zeroblock.plan import planned as _plan

from .gpu_cases import NORMS_GATES, OPTIONS, inputs, ops, planned_on_the_cpu

TRITON = _backends.triton()
pytestmark = pytest.mark.skipif(TRITON is None or _backends.interprets(), reason="needs triton, not interpreting")


def _compiled_for(launch):
    """What Triton's JIT tells kernels apart by; `source` takes every tensor as aligned."""
    tensors = [v for v in launch.arguments.values() if isinstance(v, torch.Tensor)]
    aligned = tuple(t.data_ptr() % 16 == 0 for t in tensors)
    return launch.source().hash(), aligned, tuple(sorted(launch.options.items()))


def _variants(op):
    """The operands, and again with one of them elsewhere in memory, in rows apart, of one row for all, of fp32."""
    given = inputs(op, torch.bfloat16)
    if op == "group_norm_silu_conv_residual":
        given |= {name: torch.randn(2, 8).bfloat16() for name in ("scale", "shift")}
    yield given
    for name, t in given.items():
        moved = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride()).copy_(t)
        forms = [moved] if "conv" in op or "linear" in op else [moved, t.float()]  # those take one dtype
        if t.dim() < 4:
            apart = torch.empty(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype)[..., : t.shape[-1]].copy_(t)
            forms += [apart, t[:1].expand(t.shape)]
        yield from ({**given, name: form} for form in forms)


def _situations(op, patch):
    """{(step, way, situation): what its kernels were compiled for, of every call in it}, forward and backward."""
    from zeroblock.kernels import _launch

    found = collections.defaultdict(set)

    def call(step, *args):
        for name, way in step.takers(*args).items():
            if name.startswith("triton"):
                before = len(launches)
                way.run(*args)
                compiled = tuple(_compiled_for(launch) for launch in launches[before:])
                found[step.name, name, step.signature(*args)].add(compiled)
        return step.library.run(*args)

    patch.setattr(_plan.PlannedOp, "__call__", call)
    with _plan.use("fixed"), _launch.recording(run=False) as launches:
        patch.setattr(TRITON, "device", "cpu")
        for given in _variants(op):
            leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
            y = getattr(zb, op)(**leaves, **OPTIONS[op])
            sum(t.float().sum() for t in (y if isinstance(y, tuple) else (y,))).backward()
    return found


@ops
def test_a_situation_says_what_is_compiled(op):
    with planned_on_the_cpu() as patch:
        found = _situations(op, patch)
    assert len(found) >= 4 and [key for key, compiled in found.items() if len(compiled) > 1] == []


def test_a_situation_that_says_too_little_is_seen():
    with planned_on_the_cpu() as patch:
        for step in NORMS_GATES:
            shapes = lambda *args: tuple(a.shape if isinstance(a, torch.Tensor) else a for a in args)  # noqa: E731
            patch.setattr(step, "signature", shapes)
        found = _situations("gate_residual", patch)
    assert any(len(compiled) > 1 for compiled in found.values())
