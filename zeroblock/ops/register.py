"""How an op is registered: schema, forward, fake and backward of `Op`, and the eager fast path past the dispatcher.

Ops are opaque to torch.compile and export, but for those with a `definition`, which torch.compile traces instead in
training on a CPU: norms and gates, which inductor fuses with what surrounds them. Schemas have fixed arity: an absent
result is an empty tensor, and statistics come back beside the result because backward can save only inputs and outputs.
Saved for backward: the inputs that the caller owns, x's statistics, and nothing of the size of an activation. A
backward that runs with grad mode on (create_graph=True) recomputes its gradient through reference.py and is
differentiable to any order.

The function of an op is called by its users and by the dispatcher alike. It begins with `route`: in plain eager mode,
where nothing could see a difference, it runs at once; a registered Python op costs several microseconds a call, more
with autograd, as long as the smaller kernels themselves (benchmarks/overhead.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting
from torch.nn import Parameter

from .._version import NAMESPACE
from ..backends.base import MaybeTensor
from ..kernels._torch import STRIDES_TAG, TELLS_EXPORTS
from ..plan.mode import REDUCED, TRAINING, fixed_rule, mode
from .shapes import empty

_registry = torch.library.Library(NAMESPACE, "FRAGMENT")

F = TypeVar("F", bound=Callable[..., Any])
Grads = Sequence[MaybeTensor]
# backward(inputs, needed, *output gradients, *saved outputs) -> the gradients of the inputs, in their order
Backward = Callable[..., Grads]
# double_backward(inputs, needed, output gradients, saved outputs) -> the same, differentiable
DoubleBackward = Callable[[Sequence[Any], Sequence[bool], Sequence[MaybeTensor], Sequence[Tensor]], Grads]


def left_to_compiler(x: Tensor) -> bool:
    """Whether torch.compile traces the call for training on a CPU, and not to export it: what holds no zero path is
    then written as plain PyTorch, which inductor fuses forward and backward. Elsewhere the kernels are called: in
    inference they are as fast or faster (benchmarks/run.py --group models)."""
    return TELLS_EXPORTS and is_dynamo_compiling() and is_grad_enabled() and x.is_cpu and not is_exporting()


def is_traced() -> bool:
    """Whether a compiler, or another mode of the dispatcher, sees what is called."""
    return is_compiling() or _len_torch_dispatch_stack() > 0


def filled(results: Sequence[MaybeTensor], like: Tensor) -> tuple[Tensor, ...]:
    """None results become empty tensors, as the schemas promise."""
    return tuple(empty(like) if r is None else r for r in results)


class Op:
    """One registered op. Its first `differentiable` outputs carry gradients; the others are statistics and the like.

    device_arg: the number of an input on the op's device; None: the first tensor.
    residual: the number of an input that is merely added: it is not saved (backward sees its dtype instead,
    double_backward None), and its gradient is dy unless they say otherwise.
    save(inputs, outputs): what is saved beside the inputs, by default the outputs that carry no gradient.
    kept_as(inputs): the inputs as they are saved: stand-ins of those that this call's backward does not read.
    again: (the number of a result, what makes it once more of the inputs and what is saved beside them): `remade.py`.
    """

    def __init__(
        self,
        schema: str,
        *,
        differentiable: int = 1,
        device_arg: int | None = 0,
        residual: int | None = None,
        save: Callable[[Sequence[Any], tuple[Tensor, ...]], tuple[MaybeTensor, ...]] | None = None,
        kept_as: Callable[[Sequence[Any]], Sequence[Any]] | None = None,
        again: tuple[int, Callable[[Sequence[Any], Sequence[MaybeTensor]], Tensor]] | None = None,
    ):
        self.name = schema[: schema.index("(")]
        self.differentiable, self.device_arg, self.residual, self.save = differentiable, device_arg, residual, save
        self.kept_as, self.again = kept_as, again
        _registry.define(schema, tags=(torch.Tag.pt2_compliant_tag, STRIDES_TAG))
        self.overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self._autograd: _Autograd | None = None
        self._function: type[torch.autograd.Function] | None = None  # made by the first call that needs it
        self._definition: Callable[..., Any] | None = None

    # ---- registration -------------------------------------------------------------------------------------------

    def forward(self, run: F) -> F:
        """Decorates the op's function run(*inputs, direct=False), which begins with `route`."""

        def from_the_dispatcher(*args: Any) -> Any:
            place = self.device_arg
            like = args[place] if place is not None else next(a for a in args if isinstance(a, Tensor))
            # On a CPU a compiled graph chooses as an eager call does, which costs a compiled model nothing that it had
            # (benchmarks/run.py --group models); on a GPU it may be about to be captured.
            chooses = isinstance(like, Tensor) and like.is_cpu
            with contextlib.nullcontext() if chooses else fixed_rule():
                results = run(*args, direct=True)
            return filled(results, like) if isinstance(results, tuple) else results

        _registry.impl(self.name, from_the_dispatcher, "CompositeExplicitAutograd")
        self._run = run
        return run

    def fake(self, fake: F) -> F:
        """Decorates fake(*inputs), the shapes, dtypes and strides of the results."""
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_registry)
        return fake

    def definition(self, definition: F) -> F:
        """Decorates definition(*inputs) -> the differentiable results: what torch.compile traces in place of the op for
        training on a CPU."""
        alone = self.differentiable == 1 and len(self.overload._schema.returns) > 1
        self._definition = (lambda *inputs: (definition(*inputs),)) if alone else definition
        return definition

    def backward(self, double_backward: DoubleBackward) -> Callable[[Backward], Backward]:
        """Decorates the op's backward; `double_backward` takes its place under create_graph=True."""

        def register(backward: Backward) -> Backward:
            autograd = _Autograd(self, backward, double_backward)
            torch.library.register_autograd(
                f"{NAMESPACE}::{self.name}", autograd.run, setup_context=autograd.setup_context, lib=_registry
            )
            self._autograd = autograd
            return backward

        return register

    # ---- the eager fast path ------------------------------------------------------------------------------------

    def route(self, *tensors: MaybeTensor) -> Callable[..., Any] | None:
        """Who must run a call with these tensors in place of the op's function: the registered op, where a compiler, a
        mode or a tensor subclass has to see it; the autograd function, where a gradient is recorded (it returns the
        differentiable results alone); None: nobody."""
        if is_compiling():
            traced = self._definition is not None and left_to_compiler(tensors[0])  # type: ignore[arg-type]
            return self._definition if traced else self.overload
        if _len_torch_dispatch_stack() or _len_torch_function_stack():
            return self.overload
        needs_grad = False
        for t in tensors:
            kind = type(t)
            if kind is Tensor or kind is Parameter:
                if t.requires_grad:  # type: ignore[union-attr]
                    needs_grad = True
            elif t is not None:
                return self.overload
        if needs_grad and self._autograd is not None and is_grad_enabled():
            if self._function is None:
                self._function = _eager_function(self, self._run, self._autograd)
            return self._function.apply
        return None


def _eager_function(owner: Op, run: Callable[..., Any], autograd: _Autograd) -> type[torch.autograd.Function]:
    """The differentiable form of an op: the same forward, saved tensors and backward as the registered one."""
    differentiable = owner.differentiable

    class EagerFunction(torch.autograd.Function):
        op = owner

        # One method: a separate setup_context would bind the signature anew at every call.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            bits = mode.bits
            mode.bits = bits | TRAINING
            try:
                output = run(*inputs, direct=True)
            finally:
                mode.bits = bits
            ctx.reduced = bits & REDUCED
            if not isinstance(output, tuple):
                autograd.save_inputs(ctx, inputs, (output,))
                return output
            autograd.save_inputs(ctx, inputs, output)
            return output[:differentiable]

        @staticmethod
        def backward(ctx: Any, *grads: MaybeTensor) -> Any:
            """In the precision that was allowed at forward."""
            bits = mode.bits
            mode.bits = bits & ~REDUCED | ctx.reduced
            try:
                return autograd.run(ctx, *grads)
            finally:
                mode.bits = bits

    EagerFunction.__name__ = owner.name
    return EagerFunction


class _Autograd:
    """What an op saves, and its backward: shared by the registered op and the eager function."""

    def __init__(self, op: Op, backward: Backward, double_backward: DoubleBackward):
        self.op, self.backward, self.double_backward = op, backward, double_backward
        arguments = op.overload._schema.arguments
        self.count = len(arguments)
        is_tensor = [str(a.type) in ("Tensor", "Optional[Tensor]") for a in arguments]
        self.saved_at = [i for i in range(self.count) if is_tensor[i] and i != op.residual]
        self.kept_at = [i for i in range(self.count) if i not in self.saved_at]
        stored = [*self.saved_at, *self.kept_at]
        self.place = [stored.index(i) for i in range(self.count)]  # of an input among those stored

    def save_inputs(self, ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        op = self.op
        residual = None if op.residual is None else inputs[op.residual]
        ctx.kept = [inputs[i] if i != op.residual or residual is None else residual.dtype for i in self.kept_at]
        saved = output[op.differentiable :] if op.save is None else op.save(inputs, output)
        inputs = inputs if op.kept_as is None else op.kept_as(inputs)
        ctx.save_for_backward(*[inputs[i] for i in self.saved_at], *saved)

    def setup_context(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        output = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*output[self.op.differentiable :])
        self.save_inputs(ctx, inputs, output)

    def saved(self, ctx: Any) -> tuple[list[Any], Sequence[Any]]:
        """The inputs, the dtype of the residual in its place, and what was saved beside them."""
        saved, count = ctx.saved_tensors, len(self.saved_at)
        stored = [*saved[:count], *ctx.kept]
        return [stored[i] for i in self.place], saved[count:]

    def run(self, ctx: Any, *grads: MaybeTensor) -> tuple[MaybeTensor, ...]:
        residual, count = self.op.residual, self.count
        grads = grads[: self.op.differentiable]
        if grads[0] is None and all(g is None for g in grads):
            return (None,) * count
        inputs, extra = self.saved(ctx)
        residual_dtype = None if residual is None else inputs[residual]
        needed = list(ctx.needs_input_grad[:count])
        given = len(needed)
        if given < count:  # a call through the dispatcher that left arguments to their defaults
            needed += [False] * (count - given)
        if torch.is_grad_enabled():
            if residual is not None:
                inputs[residual] = None  # its gradient is dy: what is recomputed goes without it
            tensors = [n and i != residual for i, n in enumerate(needed)]
            results = list(self.double_backward(inputs, tensors, grads, extra))
        else:
            results = list(self.backward(inputs, needed, *grads, *extra))
        if residual is not None and needed[residual] and results[residual] is None and grads[0] is not None:
            results[residual] = grads[0].to(residual_dtype)
        # Through the dispatcher what is absent comes back as an empty tensor.
        return tuple([r if n else None for r, n in zip(results, needed, strict=True)][:given])


def from_node(node: Any) -> tuple[Op, list[Any], Sequence[Any]]:
    """The op of a node of its eager function in the autograd graph, its inputs, and what was saved beside them."""
    op: Op = type(node)._forward_cls.op
    assert op._autograd is not None
    return op, *op._autograd.saved(node)


# ---- gradients through the reference --------------------------------------------------------------------------------


def reference_grads(
    fn: Callable[..., Any], inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[MaybeTensor]
) -> list[MaybeTensor]:
    """Differentiable gradients of fn(*inputs) for the tensors marked in `needed`, None elsewhere.

    Each input passes through an alias of its own: one tensor given twice gets two gradients, not the sum twice.
    """
    with torch.enable_grad():
        aliases = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
        outputs = fn(*aliases)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(y, dy) for y, dy in zip(outputs, grads, strict=True) if dy is not None]
    wanted = [t for t, n in zip(aliases, needed, strict=True) if n and isinstance(t, Tensor)]
    ys, dys = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))
    return [next(found) if n and isinstance(t, Tensor) else None for t, n in zip(aliases, needed, strict=True)]


def recorded_grads(fn: Callable[..., Tensor], inputs: Sequence[Any], grad: Tensor) -> list[MaybeTensor]:
    """`reference_grads` for the inputs that record one: saved outputs carry the graph of what they were made of."""
    wanted = [isinstance(t, Tensor) and t.requires_grad for t in inputs]
    return reference_grads(fn, inputs, wanted, (grad,)) if any(wanted) else [None] * len(inputs)


def through(reference: Callable[..., Any]) -> DoubleBackward:
    """The double backward of an op: its gradients through reference(*inputs)."""

    def double_backward(
        inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[MaybeTensor], extra: Sequence[Tensor]
    ) -> Grads:
        return reference_grads(reference, inputs, needed, grads)

    return double_backward
