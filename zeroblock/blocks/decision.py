"""May this residual branch be skipped, and why: the one question that blocks ask (contract: zero.py).

In this order: the policy and the device, plain eager execution, the values, and for a branch that is zero whether
anything watches the modules that a skip leaves uncalled. Values come before hooks: a weight that is not zero shows
within its first elements, the hooks of a large block take longer to look through.

Counters: a skipped branch counts one skip, a branch that was found not to be zero one execution, under the name of its
module or family; where a skip is not allowed only the ops of the dense path count. A transformer block has one branch
for each gate, so a block that is skipped as a whole counts as many skips as it has gates, whoever owns it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from torch import Tensor, nn
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .. import zero
from .layers import draws, undeclared


class Answer(enum.Enum):
    RUN = "it is not zero"
    SKIP_BY_WEIGHT = "the weight of its last layer is zero"
    SKIP_BY_GATE = "its gate is zero"
    NOT_ALLOWED = "it has to run, zero or not"


# Module globals: reading a member off its class costs several times as much.
RUN, SKIP_BY_WEIGHT, SKIP_BY_GATE, NOT_ALLOWED = Answer
SKIPS = (SKIP_BY_WEIGHT, SKIP_BY_GATE)

# Policies for the ops a block calls. The weight was found not to be zero: the op need not look again.
ALREADY_JUDGED = "never"
# Not the last layer of its branch: its weight holds nothing at zero.
UNTESTED = "never"


def decide(
    name: str,
    policy: str,
    weights: tuple[Tensor, ...] = (),
    gates: tuple[Tensor, ...] = (),
    bypassed: Iterable[nn.Module | None] = (),
    *,
    may_draw: bool = True,
) -> Answer:
    """Whether the branch `name` is skipped at this call, and why; counted once.

    weights: the tensors that hold the branch at zero while all of them are zero; gates: likewise.
    bypassed: the modules that a skip leaves uncalled. may_draw: False: they must not draw random numbers either.
    """
    if not allowed(name, policy, weights[0] if weights else gates[0]):
        return NOT_ALLOWED
    return conclude(name, judge(weights, gates), bypassed, may_draw)


def judge(weights: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> Answer:
    """What the values say: RUN, or which of them hold the branch at zero."""
    if gates and _all_zero(gates):
        return SKIP_BY_GATE
    return SKIP_BY_WEIGHT if weights and _all_zero(weights) else RUN


def _all_zero(tensors: tuple[Tensor, ...]) -> bool:
    for t in tensors:
        if not zero.is_exactly_zero(t):
            return False
    return True


def conclude(
    name: str, answer: Answer, bypassed: Iterable[nn.Module | None], may_draw: bool = True, branches: int = 1
) -> Answer:
    """The answer that the values gave, once the `bypassed` modules were looked at too: counted, as `branches` skips
    where that is how many a skip leaves out."""
    if answer is RUN:
        zero.count(name, False)
    elif not bypassed or bypassable(bypassed, may_draw):
        zero.count(name, True, branches)
    else:
        return NOT_ALLOWED
    return answer


def op_policy(answer: Answer, policy: str) -> str:
    """The zero_skip of an op that computes a branch for which `answer` was given."""
    return ALREADY_JUDGED if answer is RUN else policy


def allowed(name: str, policy: str, judged: Tensor) -> bool:
    """Whether a module may look at `judged` and skip a whole branch: the policy lets the host decide, eagerly."""
    # Compilation first: whatever else a compiler has to trace for a verdict that is known costs its time.
    return not is_compiling() and zero.test_of(name, policy, judged) == zero.HOST and _nothing_watches()


def runs_eagerly() -> bool:
    """No compilation, no dispatch mode, no transform: plain calls."""
    return not is_compiling() and _nothing_watches()


def _nothing_watches() -> bool:
    return not _len_torch_dispatch_stack() and not zero.transforms_active()


def bypassable(modules: Iterable[nn.Module | None], may_draw: bool = True) -> bool:
    """Whether these modules (with all of theirs) may be left uncalled: no hooks, no BatchNorm that would learn; with
    may_draw False, no random numbers drawn. Under torch.jit.trace they are called, so that it sees whose weights it
    records."""
    if (
        _global_forward_hooks  # torch has a function for the four, but not in 2.7
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
        or _get_tracing_state() is not None
    ):
        return False
    waiting = list(modules)
    if is_compiling():
        return _bypassable_in_a_graph(waiting, may_draw)
    for m in waiting:  # grows by the children of each
        if m is None:
            continue
        fields = m.__dict__  # read directly: looking attributes up on a module costs as much as all the rest
        if "training" not in fields:  # a ScriptModule keeps it elsewhere
            fields = {**fields, **{name: getattr(m, name) for name in _READ}}
        if (
            fields["_forward_hooks"]
            or fields["_forward_pre_hooks"]
            or fields["_backward_hooks"]
            or fields["_backward_pre_hooks"]
            or "forward" in fields  # offloading and casting hooks replace it on the instance
        ):
            return False
        if fields["training"]:
            if isinstance(m, _NormBase) or not may_draw and draws(m):  # learns, or draws
                return False
        elif not may_draw and (type(m) not in undeclared or "draws_random_numbers" in fields) and draws(m):
            return False
        children = fields["_modules"]
        if children:
            waiting.extend(children.values())
    return True


def _bypassable_in_a_graph(waiting: list[nn.Module | None], may_draw: bool) -> bool:
    """For a compiler, by attributes: it knows those of modules, and guards empty hooks as it does for modules that are
    called."""
    for m in waiting:
        if m is not None:
            # Written with `and`, it is traced in half the time.
            unwatched = not m._forward_hooks and not m._forward_pre_hooks and not m._backward_hooks
            # That `forward` is the class's it guards where it is read, not where it is looked for among the instance's
            # own (vars, which it traces in less time than __dict__).
            if not unwatched or m._backward_pre_hooks or "forward" in vars(m) or m.forward is None:
                return False
            if isinstance(m, _NormBase) and m.training or not may_draw and draws(m):
                return False
            if m._modules:
                waiting.extend(m._modules.values())
    return True


def is_watched(m: nn.Module) -> bool:
    """Whether hooks of this module, or a forward of the instance's own, would not be called if it were bypassed."""
    hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
    return any(hooks) or "forward" in vars(m) or m.forward is None  # the last: for a compiler's guards, as above


_READ = ("training", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
