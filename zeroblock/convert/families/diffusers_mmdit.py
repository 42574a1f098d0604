"""What blocks of two streams share that are written out, and that of Stable Diffusion 3 (diffusers
`models/attention.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.broadcast import fits_gate
from ...blocks.decision import NOT_ALLOWED, SKIPS, decide
from ...blocks.layers import may_draw
from ...blocks.one_pass import copy_of_residual
from ...blocks.residual import skip_residual
from ..family import Family, lacks, register
from ..report import Obstacle
from .adaln import (
    DIFFUSERS,
    feed_forward,
    gate_rows,
    gated,
    gated_branch,
    is_plain,
    projected,
)

Attend = Callable[..., tuple[Tensor, Tensor]]


def _streams(D: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, text and conditioning for a proof."""
    return torch.randn(2, side**2, D), torch.randn(2, 3, D), torch.randn(2, D)


class TwoStreams(Family):
    """Attention of both streams together, then a feed-forward for each."""

    eager_rounding = True
    remakes = True

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, "norm1.linear", "norm1_context.linear", "attn", "norm2", "ff")

    def example(self, block: Any, side: int) -> tuple:
        return _streams(block.norm1.linear.in_features, side)

    def attended(
        self,
        attend: Attend,
        x: Tensor,
        context: Tensor,
        gates: tuple[Tensor, Tensor],
        activations: tuple[Tensor, ...],
        modules: tuple[nn.Module, ...],
        projections: tuple[nn.Module, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """(x + gate * out, context + gate_context * out_context), out, out_context = attend(*activations) by `modules`,
        or these `projections` of that; skipped while both gates are zero, which counts as one branch."""
        modules = (*modules, *projections)
        fits = is_plain(*gates) and fits_gate(gates[0], x.shape) and fits_gate(gates[1], context.shape)
        answer = decide(self.name, self.zero_skip, (), gates, modules) if fits else NOT_ALLOWED
        if answer not in SKIPS:
            outs = attend(*activations)
            if not projections:
                return gated(x, gates[0], outs[0]), gated(context, gates[1], outs[1])
            first, second = zip((x, context), gates, outs, projections, strict=True)
            return projected(*first, self.zero_skip), projected(*second, self.zero_skip)
        if not torch.is_grad_enabled() and not any(may_draw(m, DIFFUSERS) for m in modules):
            return copy_of_residual(x), copy_of_residual(context)
        # As one stream, so that the attention runs once and both gates get their gradients of it.
        gate = torch.cat([g[:, None].expand_as(t) for g, t in zip(gates, (x, context), strict=True)], dim=1)

        def body(*h: Tensor) -> Tensor:
            outs = attend(*h)
            return torch.cat([p(o) for p, o in zip(projections, outs, strict=True)] if projections else outs, dim=1)

        y = skip_residual(answer, torch.cat([x, context], dim=1), body, None, gate, activations, modules, DIFFUSERS)
        x, context = y.split([x.shape[1], context.shape[1]], dim=1)
        return x.contiguous(), context.contiguous()

    def _context_rows(self, block: Any) -> tuple[Tensor, ...]:
        return gate_rows(block.norm1_context.linear, 6, 2)


@register
class JointTransformerBlock(TwoStreams):
    """x + gate_msa * attn, then x + gate_mlp * ff(modulate(norm2 x)), and the context likewise; one joint attention

    The block of Stable Diffusion 3 and 3.5 (with a second attention of x alone). Source: diffusers
    models/attention.py.
    Use: zb.accelerate(transformer); attention processors stay as they are.
    Inference: attention is not run while the gates of both streams are zero, a feed-forward not while its own is.
    Training forward while the gates are zero: attention and feed-forward run once, without a graph.
    Training backward while zero: the gates' gradients alone; the rest are zeros.
    """

    name = "JointTransformerBlock"
    classes = ("JointTransformerBlock",)

    def options(self, block: Any) -> dict[str, tuple]:
        return {"joint_attention_kwargs": ({},)}

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        chunks = 9 if block.use_dual_attention else 6
        found = {"attn": gate_rows(block.norm1.linear, chunks, 2), "ff": gate_rows(block.norm1.linear, chunks, 5)}
        if block.use_dual_attention:
            found["attn2"] = gate_rows(block.norm1.linear, 9, 8)
        if not block.context_pre_only:
            found["attn"] += self._context_rows(block)
            found["ff_context"] = gate_rows(block.norm1_context.linear, 6, 5)
        return found

    def forward(
        self,
        block: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        x, context = hidden_states, encoder_hidden_states
        if joint_attention_kwargs or block._chunk_size is not None or x.dim() != 3:
            return self.eager(block, x, context, temb, joint_attention_kwargs)
        h, gate, *mlp = block.norm1(x, emb=temb)
        if block.use_dual_attention:
            *mlp, h2, gate2 = mlp
        attn = block.attn

        def attend(h: Tensor, h_context: Tensor) -> tuple[Tensor, Tensor]:
            return attn(hidden_states=h, encoder_hidden_states=h_context)

        if block.context_pre_only:
            h_context = block.norm1_context(context, temb)
            x = gated_branch(self, x, gate, lambda *h: attend(*h)[0], (h, h_context), attn)
        else:
            h_context, gate_context, *mlp_context = block.norm1_context(context, emb=temb)
            x, context = self.attended(attend, x, context, (gate, gate_context), (h, h_context), (attn,))
        if block.use_dual_attention:
            x = gated_branch(self, x, gate2, lambda h: block.attn2(hidden_states=h), (h2,), block.attn2)
        x = feed_forward(self, block.ff, block.norm2, x, *mlp)
        if block.context_pre_only:
            return None, x
        return feed_forward(self, block.ff_context, block.norm2_context, context, *mlp_context), x
