"""The halves of adaLN transformer blocks, for the families of diffusers: norm, modulation, gate, feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ... import functional, zero
from ...blocks import layers as _common
from ...nn.residual import residual_branch
from ...ops.residual_alone import residual_alone as bare_residual
from ...reference import modulation

_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # the last one stands for the others in torch.export


def is_plain(*tensors: Tensor | None) -> bool:
    """Ordinary tensors, no subclass (sharded, quantised) and no storage-only dtype."""
    return all(t is None or type(t) in _PLAIN and t.dtype in zero.DTYPES and t.device.type != "meta" for t in tensors)


def is_plain_linear(module: nn.Module) -> bool:
    return _common.is_plain_linear(module) and is_plain(module.weight, module.bias)


def held_by(layer: nn.Module, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """What holds a branch at zero, for a report: these tensors of a layer. What a wrapper (LoRA) calls its weight, or
    a quantised weight, does not tell: then a meta tensor, which is neither zero nor not."""
    plain = (_common.is_plain_linear(layer) or _common.is_plain_conv(layer)) and is_plain(*tensors)
    return tuple(t.detach() for t in tensors if t is not None) if plain else (torch.empty(1, device="meta"),)


def gate_rows(linear: nn.Module, chunks: int, *gates: int) -> tuple[Tensor, ...]:
    """Of the layer that gives `chunks` vectors: the rows of these."""
    return tuple(
        t if t.is_meta else t.chunk(chunks)[i] for t in held_by(linear, linear.weight, linear.bias) for i in gates
    )


def _norm_kind(norm: nn.Module) -> str | None:
    """ "layer" or "rms" for a norm over the last dimension whose formula the fused ops compute."""
    if type(norm).forward is nn.LayerNorm.forward or type(norm).__name__ == "FP32LayerNorm":
        return "layer" if len(norm.normalized_shape) == 1 else None
    if type(norm).__name__ == "RMSNorm" and getattr(norm, "bias", None) is None and norm.eps is not None:
        return "rms"
    return None


def fits(norm: nn.Module, x: Tensor, *vectors: Tensor) -> bool:
    """Whether the fused ops take norm and modulation here, and give the dtype eager does."""
    if x.dim() != 3 or not is_plain(x, getattr(norm, "weight", None), getattr(norm, "bias", None)):
        return False
    if x.is_cuda and x.dtype != torch.float32 and torch.is_autocast_enabled("cuda"):
        return False  # there autocast makes a norm's result float32
    kind = _norm_kind(norm)
    if kind == "rms" and norm.weight is not None and norm.weight.dtype != x.dtype:
        return False  # the result has the dtype of the weight
    same = all(torch.promote_types(v.dtype, x.dtype) == x.dtype for v in vectors)
    return same and kind is not None and zero.bypassable((norm,))


def modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift; shift and scale [B, D]."""
    if not fits(norm, x, shift, scale):
        return norm(x) * (1 + modulation(scale)) + modulation(shift)
    if _norm_kind(norm) == "rms":
        return functional.rms_norm_modulate(x, shift, scale, eps=norm.eps, weight=norm.weight)
    return functional.layer_norm_modulate(x, shift, scale, eps=norm.eps, weight=norm.weight, bias=norm.bias)


def gated(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """residual + gate * branch; gate [B, D]"""
    fits = residual.dim() == 3 and residual.shape == branch.shape and is_plain(residual, gate, branch)
    return functional.gate_residual(residual, gate, branch) if fits else residual + modulation(gate) * branch


def draws(module: nn.Module) -> bool:
    """Whether a call may consume random numbers: active dropout, or layers and attention processors of others'."""
    for m in module.modules():
        if m.training and isinstance(m, nn.modules.dropout._DropoutNd):
            if 0.0 < m.p < 1.0:
                return True
        elif m.training and not _is_known(m):
            return True
        if m.training and not _is_known(getattr(m, "processor", m)):
            return True
    return False


def _is_known(thing: Any) -> bool:
    return type(thing).__module__.startswith(("torch.nn.modules.", "diffusers.models."))


def gated_branch(
    family: Any,
    residual: Tensor,
    gate: Tensor,
    branch: Callable[..., Tensor],
    activations: tuple[Tensor, ...],
    *modules: nn.Module,
) -> Tensor:
    """residual + gate * branch(*activations), branch calling `modules`; skipped while the gate is exactly zero."""
    y = None
    if residual.dim() == 3 and is_plain(residual, gate):
        y = residual_branch(
            family.name, family.zero_skip, residual, branch, None, gate, activations, modules=modules,
            random=any(map(draws, modules)),
        )  # fmt: skip
    return gated(residual, gate, branch(*activations)) if y is None else y


def feed_forward(
    family: Any, ff: nn.Module, norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    """x + gate * ff(norm(x) * (1 + scale) + shift) for diffusers' FeedForward; shift, scale and gate [B, D].

    Saved for backward: x and the first linear's output. Skipped while the gate or the last linear is exactly zero.
    """
    parts = _split(ff)
    if parts is None or not fits(norm, x, shift, scale) or not is_plain(gate):
        branch = lambda x, shift, scale: ff(modulated(norm, x, shift, scale))  # noqa: E731
        return gated_branch(family, x, gate, branch, (x, shift, scale), norm, ff)
    first, activation, last = parts
    fused = activation is not None and norm.weight is None and _norm_kind(norm) == "layer"

    def hidden(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if fused:
            return functional.layer_norm_modulate_linear(x, shift, scale, first.weight, first.bias, eps=norm.eps)
        h = modulated(norm, x, shift, scale)
        return first(h)

    def before_last(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        h = hidden(x, shift, scale)
        return h if activation is None else nn.functional.gelu(h, approximate=_APPROXIMATE[activation])

    y = residual_branch(
        family.name, family.zero_skip, x, before_last, last, gate, (x, shift, scale), modules=(norm, first),
        random=False,
    )  # fmt: skip
    if y is not None:
        return y
    return functional.linear_gate_residual(
        hidden(x, shift, scale), last.weight, last.bias, gate, x, activation=activation, zero_skip=family.zero_skip
    )


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def _split(ff: nn.Module) -> tuple[nn.Module, str | None, nn.Module] | None:
    """(first, activation, last) of a FeedForward without active dropout; `first` includes an activation that the ops
    do not know (activation None). None: it is to be called as a whole."""
    net = getattr(ff, "net", None)
    if type(ff).__name__ != "FeedForward" or net is None or len(net) not in (3, 4) or not zero.bypassable((ff,)):
        return None
    act, *dropouts = net[0], net[1], *net[3:]
    if not all(type(d) is nn.Dropout and (not d.training or d.p == 0.0) for d in dropouts):
        return None
    proj = getattr(act, "proj", None)
    if draws(act) or not is_plain_linear(net[2]) or proj is None or not is_plain_linear(proj):
        return None
    if type(act).__name__ != "GELU":
        return act, None, net[2]
    return proj, "gelu_tanh" if act.approximate == "tanh" else "gelu", net[2]


def gates_stay_zero(family: Any, block: nn.Module, linear: nn.Module, gates: tuple[int, ...], chunks: int) -> bool:
    """Without gradients: whether these of the `chunks` vectors that `linear` gives are zero whatever its input, so
    that nothing need be computed. Counts a skipped branch for each."""
    if torch.is_grad_enabled() or block.training or not is_plain_linear(linear):
        return False
    if not zero.may_skip_branch(family.name, family.zero_skip, linear.weight) or not zero.bypassable(block.children()):
        return False
    D = linear.out_features // chunks
    rows = [t.detach()[i * D : (i + 1) * D] for t in (linear.weight, linear.bias) if t is not None for i in gates]
    if not all(map(zero.is_exactly_zero, rows)):
        return False
    for _ in gates:
        zero.count(family.name, True)
    return True


def copied(x: Tensor) -> Tensor:
    """What is left of a block all of whose branches are skipped."""
    return bare_residual(x, None, None, -1, x.dtype, None)
