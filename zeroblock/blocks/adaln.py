"""Transformer blocks with adaLN-Zero, whoever owns their layers: zeroblock.nn.DiTBlock and the converted ones.

    x = x + gate_msa * attn(modulate(norm1 x)), then x = x + gate_mlp * mlp(modulate(norm2 x))

modulate(h) = h * (1 + scale) + shift. Each half counts for itself (decision.py): a block that is skipped as a whole
counts two skips, one that runs two executions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from .._autocast import is_autocast
from ..ops.layer_norm_modulate_linear import traced as traced_norm_linear
from ..ops.register import left_to_compiler
from ..plan.mode import rounds_as_eager
from ..reference import apply_activation
from .decision import NOT_ALLOWED, RUN, SKIPS, Answer, decide, op_policy, runs_eagerly
from .layers import linear, parameters_of
from .residual import skip_residual
from .skip import Branch, Tail, skipped_branch

# The modulation's vectors, in this order: shift, scale and gate of attention, then of the MLP.
CHUNKS = 6
GATES = (2, 5)
MSA, MLP = slice(0, 3), slice(3, 6)

Vectors = tuple[Tensor, ...]


class Half(NamedTuple):
    """last(between(first(modulate(norm x)))), norm a LayerNorm without parameters; no hooks watch its layers."""

    eps: float
    first: nn.Linear
    between: Callable[[Tensor], Tensor] | str  # a function, or the name of an activation
    last: nn.Linear
    modules: tuple[nn.Module, ...] = ()  # those that `between` calls


class Whole(NamedTuple):
    """The branch of a half that is called as a whole: branch(*activations), by these modules."""

    branch: Callable[..., Tensor]
    activations: tuple[Tensor, ...]
    modules: tuple[nn.Module, ...]
    trusted: str | None = None  # whose layers draw no random numbers of their own: `may_draw`


class Next(NamedTuple):
    """The first norm of the block that comes next; `find` returns its eps and vectors, or None."""

    find: Callable[[], tuple[float, Vectors] | None]
    found: list[tuple[Tensor, Vectors]]  # the norm's result, and those vectors


def forward(
    name: str,
    policy: str,
    x: Tensor,
    vectors: Vectors,
    attn: Half,
    mlp: Half,
    normed: Tensor | None = None,
    after: Next | None = None,
) -> Tensor:
    """The whole block; vectors [B, D] as CHUNKS says. Inference is one sequence: gate, residual and the next norm in
    one pass, the MLP's activation at the end of its first GEMM. normed: the modulated first norm of x, where it was
    computed before; after: whose norm is to be computed with the block's end."""
    x = x.contiguous()  # once for norm and residual; patch embeddings hand over transposed tokens
    answers = [decide_half(name, policy, x, vectors[2], attn), decide_half(name, policy, x, vectors[5], mlp)]
    if is_plain_inference(policy, answers, x):
        shift, scale, gate = vectors[MSA]
        if normed is None:
            normed = functional.layer_norm_modulate(x, shift, scale, eps=attn.eps)
        return _seam_and_mlp(x, gate, run_half(normed, attn), vectors[MLP], mlp, after)
    x = decided_half(name, policy, x, vectors[MSA], attn, answers[0])
    return decided_half(name, policy, x, vectors[MLP], mlp, answers[1])


def forward_around(
    name: str,
    policy: str,
    x: Tensor,
    gate: Tensor,
    attn: Whole,
    vectors: Vectors,
    mlp: Half,
    after: Next | None = None,
) -> Tensor:
    """`forward` for an attention that is called as a whole; vectors are those of the MLP."""
    x = x.contiguous()
    answers = [decide(name, policy, (), (gate,), attn.modules), decide_half(name, policy, x, vectors[2], mlp)]
    if is_plain_inference(policy, answers, x):
        return _seam_and_mlp(x, gate, attn.branch(*attn.activations), vectors, mlp, after)
    if answers[0] in SKIPS:
        x = skip_residual(answers[0], x, attn.branch, None, gate, attn.activations, attn.modules, attn.trusted)
    else:
        x = functional.gate_residual(x, gate, attn.branch(*attn.activations))
    return decided_half(name, policy, x, vectors, mlp, answers[1])


def half(name: str, policy: str, x: Tensor, vectors: Vectors, layers: Half) -> Tensor:
    """x + gate * last(between(first(modulate(norm x)))), vectors (shift, scale, gate) [B, D]; skipped while gate or
    last is zero."""
    x = x.contiguous()
    answer = decide_half(name, policy, x, vectors[2], layers)
    if is_plain_inference(policy, [answer], x):
        shift, scale, gate = vectors
        h = functional.layer_norm_modulate(x, shift, scale, eps=layers.eps)
        return functional.gate_residual(x, gate, run_half(h, layers))
    return decided_half(name, policy, x, vectors, layers, answer)


def decide_half(name: str, policy: str, x: Tensor, gate: Tensor, layers: Half) -> Answer:
    weight = layers.last.weight
    if x.shape[-1] != weight.shape[0]:
        return NOT_ALLOWED  # the op raises
    return decide(name, policy, (weight,), (gate,))


def decided_half(name: str, policy: str, x: Tensor, vectors: Vectors, layers: Half, answer: Answer) -> Tensor:
    shift, scale, gate = vectors
    _, first, between, last, modules = layers
    if answer in SKIPS:
        before_last = functools.partial(_before_last, layers)
        return skip_residual(answer, x, before_last, last, gate, (x, shift, scale), (first, *modules))
    h = _after_first(layers, x, shift, scale)
    activation = between if isinstance(between, str) else None
    if not isinstance(between, str):
        h = between(h)
    policy = op_policy(answer, policy)
    return functional.linear_gate_residual(h, last.weight, last.bias, gate, x, activation=activation, zero_skip=policy)


def _after_first(layers: Half, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    first = layers.first
    if left_to_compiler(x):  # spares it the checks
        return traced_norm_linear(x, shift, scale, first.weight, first.bias, layers.eps)
    return functional.layer_norm_modulate_linear(x, shift, scale, first.weight, first.bias, eps=layers.eps)


def _before_last(layers: Half, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    h, between = _after_first(layers, x, shift, scale), layers.between
    return apply_activation(h, between) if isinstance(between, str) else between(h)


def is_plain_inference(policy: str, answers: list[Answer], x: Tensor) -> bool:
    """Everything runs, without gradients and autocast; nothing watches the dispatcher, and there is no flag on a device
    that the ops' kernels would have to read."""
    if torch.is_grad_enabled() or not runs_eagerly() or is_autocast(x.device):
        return False
    return policy == "never" or all(answer is RUN for answer in answers)


def _seam_and_mlp(
    x: Tensor, gate: Tensor, branch: Tensor, vectors: Vectors, mlp: Half, after: Next | None = None
) -> Tensor:
    """The block in inference, from the attention's result on."""
    shift, scale, gate_mlp = vectors
    x, h = functional.gate_residual_layer_norm_modulate(x, gate, branch, shift, scale, eps=mlp.eps)
    y = run_half(h, mlp)
    found = None if after is None else after.find()
    if found is None:
        return functional.gate_residual(x, gate_mlp, y)
    eps, theirs = found
    x, h = functional.gate_residual_layer_norm_modulate(x, gate_mlp, y, *theirs[:2], eps=eps)
    after.found.append((h, theirs))  # type: ignore[union-attr]
    return x


def run_half(h: Tensor, layers: Half) -> Tensor:
    """last(between(first(h))), without gradients."""
    _, first, between, last, _ = layers
    if isinstance(between, str):
        h = linear(h, first.weight, first.bias, between)
    else:
        h = between(linear(h, first.weight, first.bias))
    return linear(h, last.weight, last.bias)


def final_layer(
    name: str,
    policy: str,
    activations: tuple[Tensor, ...],
    eps: float,
    vectors: Callable[..., Vectors],
    last: nn.Linear,
    modules: tuple[nn.Module, ...] = (),
) -> Tensor:
    """last(modulate(norm x)) for activations (x, ...), vectors(...) being (shift, scale) [B, D] by these modules.

    While last is zero the result is its bias.
    """

    def body(x: Tensor, *conditions: Tensor) -> Vectors:
        return x, *vectors(*conditions)

    if decide(name, policy, (last.weight,), bypassed=modules) in SKIPS:
        hidden = functools.partial(functional.layer_norm_modulate, eps=eps)
        branch = Branch(Tail(last), activations, parameters_of(*modules), body, hidden, activations[0])
        return skipped_branch(branch, None)
    x, shift, scale = body(*activations)
    if rounds_as_eager():
        return last(functional.layer_norm_modulate(x, shift, scale, eps=eps, rounding="eager"))
    return functional.layer_norm_modulate_linear(x, shift, scale, last.weight, last.bias, eps=eps)
