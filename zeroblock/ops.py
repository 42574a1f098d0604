"""The registered boundary: every op's schema, fake and dispatch. Backward formulas are in `_autograd.py`.

Ops are opaque to torch.compile and export. An op picks a primitives module from its tensors' metadata
(`_backends.select`) and runs the composition of `_compose.py` on it. Schemas have fixed arity: an absent result is an
empty tensor, and statistics come back beside the result because backward can save only inputs and outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends, _compose, _compose_linear, _conv, _lane, _plan
from . import reference as ref
from ._layout import empty_like_dense
from .reference import compute_dtype, conv, promoted

NAMESPACE = "zeroblock"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

_NORM = "Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift"
_FUSED = (
    "int num_groups, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? scale, Tensor? shift, "
    "Tensor? keep, float dropout_p, Tensor weight"
)


def _empty(like: Tensor, *size: int) -> Tensor:
    return like.new_empty(size or (0,))


def _filled(results, like: Tensor):
    """None results become empty tensors, as the schemas promise."""
    return tuple(_empty(like) if r is None else r for r in results)


def _op(schema: str, fake, composition, lead: int = 0):
    """Registers one op: `composition(P, *args)` with P the primitives for its `lead`-th argument."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

    def run(*args):
        return composition(_backends.select(name, args[lead]), *args)

    def run_filled(*args):
        with _plan.fixed_rule():
            results = run(*args)
        return _filled(results, args[lead]) if isinstance(results, tuple) else results

    _library.impl(name, run_filled, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    _lane.add_run(op, run)
    return op


def _stats(x: Tensor, *size: int) -> Tensor:
    return x.new_empty(size, dtype=compute_dtype(x))


def _flag(x: Tensor) -> Tensor:
    return x.new_empty(1, dtype=torch.int32)


def _grad_like(*operands: Tensor | None, lead: Tensor) -> tuple[Tensor, ...]:
    """Fakes of small gradients: dense, in the shape and dtype of the operand; empty where it is absent."""
    return tuple(_empty(lead) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in operands)


def _asked(mask: list[bool], *operands: Tensor | None, lead: Tensor) -> tuple[Tensor, ...]:
    return _grad_like(*(t if m else None for t, m in zip(operands, mask, strict=True)), lead=lead)


# ---- group_norm_silu ------------------------------------------------------------------------------------------------


def _fake_group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, silu):
    N = x.shape[0]
    return empty_like_dense(x), _stats(x, N, num_groups), _stats(x, N, num_groups)


def _fake_group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, num_groups, silu):
    return empty_like_dense(x), *_grad_like(weight, bias, scale, shift, lead=x)


group_norm_silu = _op(
    f"group_norm_silu({_NORM}, bool silu) -> (Tensor, Tensor, Tensor)",
    _fake_group_norm_silu,
    lambda P, *a: P.group_norm_silu(*a),
)
group_norm_silu_bwd = _op(
    "group_norm_silu_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, int num_groups, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_group_norm_silu_bwd,
    lambda P, *a: P.group_norm_silu_bwd(*a),
    lead=1,
)

# ---- layer_norm_modulate, rms_norm_modulate -------------------------------------------------------------------------


def _fake_layer_norm_modulate(x, shift, scale, weight, bias, eps):
    return x.new_empty(x.shape), _stats(x, *x.shape[:2]), _stats(x, *x.shape[:2])


def _fake_layer_norm_modulate_bwd(dy, x, mean, rstd, shift, scale, weight, bias):
    return x.new_empty(x.shape), *_grad_like(shift, scale, weight, bias, lead=x)


layer_norm_modulate = _op(
    "layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_layer_norm_modulate,
    lambda P, *a: P.layer_norm_modulate(*a, False),
)
layer_norm_modulate_bwd = _op(
    "layer_norm_modulate_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? shift, Tensor? scale, "
    "Tensor? weight, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_layer_norm_modulate_bwd,
    lambda P, *a: P.layer_norm_modulate_bwd(*a, False),
    lead=1,
)


def _rms_norm_modulate(P, x, shift, scale, weight, eps):
    y, _, rstd = P.layer_norm_modulate(x, shift, scale, weight, None, eps, True)
    return y, rstd


def _rms_norm_modulate_bwd(P, dy, x, rstd, shift, scale, weight):
    return P.layer_norm_modulate_bwd(dy, x, None, rstd, shift, scale, weight, None, True)[:4]


rms_norm_modulate = _op(
    "rms_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, float eps) -> (Tensor, Tensor)",
    lambda x, shift, scale, weight, eps: (x.new_empty(x.shape), _stats(x, *x.shape[:2])),
    _rms_norm_modulate,
)
rms_norm_modulate_bwd = _op(
    "rms_norm_modulate_bwd(Tensor dy, Tensor x, Tensor rstd, Tensor? shift, Tensor? scale, Tensor? weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda dy, x, rstd, shift, scale, weight: (x.new_empty(x.shape), *_grad_like(shift, scale, weight, lead=x)),
    _rms_norm_modulate_bwd,
    lead=1,
)

# ---- gate_residual, gate_residual_layer_norm_modulate ---------------------------------------------------------------


def _fake_gate_residual(residual, gate, branch):
    return empty_like_dense(residual).to(promoted(residual, gate, branch))


def _fake_gate_norm(residual, gate, branch, shift, scale, eps):
    x_new = branch.new_empty(branch.shape)
    return x_new, x_new.new_empty(x_new.shape), _stats(x_new, *x_new.shape[:2]), _stats(x_new, *x_new.shape[:2])


def _fake_gate_norm_bwd(dx_new, dy, x_new, mean, rstd, gate, branch, shift, scale):
    dresidual, dbranch = (branch.new_empty(branch.shape) for _ in range(2))
    dgate, dshift, dscale = _grad_like(gate, shift, scale, lead=branch)
    return dresidual, dgate, dbranch, dshift, dscale


gate_residual = _op(
    "gate_residual(Tensor residual, Tensor gate, Tensor branch) -> Tensor",
    _fake_gate_residual,
    lambda P, *a: P.gate_residual(*a),
)
gate_residual_bwd = _op(
    "gate_residual_bwd(Tensor dy, Tensor gate, Tensor branch, bool need_dgate, bool need_dbranch) -> (Tensor, Tensor)",
    lambda dy, gate, branch, need_dgate, need_dbranch: (
        _asked([need_dgate], gate, lead=dy)[0],
        empty_like_dense(branch) if need_dbranch else _empty(dy),
    ),
    lambda P, *a: P.gate_residual_bwd(*a),
    lead=2,
)
gate_residual_layer_norm_modulate = _op(
    "gate_residual_layer_norm_modulate(Tensor residual, Tensor gate, Tensor branch, Tensor shift, Tensor scale, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_gate_norm,
    lambda P, *a: P.gate_residual_layer_norm_modulate(*a),
)
gate_residual_layer_norm_modulate_bwd = _op(
    "gate_residual_layer_norm_modulate_bwd(Tensor? dx_new, Tensor dy, Tensor x_new, Tensor mean, Tensor rstd, "
    "Tensor gate, Tensor branch, Tensor shift, Tensor scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_gate_norm_bwd,
    lambda P, *a: P.gate_residual_layer_norm_modulate_bwd(*a),
    lead=1,
)

# ---- conv_residual, group_norm_silu_conv_residual -------------------------------------------------------------------


def _fake_sum(residual: Tensor | None, branch: Tensor) -> Tensor:
    return branch if residual is None else residual + branch


def _fake_conv_residual(h, weight, bias, residual, padding, zero_skip):
    return _fake_sum(residual, conv(h, weight, bias, padding)), _flag(h)


def _fake_fused(
    x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, p, weight, bias, residual, padding, skip
):
    h = empty_like_dense(x).to(weight.dtype)
    y = _fake_sum(residual, conv(h, weight, bias, padding))
    return y, _stats(x, x.shape[0], num_groups), _stats(x, x.shape[0], num_groups), _flag(x)


def _fake_conv_grads(dy, h, weight, has_bias, padding, mask):
    grads = _conv.conv_grads(dy.to(weight.dtype), h, weight, has_bias, padding, mask)
    return _filled(grads, dy)


def _fake_fused_bwd(
    dy,
    x,
    mean,
    rstd,
    num_groups,
    norm_weight,
    norm_bias,
    eps,
    scale,
    shift,
    keep,
    p,
    weight,
    skipped,
    zero_skip,
    padding,
    has_bias,
    mask,
):
    h = empty_like_dense(x).to(weight.dtype)
    _, dweight, dbias = _fake_conv_grads(dy, h, weight, has_bias, padding, [False, mask[1], mask[2]])
    norm = (empty_like_dense(x), *_grad_like(norm_weight, norm_bias, scale, shift, lead=x)) if mask[0] else (None,) * 5
    return *_filled(norm, x), dweight, dbias


conv_residual = _op(
    "conv_residual(Tensor h, Tensor weight, Tensor? bias, Tensor? residual, int[] padding, int zero_skip) "
    "-> (Tensor, Tensor)",
    _fake_conv_residual,
    _compose.conv_residual,
)
conv_residual_bwd = _op(
    "conv_residual_bwd(Tensor dy, Tensor h, Tensor weight, Tensor skipped, int zero_skip, int[] padding, "
    "bool has_bias, bool[] mask) -> (Tensor, Tensor, Tensor)",
    lambda dy, h, weight, skipped, zero_skip, *rest: _fake_conv_grads(dy, h, weight, rest[1], rest[0], rest[2]),
    _compose.conv_residual_bwd,
    lead=1,
)
group_norm_silu_conv_residual = _op(
    f"group_norm_silu_conv_residual(Tensor x, {_FUSED}, Tensor? bias, Tensor? residual, int[] padding, int zero_skip) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_fused,
    _compose.group_norm_silu_conv_residual,
)
group_norm_silu_conv_residual_bwd = _op(
    f"group_norm_silu_conv_residual_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, {_FUSED}, "
    "Tensor skipped, int zero_skip, int[] padding, bool has_bias, bool[] mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fused_bwd,
    _compose.group_norm_silu_conv_residual_bwd,
    lead=1,
)

# ---- layer_norm_modulate_linear, linear_gate_residual ---------------------------------------------------------------


def _fake_norm_linear(x, shift, scale, weight, bias, eps):
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=weight.dtype)
    return y, _stats(x, *x.shape[:2]), _stats(x, *x.shape[:2])


def _fake_norm_linear_bwd(dy, x, mean, rstd, shift, scale, weight, eps, has_bias, mask):
    bias = weight[:, 0] if has_bias else None
    dx, dshift, dscale = _asked([mask[0]] * 3, x, shift, scale, lead=x)
    return dx, dshift, dscale, *_asked([mask[1], mask[2] and has_bias], weight, bias, lead=x)


def _fake_linear_gate(h, weight, bias, gate, residual, activation, zero_skip, save_branch):
    branch = h.new_empty(*h.shape[:-1], weight.shape[0], dtype=weight.dtype)
    y = branch if residual is None else empty_like_dense(residual)
    y = y.to(promoted(*(t for t in (residual, gate, branch) if t is not None)))
    return y, branch.new_empty(branch.shape if save_branch else (0,)), _flag(h)


def _fake_linear_gate_bwd(dy, h, weight, gate, branch, skipped, zero_skip, activation, has_bias, mask):
    bias = weight[:, 0] if has_bias else None
    return _asked([mask[0], mask[1], mask[2] and has_bias, mask[3]], h, weight, bias, gate, lead=dy)


layer_norm_modulate_linear = _op(
    "layer_norm_modulate_linear(Tensor x, Tensor? shift, Tensor? scale, Tensor weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_norm_linear,
    _compose_linear.layer_norm_modulate_linear,
)
layer_norm_modulate_linear_bwd = _op(
    "layer_norm_modulate_linear_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? shift, Tensor? scale, "
    "Tensor weight, float eps, bool has_bias, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_norm_linear_bwd,
    _compose_linear.layer_norm_modulate_linear_bwd,
    lead=1,
)
linear_gate_residual = _op(
    "linear_gate_residual(Tensor h, Tensor weight, Tensor? bias, Tensor? gate, Tensor? residual, str? activation, "
    "int zero_skip, bool save_branch) -> (Tensor, Tensor, Tensor)",
    _fake_linear_gate,
    _compose_linear.linear_gate_residual,
)
linear_gate_residual_bwd = _op(
    "linear_gate_residual_bwd(Tensor dy, Tensor h, Tensor weight, Tensor? gate, Tensor branch, Tensor skipped, "
    "int zero_skip, str? activation, bool has_bias, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_linear_gate_bwd,
    _compose_linear.linear_gate_residual_bwd,
    lead=1,
)

# ---- is_zero --------------------------------------------------------------------------------------------------------

_library.define("is_zero(Tensor[] tensors) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _is_zero(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.empty(0, dtype=torch.bool)
    P = _backends.select("is_zero", tensors[0])
    if hasattr(P, "zero_flags"):
        return P.zero_flags(tensors) != 0
    if tensors[0].device.type != "cpu":
        return ref.is_zero(*tensors)
    return torch.tensor([P.is_zero(t) for t in tensors], dtype=torch.bool)


_library.impl("is_zero", _is_zero, "CompositeExplicitAutograd")
torch.library.register_fake(
    f"{NAMESPACE}::is_zero",
    lambda tensors: torch.empty(len(tensors), dtype=torch.bool, device=tensors[0].device if tensors else None),
    lib=_library,
)
is_zero = torch.ops.zeroblock.is_zero.default
_lane.add_run(is_zero, _is_zero)

from . import _autograd, _winograd_plans  # noqa: E402,F401  (register the backward formulas, Winograd as a candidate)
