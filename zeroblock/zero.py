"""The zero contract: while a residual branch is exactly zero, its matmuls are not executed.

A branch is y = residual + gate * tail(h), h = body(x): `tail` its last convolution or linear layer, `gate` optional.

1. Zero means every element is +0 or -0, by its bits. Only plain floating strided tensors are ever tested.
2. The values decide, at that call: on the CPU an early-exit scan before each use; on a GPU a kernel writes a flag that
   zeroblock's own kernels of the op read. No verdict is remembered between calls, unless `zeroblock.freeze` has
   decided, which the user promises to keep valid. On a GPU what was last seen of a weight chooses between two plans
   (steps/hint.py), each exact for any weight: kernels that read the flag, and the fastest ones, which test nothing.
3. While zero, y = residual + gate * bias: a fresh tensor in the dtype and memory format eager gives (tokens of
   transformer blocks and of linear_gate_residual: contiguous), as when it is not zero.
4. A trainable tail or gate needs h: the body runs once, without a graph. Otherwise the body does not run at all.
5. Gradients equal eager's for finite values; every parameter and input upstream gets a real zero tensor, never None.
   A body that runs without a graph does not tell which of its parameters it uses: those that it leaves unused, of which
   eager has no gradient (None), get zeros too while the branch is zero.
6. The random stream is eager's. Dropout masks are drawn before the decision, as eager draws them. In training a body
   that may draw (anything but the deterministic layers of torch.nn, and modules that declare `draws_random_numbers =
   False`) runs even where its result is not needed. In eval mode a body is taken to draw nothing, unless a module of it
   declares `draws_random_numbers = True`; then it runs in both modes. `accelerate` tries it: a block that draws in eval
   mode is left alone.
7. Non-finite values: eager turns 0 * inf into NaN, a skipped branch does not.
8. BatchNorm in train mode, hooks on bypassed submodules, torch.func transforms, forward-mode AD and torch.jit.trace
   stop a skip. A backward with create_graph recomputes its gradient through the reference.
9. No collective is added: weights that are sharded (DTensor) are dense by rule 1.
10. `counters` tells how often each plan was executed and skipped; where the device alone knows, it was executed.

Policies: "auto" (never synchronises a device: CPU branches are skipped, an op's kernels on a GPU leave early, library
calls there run), "sync" (reads the verdict back from the device and skips whole branches; refused during CUDA-graph
capture), "never" (eager's behaviour, NaN and all).
Under torch.compile and export the ops' own test applies: the tail is skipped, the body runs. `blocks/decision.py`
decides about branches, `blocks/skip.py` executes a skipped one and its backward, `ops/residual_alone.py` a skipped op.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .backends.available import kernels_run_on_host
from .backends.select import select
from .plan.mode import capturing
from .steps import hint, packed
from .steps.flag import DEVICE as DEVICE
from .steps.flag import HOST as HOST
from .steps.flag import NEVER as NEVER
from .steps.flag import PLAIN_TYPES as PLAIN_TYPES
from .steps.flag import is_plain_tensor as is_plain_tensor
from .steps.flag import is_seen_nonzero as is_seen_nonzero
from .steps.flag import may_test as may_test

POLICIES = ("auto", "sync", "never")

executed: dict[str, int] = {}
skipped: dict[str, int] = {}


def count(name: str, was_skipped: bool, times: int = 1) -> None:
    table = skipped if was_skipped else executed
    table[name] = table.get(name, 0) + times


def counters() -> dict[str, tuple[int, int]]:
    """{op or module: (executed, skipped)} since the start or the last `reset_counters`."""
    return {name: (executed.get(name, 0), skipped.get(name, 0)) for name in sorted({*executed, *skipped})}


def reset_counters() -> None:
    executed.clear()
    skipped.clear()


def is_exactly_zero(t: Tensor) -> bool:
    """Every element is +0 or -0; False for any tensor that may not be tested (rule 1). Reads device memory back."""
    copy = packed.find(t) if packed.copies else None
    if copy is not None:
        return copy.zero  # as `freeze` found it: the user promised not to change it
    if is_seen_nonzero(t) or not may_test(t):
        return False
    return select("is_zero", t).is_zero(t)


_reference_only = 0


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Functions run their plain PyTorch definition and nothing is skipped: a tape of ATen operations sees all of it."""
    global _reference_only
    _reference_only += 1
    try:
        yield
    finally:
        _reference_only -= 1


def transforms_active() -> bool:
    """torch.func transforms, forward-mode AD, torch.jit.trace (or `reference_only`): the reference handles them, and
    nothing is skipped (rule 8)."""
    return (
        _reference_only > 0
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    )


def test_of(op: str, policy: str, weight: Tensor, given: Tensor | None = None) -> int:
    """How an op tests its weight at this call: not (NEVER), with the verdict on the host (HOST), or with a flag that
    kernels read (DEVICE). A device is read back under "sync" only. given: what the user gave, of which `weight` may be
    autocast's copy."""
    if policy == "auto":
        if (weight.is_cpu and kernels_run_on_host()) or packed.is_frozen(weight):
            return HOST
        if given is not None and given is not weight and not is_compiling():
            hint.follow(weight, given)
        return DEVICE
    if policy == "never":
        return NEVER
    if policy != "sync":
        raise ValueError(f"{op}: zero_skip must be one of {', '.join(POLICIES)}, got {policy!r}")
    if capturing(weight.device):
        raise RuntimeError(
            f'{op}: zero_skip="sync" reads a verdict back from the device, which CUDA-graph capture forbids'
        )
    return HOST
