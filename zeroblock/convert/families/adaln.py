"""The halves of adaLN transformer blocks of several origins: norm, modulation, gate, projection, feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling

from ... import functional, zero
from ..._dtypes import FLOATING
from ...blocks import adaln, layers
from ...blocks.broadcast import add_gated, cannot_be_saved, fits_gate
from ...blocks.decision import NOT_ALLOWED, bypassable, op_policy
from ...blocks.residual import residual_branch
from ...ops.register import left_to_compiler
from ...plan.mode import rounds_as_eager
from ...reference import added, apply_activation, modulation
from ..family import Family


def is_plain(*tensors: Tensor | None) -> bool:
    """Ordinary tensors of a floating dtype that is computed in, no subclass (sharded, quantised)."""
    for t in tensors:
        if t is None:
            continue
        kind = type(t)
        if t.dtype not in FLOATING:
            return False
        if kind in zero.PLAIN_TYPES:
            if t.layout is not torch.strided or t.is_meta:
                return False
        elif kind is not FakeTensor:  # which stands for the others in torch.export
            return False
    return True


def is_plain_linear(module: Any) -> bool:
    if not layers.is_plain_linear(module):
        return False
    parameters, fields = module._parameters, module.__dict__
    if "weight" in fields or "bias" in fields:
        return is_plain(module.weight, module.bias)
    return is_plain(parameters.get("weight"), parameters.get("bias"))


def zeroing_tensors(layer: nn.Module, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """What holds a branch at zero, for a report: these tensors of a layer. What a wrapper (LoRA) calls its weight, or
    a quantised weight, does not tell: then a meta tensor, which is neither zero nor not."""
    plain = layers.is_plain_layer(layer) and is_plain(*tensors)
    return tuple(t.detach() for t in tensors if t is not None) if plain else (torch.empty(1, device="meta"),)


def gate_rows(linear: Any, chunks: int, *gates: int) -> tuple[Tensor, ...]:
    """Of the layer that gives `chunks` vectors: the rows of these."""
    return tuple(
        t if t.is_meta else t.chunk(chunks)[i]
        for t in zeroing_tensors(linear, linear.weight, linear.bias)
        for i in gates
    )


# Whose layers and attention processors draw random numbers through dropout layers alone.
DIFFUSERS = "diffusers.models."

_SEQUENTIALS: layers.Forwards = {nn.Sequential.forward: None}
_PLAIN_GELUS: layers.Forwards = {nn.GELU.forward: None}
# The forwards of diffusers' classes that were proved.
_RMS_NORMS: layers.Forwards = {}
_RMS_NAMES = ("RMSNorm", "MochiModulatedRMSNorm", "Krea2RMSNorm", "StableAudio3RMSNorm")
# Layer norms that compute in float32.
_LAYER_NAMES = ("FP32LayerNorm", "FP32_Layernorm", "WanLayerNorm")
_FEED_FORWARDS: layers.Forwards = {}
_GELUS: layers.Forwards = {}


def norm_kind(norm: Any) -> str | None:
    """ "layer" or "rms" for a norm over the last dimension whose formula the fused ops compute."""
    if type(norm).forward in layers.LAYER_NORMS or type(norm).__name__ in _LAYER_NAMES:
        known = layers.computes(norm, layers.LAYER_NORMS)
        return "layer" if known and len(norm.normalized_shape) == 1 else None
    if type(norm).__name__ in _RMS_NAMES and getattr(norm, "bias", None) is None and norm.eps is not None:
        known = layers.computes(norm, _RMS_NORMS)
        return "rms" if known and len(getattr(norm, "normalized_shape", (0,))) == 1 else None
    return None


def fits(norm: Any, x: Tensor, *vectors: Tensor) -> bool:
    """Whether the fused ops take norm and modulation here, and give the dtype eager does, rounded once."""
    if rounds_as_eager():
        return False
    if not _same_batch(x, *vectors) or not is_plain(x, getattr(norm, "weight", None), getattr(norm, "bias", None)):
        return False
    if cannot_be_saved(x):
        return False  # eager saves nothing of what a norm without parameters is given
    if x.is_cuda and x.dtype != torch.float32 and torch.is_autocast_enabled("cuda"):
        return False  # there autocast makes a norm's result float32
    kind = norm_kind(norm)
    if kind == "rms" and norm.weight is not None and norm.weight.dtype != x.dtype:
        return False  # the result has the dtype of the weight
    same = all(torch.promote_types(v.dtype, x.dtype) == x.dtype for v in vectors)
    return same and kind is not None and bypassable((norm,))


def _same_batch(x: Tensor, *vectors: Tensor) -> bool:
    """Whether x is [B, T, D] and the vectors are of B too: eager broadcasts others."""
    if x.dim() != 3:
        return False
    for v in vectors:
        if v.shape[0] != x.shape[0]:
            return False
    return True


def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift; shift and scale [B, D]."""
    if left_to_compiler(x) or not fits(norm, x, shift, scale):
        return norm(x) * (1 + modulation(scale)) + modulation(shift)
    if norm_kind(norm) == "rms":
        return functional.rms_norm_modulate(x, shift, scale, eps=norm.eps, weight=norm.weight)
    return functional.layer_norm_modulate(x, shift, scale, eps=norm.eps, weight=norm.weight, bias=norm.bias)


def modulated_linear(norm: Any, x: Tensor, shift: Tensor, scale: Tensor, linear: Any) -> Tensor:
    """linear(norm(x) * (1 + scale) + shift); shift and scale [B, D]. Of a plain norm and linear, backward is saved x
    alone."""
    plain = layers.is_plain_norm(norm) and is_plain_linear(linear) and bypassable((linear,))
    if not plain or not fits(norm, x, shift, scale):
        return linear(modulated(norm, x, shift, scale))
    return functional.layer_norm_modulate_linear(x, shift, scale, linear.weight, linear.bias, eps=norm.eps)


def gated(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """residual + gate * branch; gate [B, D]"""
    fits = not left_to_compiler(residual) and residual.dim() == 3 and is_plain(residual, gate, branch)
    return add_gated(residual, gate, branch) if fits else added(residual, modulation(gate) * branch)


def gated_branch(
    family: Family,
    residual: Tensor,
    gate: Tensor,
    branch: Callable[..., Tensor],
    activations: tuple[Tensor, ...],
    *modules: nn.Module,
) -> Tensor:
    """residual + gate * branch(*activations), branch calling `modules`; skipped while the gate is exactly zero."""
    y = None
    if not is_compiling() and residual.dim() == 3 and is_plain(residual, gate):
        name, policy = family.name, family.zero_skip
        _, y = residual_branch(
            name, policy, residual, branch, None, gate, activations, modules=modules, trusted=DIFFUSERS
        )
    return gated(residual, gate, branch(*activations)) if y is None else y


def projected(residual: Tensor, gate: Tensor, h: Tensor, proj: Any, policy: str) -> Tensor:
    """residual + gate * proj(h); gate [B, D]"""
    plain = is_plain_linear(proj) and bypassable((proj,)) and is_plain(residual, gate, h) and not rounds_as_eager()
    if not plain or not fits_gate(gate, residual.shape) or h.shape[:-1] != residual.shape[:-1]:
        return gated(residual, gate, proj(h))
    return functional.linear_gate_residual(h, proj.weight, proj.bias, gate, residual, zero_skip=policy)


def gated_projection(
    family: Family,
    residual: Tensor,
    gate: Tensor,
    body: Callable[..., Tensor],
    activations: tuple[Tensor, ...],
    proj: nn.Module,
    *modules: nn.Module,
) -> Tensor:
    """residual + gate * proj(body(*activations)), body calling `modules`; skipped while gate or proj is zero."""
    answer, y = NOT_ALLOWED, None
    if residual.dim() == 3 and is_plain(residual, gate):
        name, policy = family.name, family.zero_skip
        answer, y = residual_branch(
            name, policy, residual, body, proj, gate, activations, modules=modules, trusted=DIFFUSERS
        )
    policy = op_policy(answer, family.zero_skip)
    return projected(residual, gate, body(*activations), proj, policy) if y is None else y


def feed_forward(
    family: Family, ff: nn.Module, norm: Any, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    """x + gate * ff(norm(x) * (1 + scale) + shift); shift, scale and gate [B, D]. By its layers where ff is diffusers'
    FeedForward, or linear, GELU or SiLU, and linear in an nn.Sequential.

    Saved for backward: x and the first linear's output. Skipped while the gate or the last linear is exactly zero.
    """
    if left_to_compiler(x):
        return _traced_feed_forward(family.zero_skip, ff, x, modulated(norm, x, shift, scale), gate)
    half = fused_feed_forward(ff, norm, x, shift, scale, gate)
    if half is not None:
        return adaln.half(family.name, family.zero_skip, x, (shift, scale, gate), half)
    parts = _split(ff)
    if parts is None or not fits(norm, x, shift, scale) or not is_plain(gate) or not fits_gate(gate, x.shape):

        def whole(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return ff(modulated(norm, x, shift, scale))

        return gated_branch(family, x, gate, whole, (x, shift, scale), norm, ff)
    first, activation, last = parts

    def hidden(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return first(modulated(norm, x, shift, scale))

    def before_last(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return apply_activation(hidden(x, shift, scale), activation)

    name, policy = family.name, family.zero_skip
    answer, y = residual_branch(
        name, policy, x, before_last, last, gate, (x, shift, scale), modules=(norm, first), trusted=DIFFUSERS
    )
    if y is not None:
        return y
    h, policy = hidden(x, shift, scale), op_policy(answer, policy)
    return functional.linear_gate_residual(h, last.weight, last.bias, gate, x, activation=activation, zero_skip=policy)


def _traced_feed_forward(policy: str, ff: Any, x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate * ff(h) for torch.compile: by the modules of ff, but for the last linear, whose op tests its weight."""
    fields = ff.__dict__
    if (
        type(ff).__name__ == "FeedForward"
        and layers.computes(ff, _FEED_FORWARDS)
        and not (fields["_forward_hooks"] or fields["_forward_pre_hooks"] or "forward" in fields)
        and not (fields["_backward_hooks"] or fields["_backward_pre_hooks"])
        and ff.forward is not None  # which a compiler guards, unlike __dict__
        and _same_batch(x, h)
        and is_plain(x)
        and fits_gate(gate, x.shape)
    ):
        act, dropout, last, *more = ff.net._modules.values()
        if is_plain_linear(last) and bypassable((last,)) and not any(d.training and d.p for d in more):
            h = dropout(act(h))
            return functional.linear_gate_residual(h, last.weight, last.bias, gate, x, zero_skip=policy)
    return added(x, modulation(gate) * ff(h))


def fused_feed_forward(ff: nn.Module, norm: Any, x: Tensor, *vectors: Tensor) -> adaln.Half | None:
    """The feed-forward as half of an adaLN block whose norm has no parameters and whose activation the ops know; None:
    it is another one, or watched by hooks. vectors: shift, scale and gate."""
    if left_to_compiler(x):
        return None
    parts = _split(ff)
    if parts is None or not layers.is_plain_norm(norm):
        return None
    first, activation, last = parts
    gate = vectors[2]
    if activation is None or not is_plain(gate) or not fits(norm, x, *vectors[:2]) or not fits_gate(gate, x.shape):
        return None
    return adaln.Half(norm.eps, first, activation, last)


def is_split(ff: nn.Module) -> bool:
    """Whether `feed_forward` runs it by its layers."""
    return _split(ff) is not None


def _split(ff: nn.Module) -> tuple[Any, str | None, Any] | None:
    """(first, activation, last) of a feed-forward without active dropout; `first` includes an activation that the ops
    do not know (activation None). None: it is to be called as a whole."""
    if isinstance(ff, nn.Sequential):
        known = len(ff) == 3 and layers.computes(ff, _SEQUENTIALS) and bypassable((ff,))
        if not known or not is_plain_linear(ff[0]) or not is_plain_linear(ff[2]):
            return None
        act = type(ff[1]).forward
        activation = _gelu(ff[1]) if act in _PLAIN_GELUS else "silu" if act in layers.SILUS else None
        return None if activation is None else (ff[0], activation, ff[2])
    net: Any = getattr(ff, "net", None)
    if type(ff).__name__ != "FeedForward" or net is None or not bypassable((ff,)):
        return None
    parts = list(net._modules.values())  # a compiler traces what indexing a ModuleList does
    if len(parts) not in (3, 4) or not layers.computes(ff, _FEED_FORWARDS):
        return None
    act, dropout, last, *more = parts
    for d in (dropout, *more):
        if type(d) is not nn.Dropout or d.training and d.p != 0.0:
            return None
    proj = getattr(act, "proj", None)
    if proj is None or not is_plain_linear(proj) or not is_plain_linear(last):
        return None
    if layers.may_draw(act, DIFFUSERS):
        return None
    if type(act).__name__ != "GELU" or not layers.computes(act, _GELUS):
        return act, None, last
    return proj, _gelu(act), last


def _gelu(act: Any) -> str:
    return "gelu_tanh" if act.approximate == "tanh" else "gelu"
