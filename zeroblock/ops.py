"""The registered boundary: every op's schema, fake and dispatch. Backward formulas are in `_autograd.py`.

Ops are opaque to torch.compile and export. An op picks a primitives module from its tensors' metadata
(`_backends.select`) and runs the composition of `_compose.py` on it. Schemas have fixed arity: an absent result is an
empty tensor, and statistics come back beside the result because backward can save only inputs and outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _compose, _compose_linear, _lane
from . import _fakes as fakes
from . import reference as ref
from ._layout import empty_like_dense
from .backends import available as _backends
from .plan import planned as _plan
from .reference import conv, promoted
from .steps import conv as _conv

NAMESPACE = "zeroblock"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

_NORM = "Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift"
_FUSED = (
    "int num_groups, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? scale, Tensor? shift, "
    "Tensor? keep, float dropout_p, Tensor weight"
)


def _filled(results, like: Tensor):
    """None results become empty tensors, as the schemas promise."""
    return tuple(fakes.empty(like) if r is None else r for r in results)


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


# ---- group_norm_silu ------------------------------------------------------------------------------------------------


group_norm_silu = _op(
    f"group_norm_silu({_NORM}, bool silu) -> (Tensor, Tensor, Tensor)",
    fakes.group_norm_silu,
    lambda P, *a: P.group_norm_silu(*a),
)
group_norm_silu_bwd = _op(
    "group_norm_silu_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, int num_groups, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fakes.group_norm_silu_bwd,
    lambda P, *a: P.group_norm_silu_bwd(*a),
    lead=1,
)

# ---- layer_norm_modulate, rms_norm_modulate -------------------------------------------------------------------------


layer_norm_modulate = _op(
    "layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    fakes.layer_norm_modulate,
    lambda P, *a: P.layer_norm_modulate(*a, False),
)
layer_norm_modulate_bwd = _op(
    "layer_norm_modulate_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? shift, Tensor? scale, "
    "Tensor? weight, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fakes.layer_norm_modulate_bwd,
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
    lambda x, shift, scale, weight, eps: (x.new_empty(x.shape), fakes.stats(x, *x.shape[:2])),
    _rms_norm_modulate,
)
rms_norm_modulate_bwd = _op(
    "rms_norm_modulate_bwd(Tensor dy, Tensor x, Tensor rstd, Tensor? shift, Tensor? scale, Tensor? weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda dy, x, rstd, shift, scale, weight: (x.new_empty(x.shape), *fakes.grad_like(shift, scale, weight, lead=x)),
    _rms_norm_modulate_bwd,
    lead=1,
)

# ---- gate_residual, gate_residual_layer_norm_modulate ---------------------------------------------------------------


gate_residual = _op(
    "gate_residual(Tensor residual, Tensor gate, Tensor branch) -> Tensor",
    fakes.gate_residual,
    lambda P, *a: P.gate_residual(*a),
)
gate_residual_bwd = _op(
    "gate_residual_bwd(Tensor dy, Tensor gate, Tensor branch, bool need_dgate, bool need_dbranch) -> (Tensor, Tensor)",
    lambda dy, gate, branch, need_dgate, need_dbranch: (
        fakes.asked([need_dgate], gate, lead=dy)[0],
        empty_like_dense(branch) if need_dbranch else fakes.empty(dy),
    ),
    lambda P, *a: P.gate_residual_bwd(*a),
    lead=2,
)
gate_residual_layer_norm_modulate = _op(
    "gate_residual_layer_norm_modulate(Tensor residual, Tensor gate, Tensor branch, Tensor shift, Tensor scale, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    fakes.gate_norm,
    lambda P, *a: P.gate_residual_layer_norm_modulate(*a),
)
gate_residual_layer_norm_modulate_bwd = _op(
    "gate_residual_layer_norm_modulate_bwd(Tensor? dx_new, Tensor dy, Tensor x_new, Tensor mean, Tensor rstd, "
    "Tensor gate, Tensor branch, Tensor shift, Tensor scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fakes.gate_norm_bwd,
    lambda P, *a: P.gate_residual_layer_norm_modulate_bwd(*a),
    lead=1,
)

# ---- conv_residual, group_norm_silu_conv_residual -------------------------------------------------------------------


def _fake_sum(residual: Tensor | None, branch: Tensor) -> Tensor:
    return branch if residual is None else residual + branch


def _fake_conv_residual(h, weight, bias, residual, padding, zero_skip):
    return _fake_sum(residual, conv(h, weight, bias, padding)), fakes.flag(h)


def _fake_fused(
    x, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, p, weight, bias, residual, padding, skip
):
    h = empty_like_dense(x).to(weight.dtype)
    y = _fake_sum(residual, conv(h, weight, bias, padding))
    return y, fakes.stats(x, x.shape[0], num_groups), fakes.stats(x, x.shape[0], num_groups), fakes.flag(x)


def _fake_conv_grads(dy, h, weight, has_bias, padding, mask):
    grads = _conv.conv_grads(dy.to(weight.dtype), h, weight, has_bias, padding, mask)
    return _filled(grads, dy)


def _fake_fused_bwd(
    dy, x, mean, rstd, num_groups, norm_weight, norm_bias, eps, scale, shift, keep, p, weight, skipped, zero_skip,
    padding, has_bias, mask,
):  # fmt: skip
    h = empty_like_dense(x).to(weight.dtype)
    _, dweight, dbias = _fake_conv_grads(dy, h, weight, has_bias, padding, [False, mask[1], mask[2]])
    norm = (
        (empty_like_dense(x), *fakes.grad_like(norm_weight, norm_bias, scale, shift, lead=x))
        if mask[0]
        else (None,) * 5
    )
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
    return y, fakes.stats(x, *x.shape[:2]), fakes.stats(x, *x.shape[:2])


def _fake_norm_linear_bwd(dy, x, mean, rstd, shift, scale, weight, eps, has_bias, mask):
    bias = weight[:, 0] if has_bias else None
    dx, dshift, dscale = fakes.asked([mask[0]] * 3, x, shift, scale, lead=x)
    return dx, dshift, dscale, *fakes.asked([mask[1], mask[2] and has_bias], weight, bias, lead=x)


def _fake_linear_gate(h, weight, bias, gate, residual, activation, zero_skip, save_branch):
    branch = h.new_empty(*h.shape[:-1], weight.shape[0], dtype=weight.dtype)
    y = branch if residual is None else empty_like_dense(residual)
    y = y.to(promoted(*(t for t in (residual, gate, branch) if t is not None)))
    return y, branch.new_empty(branch.shape if save_branch else (0,)), fakes.flag(h)


def _fake_linear_gate_bwd(dy, h, weight, gate, branch, skipped, zero_skip, activation, has_bias, mask):
    bias = weight[:, 0] if has_bias else None
    return fakes.asked([mask[0], mask[1], mask[2] and has_bias, mask[3]], h, weight, bias, gate, lead=dy)


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

from . import _autograd  # noqa: E402,F401  (registers the backward formulas)
from .steps import winograd_plans  # noqa: E402,F401  (registers Winograd as a candidate)
