"""conv(dropout(act(norm x))) + residual of any norm, in training without its middle: of the branch x is kept and what
is computed of it alone, the activated tensor is computed again for backward.

In inference, under a compiler and under torch.func it is the functions one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import functional, ops, zero
from .._autocast import autocast, is_autocast
from .._checks import convolution
from .._layout import channels_last_format
from .._padding import is_padded
from ..plan.mode import allow_reduced, reduced_allowed, training
from ..reference import draw_keep, dropout_keep
from ..steps import padded
from .layers import Owned
from .skip import as_in_forward

Activate = Callable[..., Tensor]


class Conv(NamedTuple):
    """A stride-1 convolution: who has its weight and bias, and how it is padded (`functional.conv_residual`)."""

    layer: Any
    padding: Any
    padding_mode: Any = "zeros"

    def __call__(
        self, h: Tensor, residual: Tensor | None = None, cache: Tensor | None = None, *, zero_skip: str = "never"
    ) -> Tensor:
        return functional.conv_residual(
            h,
            self.layer.weight,
            self.layer.bias,
            residual,
            padding=self.padding,
            padding_mode=self.padding_mode,
            conv_cache=cache,
            zero_skip=zero_skip,
        )

    def ahead(self, h: Tensor) -> tuple[Conv, Tensor]:
        """(conv', h') with conv'(h') = conv(h), what padding copies copied: nobody need hold h while conv' runs."""
        weight, bias = self.layer.weight, self.layer.bias
        sides = convolution("conv_residual", h, weight, bias, None, self.padding, self.padding_mode)
        if is_compiling() or zero.transforms_active() or not is_padded(sides, weight):
            return self, h
        h, left = padded.ahead(h, weight, sides)
        modes = ["replicate" if repeated else "zeros" for _, _, repeated in left]
        return Conv(self.layer, [side[:2] for side in left], modes), h


def activated_conv(
    activate: Activate,
    activations: Sequence[Tensor],
    parameters: Sequence[Owned],
    conv: Conv,
    residual: Tensor | None = None,
    *,
    dropout: Any = None,
    framewise: bool = False,
    zero_skip: str = "never",
) -> Tensor:
    """residual + conv(dropout(activate(*activations))).

    parameters: what activate reads beside its arguments. dropout: has p and training, or None; `framewise`: eager draws
    its mask frame by frame.
    """
    p = _probability(dropout)
    tensors = residual, conv.layer.weight, conv.layer.bias, *activations, *(t for _, _, t in parameters)
    if is_compiling() or zero.transforms_active() or not _recorded(tensors):
        return conv(dropped(activate(*activations), dropout, framewise), residual, zero_skip=zero_skip)
    plan = _Plan(activate, len(activations), parameters, conv, p, framewise, zero_skip)
    return _Activated.apply(plan, *tensors)


def dropped(h: Tensor, dropout: Any, framewise: bool = False) -> Tensor:
    """dropout(h), its mask drawn as by eager."""
    p = _probability(dropout)
    return dropout_keep(h, _draw(h, p, framewise), p)


def _probability(dropout: Any) -> float:
    return dropout.p if dropout is not None and dropout.training else 0.0


def _draw(h: Tensor, p: float, framewise: bool) -> Tensor | None:
    if framewise and p > 0.0 and channels_last_format(h) is None:
        h = h.new_empty(h.transpose(1, 2).shape).transpose(1, 2)
    return draw_keep(h, p, True)


def _recorded(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Plan(NamedTuple):
    activate: Activate
    operands: int  # of the activations
    parameters: Sequence[Owned]
    conv: Conv
    p: float
    framewise: bool
    zero_skip: str


class _Activated(torch.autograd.Function):
    """Inputs: the plan, residual, weight, bias, the activations, the parameters. Saved: those but the residual, and the
    dropout mask."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, plan: _Plan, residual: Tensor | None, weight: Tensor, bias: Tensor | None, *read: Tensor
    ) -> Tensor:
        x, conv = read[0], plan.conv
        ctx.plan, ctx.reduced = plan, reduced_allowed()
        ctx.autocast = torch.get_autocast_dtype(x.device.type) if is_autocast(x.device) else None
        ctx.residual_dtype = None if residual is None else residual.dtype
        with training():
            h = plan.activate(*read[: plan.operands])
            keep = _draw(h, plan.p, plan.framewise)
            w, b, h = autocast(weight, bias, dropout_keep(h, keep, plan.p))
            pad = convolution("conv_residual", h, w, b, residual, conv.padding, conv.padding_mode)
            ctx.padding, ctx.test = pad, zero.test_of("conv_residual", plan.zero_skip, w, weight)
            y, skipped = ops.conv_residual(h, w, b, residual, pad, ctx.test)
        ctx.save_for_backward(weight, bias, keep, skipped, *read)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        plan: _Plan = ctx.plan
        needs, dresidual = ctx.needs_input_grad[1:], None
        if needs[0]:
            dresidual = dy.to(ctx.residual_dtype)
        weight, bias, keep, skipped, *read = ctx.saved_tensors
        activations, parameters = read[: plan.operands], [p for _, _, p in plan.parameters]
        autocast_then = torch.autocast(dy.device.type, dtype=ctx.autocast, enabled=ctx.autocast is not None)
        again = torch.is_grad_enabled()  # create_graph: the gradients have a graph of their own
        with as_in_forward(plan.parameters), autocast_then, allow_reduced(ctx.reduced), training():
            if not again:
                activations = [t.detach().requires_grad_(need) for t, need in zip(activations, needs[3:], strict=False)]
            with torch.enable_grad():
                h = dropout_keep(plan.activate(*activations), keep, plan.p)
            inputs = [t for t, need in zip((*activations, *parameters), needs[3:], strict=True) if need]
            if again:
                y = plan.conv._replace(layer=_Layer(weight, bias))(h)
                inputs = [t for t, need in zip((weight, bias), needs[1:3], strict=True) if need] + inputs
                found = iter(torch.autograd.grad(y, inputs, dy.to(y.dtype), create_graph=True, allow_unused=True))
            else:
                w, b, operand = autocast(weight, bias, h.detach())
                mask = [bool(inputs), needs[1], needs[2]]
                dh, *grads = ops.conv_residual_bwd(
                    dy, operand, w, skipped, ctx.test, ctx.padding, bias is not None, mask
                )
                assert dh is not None or not inputs
                tail = [g.to(t.dtype) for g, t in zip(grads, (weight, bias), strict=True) if g is not None]
                upstream: tuple[Any, ...] = ()
                if dh is not None:
                    upstream = torch.autograd.grad(h, inputs, dh.to(h.dtype), allow_unused=True)
                found = iter((*tail, *upstream))
        return None, dresidual, *(next(found) if need else None for need in needs[1:])


class _Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None
