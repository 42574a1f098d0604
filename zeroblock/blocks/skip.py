"""Executes a branch that was found zero, and its backward (contract: zero.py).

A block describes its branch to `skipped_branch`; whatever a skipped branch still has to compute is here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import autocast_dtype
from .._layout import channels_last_format
from ..backends.select import select
from ..ops.residual_alone import residual_alone
from ..reference import channel_view, modulation
from ..steps.conv import conv_size, empty_conv_output
from ..steps.linear import linear_grads
from ..steps.packed import Geometry
from .layers import Owned, conv_padding, linear


class Tail:
    """The last layer of a branch: a convolution, a linear layer, or nothing (`module` None)."""

    def __init__(self, module: Any):
        self.module = module
        self.is_conv = module is not None and not isinstance(module, nn.Linear)
        self.weight: Tensor | None = getattr(module, "weight", None)
        self.bias: Tensor | None = getattr(module, "bias", None)
        # Whether eager adds the bias after the convolution: its gradient is then a plain sum, more accurate than the
        # library's.
        self.bias_apart: bool = getattr(module, "bias_apart", False)
        self.autocast = None if self.weight is None else autocast_dtype(self.weight)
        # What the layer computes in.
        self.dtype = None if self.weight is None else self.autocast or self.weight.dtype

    @functools.cached_property
    def paddings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """On both sides, and what is added on the far side only."""
        return conv_padding(self.module)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.module.stride, self.paddings[0], self.module.dilation, self.module.groups)

    def _conv_arguments(self) -> tuple[Any, ...]:
        stride, padding, dilation, groups = self.geometry
        return list(stride), list(padding), list(dilation), False, [0] * len(padding), groups

    def _padded(self, h: Tensor) -> Tensor:
        """h with what padding="same" adds on the far side only."""
        overhang = self.paddings[1]
        return F.pad(h, [n for extra in reversed(overhang) for n in (0, extra)]) if any(overhang) else h

    def __call__(self, h: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None:
            return h
        h, weight = h.to(self.dtype), weight.to(self.dtype)
        bias = None if bias is None else bias.to(self.dtype)
        if self.is_conv:
            return torch.convolution(self._padded(h), weight, bias, *self._conv_arguments())
        if torch.is_grad_enabled():
            return F.linear(h, weight, bias)
        return linear(h, weight, bias)

    def output_size(self, h: Tensor) -> tuple[int, ...]:
        m = self.module
        expected, found = (m.in_channels, h.shape[1]) if self.is_conv else (m.in_features, h.shape[-1])
        if expected != found:
            raise ValueError(f"{type(m).__name__}: x must have {expected} channels, got {list(h.shape)}")
        if self.is_conv:
            padding, overhang = self.paddings
            spatial = [n + extra for n, extra in zip(h.shape[2:], overhang, strict=True)]
            return conv_size((h.shape[0], *spatial), m.weight, padding, m.stride, m.dilation)
        return *h.shape[:-1], m.out_features

    def empty_output(self, h: Tensor) -> Tensor:
        """An uninitialised tensor like tail(h), in eager's memory format."""
        if self.weight is None or self.dtype is None:
            return torch.empty_like(h)
        if self.is_conv:
            return empty_conv_output(h, self.weight, self.geometry, self.dtype, self.output_size(h))
        return h.new_empty(self.output_size(h), dtype=self.dtype)

    def empty_like_output(self, residual: Tensor) -> Tensor:
        """The same where the tail's input is not known: in the format of the residual or the weight."""
        layout = self.is_conv and (channels_last_format(residual) or channels_last_format(self.module.weight))
        return torch.empty_like(residual, memory_format=layout or torch.contiguous_format)

    def grads(self, dy: Tensor, h: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor | None, Tensor | None]:
        """(dweight, dbias) where mask asks, computed in the layer's dtype."""
        dy, h = dy.to(self.dtype), h.to(self.dtype)
        if not self.is_conv:
            backend = select("linear_gate_residual_bwd", dy)
            dweight, dbias = linear_grads(backend, dy, h, weight, True, [False, *mask])[1:]
        else:
            inside = [False, mask[0], mask[1] and not self.bias_apart]
            h, sizes = self._padded(h), [weight.shape[0]]
            _, dweight, dbias = torch.ops.aten.convolution_backward.default(
                dy, h, weight.to(self.dtype), sizes, *self._conv_arguments(), inside
            )
            if mask[1] and self.bias_apart:
                dbias = self.bias_grad(dy)
        return None if dweight is None else dweight.to(weight.dtype), None if dbias is None else dbias.to(weight.dtype)

    def bias_grad(self, dy: Tensor) -> Tensor:
        return dy.sum([d for d in range(dy.dim()) if d != (1 if self.is_conv else dy.dim() - 1)])

    def broadcast(self, v: Tensor, ndim: int) -> Tensor:
        """A bias [D] or a gate ([1], [D], [B, D], [B, T, D]) shaped to multiply the output."""
        if self.is_conv and v.numel() > 1:
            return channel_view(v, ndim)
        return modulation(v)


@dataclasses.dataclass
class Branch:
    """A branch that was found zero, for `skipped_branch`."""

    tail: Tail
    activations: Sequence[Tensor]  # what the body is called with
    parameters: Sequence[Owned]  # those of the body: they get gradients of zeros
    # Everything before the tail, differentiable; returns the tensors that `hidden` is called with in backward.
    body: Callable[..., tuple[Tensor, ...]]
    # The tail's input from what the body returned, differentiable (ResBlock: norm and activation of conv1's output,
    # which are recomputed, not saved).
    hidden: Callable[..., Tensor]
    # A tensor with the output's shape and device: the residual, or without one the tail's input.
    example: Tensor
    zero_gate: bool = False  # the gate is what was found zero, else the tail's weight
    always_run: bool = False  # run the body even where its result is not needed: it draws random numbers
    # The residual depends on the first activation, which gets its gradient there: none of zeros is added to it.
    carried: bool = False
    # Parameters that `hidden` reads: like the tail's weight they must not change between forward and backward.
    recomputed: Sequence[Tensor] = ()


def skipped_branch(branch: Branch, residual: Tensor | None, gate: Tensor | None = None) -> Tensor:
    """residual + gate * tail(h) of a branch that is zero, with eager's gradients; a fresh tensor."""
    tail = branch.tail
    inputs = (residual, tail.weight, tail.bias, gate, *branch.activations, *(p for _, _, p in branch.parameters))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _SkippedBranch.apply(branch, *inputs)
    if branch.always_run:
        branch.body(*branch.activations)
    return skipped_value(tail, residual, branch.example, gate, branch.zero_gate)


def skipped_value(
    tail: Tail,
    residual: Tensor | None,
    example: Tensor,
    gate: Tensor | None = None,
    zero_gate: bool = False,
    owned: bool = False,
) -> Tensor:
    """The result of a skipped branch, for arguments as in `Branch`; written into the residual itself where that is
    `owned`: the caller holds the only reference."""
    dtype = tail.dtype or example.dtype
    bias = None if zero_gate else tail.bias
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if gate is not None:
        dtype, gate = torch.promote_types(dtype, gate.dtype), tail.broadcast(gate, example.dim())
    empty = functools.partial(tail.empty_output if residual is None else tail.empty_like_output, example)
    return residual_alone(residual, bias, gate, 1 if tail.is_conv else -1, dtype, empty, owned)


class _SkippedBranch(torch.autograd.Function):
    """Inputs: residual, tail weight, tail bias, gate, then the branch's activations and parameters.

    Saved: the activations and the tail's own tensors (the caller owns them), and what the body returned. For a zero
    gate that wants a gradient it is the tail's output.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        branch: Branch,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
        *upstream: Tensor,
    ) -> Tensor:
        # The function keeps no activation but through save_for_backward.
        ctx.branch = dataclasses.replace(branch, activations=(), example=branch.example.new_empty(0))
        ctx.residual_dtype = None if residual is None else residual.dtype
        need_hidden = ctx.needs_input_grad[2] and not branch.zero_gate
        need_output = ctx.needs_input_grad[4] and branch.zero_gate
        activations = upstream[: len(branch.activations)]
        body: tuple[Tensor, ...] = ()
        if need_hidden or need_output or branch.always_run:
            body = branch.body(*activations)
        if need_output:
            body = (branch.tail(branch.hidden(*body), weight, bias),)
        elif not need_hidden:
            body = ()
        ctx.counts = len(activations), len(body)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, bias, gate, *activations, *body, *branch.recomputed)
        return skipped_value(branch.tail, residual, branch.example, gate, branch.zero_gate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = ctx.needs_input_grad[1:]
        if dy is None:
            return (None,) * (1 + len(needs))
        branch, tail = ctx.branch, ctx.branch.tail
        weight, bias, gate, *saved = ctx.saved_tensors
        activations, body = saved[: ctx.counts[0]], saved[ctx.counts[0] : sum(ctx.counts)]
        dresidual = dy.to(ctx.residual_dtype) if needs[0] else None
        if torch.is_grad_enabled():
            return None, dresidual, *_differentiable(branch, needs[1:], dy, weight, bias, gate, activations)
        dweight = dbias = dgate = None
        if branch.zero_gate:
            dweight = torch.zeros_like(weight) if needs[1] else None
            dbias = torch.zeros_like(bias) if needs[2] else None
            if needs[3]:
                dgate = _gate_grad(tail, dy, gate, body[0])
        else:
            step = dy if gate is None else dy * tail.broadcast(gate, dy.dim()).to(dy.dtype)
            if needs[1]:
                with as_in_forward(branch.parameters):
                    hidden = branch.hidden(*body)
                dweight, dbias = tail.grads(step, hidden, weight, [True, bool(needs[2])])
            elif needs[2]:
                dbias = tail.bias_grad(step.to(tail.dtype)).to(bias.dtype)
            if needs[3]:
                dgate = torch.zeros_like(gate)
                if bias is not None:
                    dgate = _gate_grad(tail, dy, gate, tail.broadcast(bias, dy.dim()).to(dy.dtype).expand_as(dy))
        upstream = (*activations, *(p for _, _, p in branch.parameters))
        zeros = [torch.zeros_like(t) if need else None for t, need in zip(upstream, needs[4:], strict=True)]
        if branch.carried and not _adds_every_gradient():
            zeros[0] = None
        return None, dresidual, dweight, dbias, dgate, *zeros


@contextlib.contextmanager
def as_in_forward(parameters: Sequence[Owned]) -> Iterator[None]:
    """Modules have the parameters they had at forward, which functional_call may have taken away since."""
    changed = [(m, name, m._parameters[name], p) for m, name, p in parameters if m._parameters[name] is not p]
    for m, name, _, p in changed:
        m._parameters[name] = p  # type: ignore[assignment]
    try:
        yield
    finally:
        for m, name, now, _ in changed:
            m._parameters[name] = now


def _adds_every_gradient() -> bool:
    """Whether compiled autograd runs this backward, which sums gradients with torch.add: None is no zero to it."""
    compiled_autograd: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled_autograd is None:
        return False
    return compiled_autograd.in_compiled_autograd_region or torch.compiler.is_compiling()


def _gate_grad(tail: Tail, dy: Tensor, gate: Tensor, output: Tensor) -> Tensor:
    """sum of dy * output over the dimensions along which the gate is broadcast."""
    if not tail.is_conv or gate.numel() == 1:
        backend = select("gate_residual_bwd", output)
        dgate, _ = backend.gate_residual_bwd(dy.to(output.dtype), gate, output, True, False)
        assert dgate is not None
        return dgate
    wide = torch.promote_types(dy.dtype, torch.float32)
    grad = dy.to(wide) * output.to(wide)
    return grad.sum_to_size(tail.broadcast(gate, dy.dim()).shape).view(gate.shape).to(gate.dtype)


def _differentiable(
    branch: Branch,
    needs: Sequence[bool],
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    activations: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients with a graph of their own (create_graph): the branch again, densely."""
    tail = branch.tail
    autocast = torch.autocast(dy.device.type, dtype=tail.autocast, enabled=tail.autocast is not None)
    with torch.enable_grad(), autocast, as_in_forward(branch.parameters):
        y = tail(branch.hidden(*branch.body(*activations)), weight, bias)
        if gate is not None:
            y = tail.broadcast(gate, y.dim()) * y
    inputs = [weight, bias, gate, *activations, *(p for _, _, p in branch.parameters)]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
