"""The eager lane: in plain eager mode an op's composition and backward are called directly.

A registered Python op costs several microseconds a call, more with autograd, as long as the smaller kernels themselves
(benchmarks/overhead.py). `call` therefore goes past the dispatcher when nothing could see the difference: plain
tensors, no compilation, no dispatch or function mode. Both lanes share the composition, what is saved, and the backward
formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch.compiler import is_compiling
from torch.nn import Parameter

from .plan.planned import state

_runs: dict[Any, Callable] = {}
_functions: dict[Any, type[torch.autograd.Function]] = {}


def add_run(op: Any, run: Callable) -> None:
    """`run(*args)` is what `op` computes."""
    _runs[op] = run


def add_function(op: Any, differentiable: int, remember: Callable, backward: Callable) -> None:
    """Makes the differentiable form of `op` from what its registered autograd is made of. It returns the first
    `differentiable` outputs alone: the others are only saved."""
    run = _runs[op]

    class Lane(torch.autograd.Function):
        # One method: a separate setup_context would bind the signature anew at every call.
        @staticmethod
        def forward(ctx, *inputs):
            mode = state.mode
            state.mode = mode | state.TRAINING
            try:
                output = run(*inputs)
            finally:
                state.mode = mode
            ctx.reduced = state.reduced
            if not isinstance(output, tuple):
                remember(ctx, inputs, (output,))
                return output
            remember(ctx, inputs, output)
            return output[:differentiable]

        @staticmethod
        def backward(ctx, *grads):
            """In forward's precision, whatever is allowed by now."""
            before, state.reduced = state.reduced, ctx.reduced
            try:
                return backward(ctx, *grads)
            finally:
                state.reduced = before

    Lane.__name__ = op._schema.name.split("::")[1]
    _functions[op] = Lane


def call(op: Any, *args: Any) -> Any:
    """op(*args), by the shorter way where it is the same. Only differentiable results may be asked for while gradients
    are recorded: the shorter way has no others then."""
    if is_compiling() or _len_torch_dispatch_stack() or _len_torch_function_stack():
        return op(*args)
    needs_grad = False
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            if a.requires_grad:
                needs_grad = True
        elif isinstance(a, Tensor):
            return op(*args)
    if needs_grad and is_grad_enabled() and op in _functions:
        return _functions[op].apply(*args)
    return _runs[op](*args)
