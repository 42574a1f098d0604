"""Backward formulas of the ops. Imported once, by ops.py.

Saved for backward: the inputs the caller owns, x's statistics, and nothing the size of an activation. A backward that
runs with grad mode on (create_graph=True) recomputes its gradient through reference.py and is differentiable to any
order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _lane, ops
from . import reference as ref
from ._lane import call
from .backends import reference as _plain

MaybeTensor = Tensor | None


def reference_grads(
    fn: Callable, inputs: Sequence, needed: Sequence[bool], grads: Sequence[MaybeTensor]
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


def _through(reference: Callable) -> Callable:
    """The higher-order backward of an op: its gradients through reference(*inputs)."""
    return lambda inputs, needed, grads, extra: reference_grads(reference, inputs, needed, grads)


def _is_tensor(type_: torch.JitType) -> bool:
    """Of an argument in a schema: Tensor or Tensor?."""
    return str(type_) in ("Tensor", "Optional[Tensor]")


def _picker(positions: list[int]) -> Callable[[tuple], tuple]:
    """The items at these positions."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda items: tuple([items[i] for i in positions])


def _register(
    name: str,
    differentiable: int,
    backward: Callable,
    higher: Callable,
    *,
    residual: int | None = None,
    save: Callable | None = None,
) -> None:
    """Registers backward(inputs, needed, *grads, *extra) and, for create_graph, higher(inputs, needed, grads, extra).

    The first `differentiable` outputs carry gradients. `extra`, saved beside the inputs, is save(outputs): by default
    the other outputs. Input number `residual` is merely added: it is not saved (both functions see its dtype
    instead), and its gradient is dy unless they say otherwise.
    """
    op = getattr(ops, name)
    is_tensor = [_is_tensor(a.type) for a in op._schema.arguments]
    count = len(is_tensor)
    saved_at = [i for i in range(count) if is_tensor[i] and i != residual]
    kept_at = [i for i in range(count) if not is_tensor[i] or i == residual]
    first_extra = len(saved_at)
    # Both run at every step: taken apart and put together again without a loop.
    pick_saved, pick_kept = _picker(saved_at), _picker(kept_at)
    in_order = _picker([(saved_at + kept_at).index(i) for i in range(count)])

    def remember(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        if residual is not None and inputs[residual] is not None:
            inputs = (*inputs[:residual], inputs[residual].dtype, *inputs[residual + 1 :])
        ctx.kept = pick_kept(inputs)
        ctx.save_for_backward(*pick_saved(inputs), *(output[differentiable:] if save is None else save(output)))

    def setup_context(ctx, inputs, output):
        output = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*output[differentiable:])
        remember(ctx, inputs, output)

    def run_backward(ctx, *grads):
        grads = grads[:differentiable]
        if grads[0] is None and grads[-1] is None:  # one or two
            return (None,) * count
        saved = ctx.saved_tensors
        inputs, needed = in_order(saved[:first_extra] + ctx.kept), list(ctx.needs_input_grad[:count])
        if torch.is_grad_enabled():
            tensors = [n and i != residual for i, n in enumerate(needed)]
            results = higher(inputs, tensors, grads, saved[first_extra:])
        else:
            results = backward(inputs, needed, *grads, *saved[first_extra:])
        if residual is not None and needed[residual] and results[residual] is None:
            results = (*results[:residual], grads[0].to(inputs[residual]), *results[residual + 1 :])
        # Through the dispatcher what is absent comes back as an empty tensor.
        return tuple([r if n else None for r, n in zip(results, needed, strict=True)])

    torch.library.register_autograd(
        f"{ops.NAMESPACE}::{name}", run_backward, setup_context=setup_context, lib=ops._library
    )
    _lane.add_function(op, differentiable, remember, run_backward)


# ---- group_norm_silu ------------------------------------------------------------------------------------------------


def _group_norm_silu(inputs, needed, dy, mean, rstd):
    x, num_groups, weight, bias, _, scale, shift, silu = inputs
    dx, *rest = call(ops.group_norm_silu_bwd, dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu)
    return dx, None, rest[0], rest[1], None, rest[2], rest[3], None


_register(
    "group_norm_silu",
    1,
    _group_norm_silu,
    _through(
        lambda x, g, w, b, eps, scale, shift, silu: ref.group_norm_silu(
            x, g, w, b, eps, scale=scale, shift=shift, activation="silu" if silu else None
        )
    ),
)

# ---- layer_norm_modulate, rms_norm_modulate -------------------------------------------------------------------------


def _layer_norm_modulate(inputs, needed, dy, mean, rstd):
    x, shift, scale, weight, bias, _ = inputs
    return *call(ops.layer_norm_modulate_bwd, dy, x, mean, rstd, shift, scale, weight, bias), None


def _rms_norm_modulate(inputs, needed, dy, rstd):
    x, shift, scale, weight, _ = inputs
    return *call(ops.rms_norm_modulate_bwd, dy, x, rstd, shift, scale, weight), None


_register(
    "layer_norm_modulate",
    1,
    _layer_norm_modulate,
    _through(lambda x, shift, scale, w, b, eps: ref.layer_norm_modulate(x, shift, scale, eps=eps, weight=w, bias=b)),
)
_register(
    "rms_norm_modulate",
    1,
    _rms_norm_modulate,
    _through(lambda x, shift, scale, w, eps: ref.rms_norm_modulate(x, shift, scale, eps=eps, weight=w)),
)

# ---- gate_residual, gate_residual_layer_norm_modulate ---------------------------------------------------------------


def _gate_residual(inputs, needed, dy):
    _, gate, branch = inputs
    dgate = dbranch = None
    if needed[1] or needed[2]:
        dgate, dbranch = call(ops.gate_residual_bwd, dy, gate, branch, needed[1], needed[2])
    return None, dgate, dbranch


def _gate_residual_higher(inputs, needed, grads, extra):
    _, gate, branch = inputs
    return None, *_plain.gate_residual_bwd(grads[0], gate, branch, True, True)


def _gate_norm(inputs, needed, dx_new, dy, x_new, mean, rstd):
    _, gate, branch, shift, scale, _ = inputs
    if dy is None:
        dgate, dbranch = call(ops.gate_residual_bwd, dx_new, gate, branch, True, True)
        return dx_new, dgate, dbranch, torch.zeros_like(shift), torch.zeros_like(scale), None
    return *call(
        ops.gate_residual_layer_norm_modulate_bwd, dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale
    ), None


def _gate_norm_higher(inputs, needed, grads, extra):
    """x_new, a saved output, carries the graph of residual, gate and branch."""
    _, gate, branch, shift, scale, eps = inputs
    dx_new, dy = grads
    dresidual, dshift, dscale = dx_new, None, None
    if dy is not None:
        norm = lambda x, shift, scale: ref.layer_norm_modulate(x, shift, scale, eps=eps)  # noqa: E731
        dx, dshift, dscale = reference_grads(norm, (extra[0], shift, scale), (True, True, True), (dy,))
        dresidual = dx if dx_new is None else dx + dx_new
    return dresidual, *_plain.gate_residual_bwd(dresidual, gate, branch, True, True), dshift, dscale, None


_register("gate_residual", 1, _gate_residual, _gate_residual_higher, residual=0)
_register(
    "gate_residual_layer_norm_modulate",
    2,
    _gate_norm,
    _gate_norm_higher,
    residual=0,
    save=lambda output: (output[0], *output[2:]),
)

# ---- conv_residual, group_norm_silu_conv_residual -------------------------------------------------------------------


def _conv_residual(inputs, needed, dy, skipped):
    h, weight, bias, _, padding, zero_skip = inputs
    grads = (None, None, None)
    if any(needed[:3]):
        grads = call(ops.conv_residual_bwd, dy, h, weight, skipped, zero_skip, padding, bias is not None, needed[:3])
    return *grads, None, None, None


def _group_norm_silu_conv_residual(inputs, needed, dy, mean, rstd, skipped):
    x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, p, weight, bias, _, padding, zero_skip = inputs
    grads = (None,) * 7
    upstream = any(needed[i] for i in (0, 2, 3, 5, 6))
    if upstream or needed[9] or needed[10]:
        grads = call(
            ops.group_norm_silu_conv_residual_bwd, dy, x, mean, rstd, num_groups, norm_weight, norm_bias, eps, scale,
            shift, keep, p, weight, skipped, zero_skip, padding, bias is not None, [upstream, needed[9], needed[10]],
        )  # fmt: skip
    dx, dnorm_weight, dnorm_bias, dscale, dshift, dweight, dbias = grads
    norm = (dx, None, dnorm_weight, dnorm_bias, None, dscale, dshift, None, None)
    return *norm, dweight, dbias, None, None, None


_register(
    "conv_residual",
    1,
    _conv_residual,
    _through(lambda h, w, b, residual, padding, skip: ref.conv_residual(h, w, b, None, padding=padding)),
    residual=3,
)
_register(
    "group_norm_silu_conv_residual",
    1,
    _group_norm_silu_conv_residual,
    _through(
        lambda x, g, nw, nb, eps, scale, shift, keep, p, w, b, residual, padding, skip: (
            ref.group_norm_silu_conv_residual(
                x, g, nw, nb, w, b, None, eps=eps, scale=scale, shift=shift, keep=keep, dropout_p=p, padding=padding
            )
        )
    ),
    residual=11,
)

# ---- layer_norm_modulate_linear, linear_gate_residual ---------------------------------------------------------------


def _layer_norm_modulate_linear(inputs, needed, dy, mean, rstd):
    x, shift, scale, weight, bias, eps = inputs
    mask = [any(needed[:3]), needed[3], needed[4]]
    grads = call(
        ops.layer_norm_modulate_linear_bwd, dy, x, mean, rstd, shift, scale, weight, eps, bias is not None, mask
    )
    return *grads, None


def _linear_gate_residual(inputs, needed, dy, branch, skipped):
    h, weight, bias, gate, _, activation, zero_skip, _ = inputs
    grads = (None, None, None, None)
    if any(needed[:4]):
        grads = call(
            ops.linear_gate_residual_bwd, dy, h, weight, gate, branch, skipped, zero_skip, activation,
            bias is not None, needed[:4],
        )  # fmt: skip
    return *grads, None, None, None, None


_register(
    "layer_norm_modulate_linear",
    1,
    _layer_norm_modulate_linear,
    _through(lambda x, shift, scale, w, b, eps: ref.layer_norm_modulate_linear(x, shift, scale, w, b, eps=eps)),
)
_register(
    "linear_gate_residual",
    1,
    _linear_gate_residual,
    _through(
        lambda h, w, b, gate, residual, activation, skip, save: ref.linear_gate_residual(
            h, w, b, gate, None, activation=activation
        )
    ),
    residual=4,
)
