"""diffusers' adaLN transformer blocks and DiT (`models/attention.py`, `models/transformers/dit_transformer_2d.py`)."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ...blocks import adaln
from ...blocks.broadcast import fits_gate
from ...blocks.decision import SKIPS, bypassable, decide
from ...blocks.layers import is_plain_norm
from ...blocks.one_pass import copy_if_gates_are_zero
from ...ops.register import left_to_compiler
from ..family import SMALL, Family, lacks, register
from ..report import Obstacle, Reason
from .adaln import (
    DIFFUSERS,
    feed_forward,
    fits,
    fused_feed_forward,
    gate_rows,
    gated_branch,
    is_plain,
    is_plain_linear,
    modulated,
    zeroing_tensors,
)
from .diffusers_attention import keep_output_class, plain_processor


@register
class BasicTransformerBlock(Family):
    """x + gate_msa * attn1(modulate(norm1 x)), then x + attn2(x, context), then x + gate_mlp * ff(modulate(norm x))

    The block of DiT (norm_type "ada_norm_zero": six vectors of norm1.linear) and PixArt ("ada_norm_single":
    scale_shift_table + timestep embedding). Source: diffusers models/attention.py.
    Use: zb.accelerate(transformer). Blocks with plain norms: see Attention and FeedForward.
    Inference: a half whose gate is zero is not run; with zero gate rows in norm1.linear the block is a copy. A cross
    attention whose output layer is zero is not run.
    Training forward while a gate is zero: its half runs once, without a graph.
    Training backward while zero: the gate's gradient alone; the rest are zeros.
    """

    name = "BasicTransformerBlock"
    eager_rounding = True
    remakes = True
    classes = ("BasicTransformerBlock",)

    def knows(self, block: Any) -> bool:
        # With plain norms there is neither a modulation nor a gate, and nothing that starts at zero.
        return super().knows(block) and getattr(block, "norm_type", None) not in ("layer_norm", "layer_norm_i2vgen")

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, "norm_type", "norm1", "attn1", "ff")
        if missing is not None:
            return missing
        kind = block.norm_type
        if kind not in ("ada_norm_zero", "ada_norm_single"):
            return Obstacle(Reason.VARIANT, f"norm_type {kind!r} has no gate")
        return lacks(block, *(("norm1.linear", "norm3") if kind == "ada_norm_zero" else ("scale_shift_table", "norm2")))

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        if block.norm_type == "ada_norm_zero":
            attn1, ff = (gate_rows(block.norm1.linear, adaln.CHUNKS, gate) for gate in adaln.GATES)
            return {"attn1": attn1, "ff": ff}
        table = block.scale_shift_table.detach()
        found: dict[str, tuple[Tensor, ...]] = {"attn1": (table[2],), "ff": (table[5],)}
        if block.attn2 is not None:
            out = block.attn2.to_out[0]
            found["attn2"] = zeroing_tensors(out, out.weight)
        return found

    def example(self, block: Any, side: int) -> tuple:
        x, D = torch.randn(2, side**2, block.dim), block.dim
        if block.norm_type == "ada_norm_single":
            context = None if block.cross_attention_dim is None else torch.randn(2, 3, block.cross_attention_dim)
            return x, None, context, None, torch.randn(2, 6 * D)
        index = torch.zeros(2, dtype=torch.long)
        return x, None, None, None, index, None, index

    def options(self, block: Any) -> dict[str, tuple]:
        found: dict[str, tuple] = {"attention_mask": (torch.randn(2, 1, SMALL**2),), "cross_attention_kwargs": ({},)}
        if block.attn2 is not None:
            D = block.cross_attention_dim
            found["encoder_attention_mask"] = (torch.randn(2, 1, SMALL**2 if D is None else 3),)
            if block.norm_type == "ada_norm_zero" and D is not None:
                found["encoder_hidden_states"] = (torch.randn(2, 3, D),)
        return found

    def forward(
        self,
        block: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        x = hidden_states
        if x.dim() != 3 or cross_attention_kwargs or block._chunk_size is not None or block.only_cross_attention:
            rest = (encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs, class_labels)
            return self.eager(block, x, attention_mask, *rest, added_cond_kwargs)
        if block.norm_type == "ada_norm_zero":
            alone = block.attn2 is None and not block.training and not is_compiling()
            if alone and not _more_conditions(x, timestep, class_labels):
                linear = block.norm1.linear
                y = copy_if_gates_are_zero(
                    self.name, self.zero_skip, x, linear, block.children(), adaln.CHUNKS, adaln.GATES
                )
                if y is not None:
                    return y
            h, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
            norm_mlp = block.norm3
        else:
            six = block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = six.unbind(1)
            h = modulated(block.norm1, x, shift_msa, scale_msa)
            norm_mlp = block.norm2
        if block.pos_embed is not None:
            h = block.pos_embed(h)

        def attend(h: Tensor) -> Tensor:
            return block.attn1(h, attention_mask=attention_mask)

        vectors = (shift_mlp, scale_mlp, gate_mlp)
        half = None if block.attn2 is not None else fused_feed_forward(block.ff, norm_mlp, x, *vectors)
        if half is not None and is_plain(gate_msa) and fits_gate(gate_msa, x.shape):
            attn = adaln.Whole(attend, (h,), (block.attn1,), DIFFUSERS)
            return adaln.forward_around(self.name, self.zero_skip, x, gate_msa, attn, vectors, half)
        x = gated_branch(self, x, gate_msa, attend, (h,), block.attn1)
        if block.attn2 is not None:
            x = self._cross(block, x, encoder_hidden_states, encoder_attention_mask)
        return feed_forward(self, block.ff, norm_mlp, x, shift_mlp, scale_mlp, gate_mlp)

    def _cross(self, block: Any, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """x + attn2(x, context)"""
        bias = self._output_bias(block.attn2)
        if bias is not None:
            return x + bias
        h = x if block.norm_type == "ada_norm_single" else block.norm2(x)
        if block.pos_embed is not None and block.norm_type != "ada_norm_single":
            h = block.pos_embed(h)
        return block.attn2(h, encoder_hidden_states=context, attention_mask=mask) + x

    def _output_bias(self, attn: Any) -> Tensor | None:
        """What is left of an attention whose output layer is zero, without gradients: that layer's bias."""
        out = attn.to_out[0]
        if torch.is_grad_enabled() or is_compiling() or attn.training or not is_plain_linear(out) or out.bias is None:
            return None
        if not plain_processor(attn) or attn.residual_connection or attn.rescale_output_factor != 1.0:
            return None
        if out.bias.dtype != out.weight.dtype:
            return None
        return out.bias if decide(self.name, self.zero_skip, (out.weight,), bypassed=(attn,)) in SKIPS else None


def _more_conditions(x: Tensor, *conditions: Any) -> bool:
    """One sample of x, and conditions [B] of several: the result has as many."""
    return x.shape[0] == 1 and any(isinstance(c, Tensor) and c.numel() > 1 for c in conditions)


@register
class DiTTransformer2DModel(Family):
    """proj_out_2(norm_out(x) * (1 + scale) + shift) after DiT's blocks, (shift, scale) = proj_out_1(silu(conditioning))

    The output head of diffusers' DiT; the blocks are a family of their own. Source: diffusers
    models/transformers/dit_transformer_2d.py.
    Use: zb.accelerate(transformer); gradient checkpointing works as before.
    Inference while proj_out_2 is zero: the head is its bias; norm, modulation and projection are not run.
    Training forward while zero: norm and modulation alone.
    Training backward while zero: proj_out_2's gradients; the rest are zeros.
    """

    name = "DiTTransformer2DModel"
    eager_rounding = True
    classes = ("DiTTransformer2DModel",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, "pos_embed", "transformer_blocks.0.norm1.emb", "norm_out", "proj_out_1", "proj_out_2")

    def on_class_created(self, kind: type[nn.Module]) -> None:
        keep_output_class(kind)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"proj_out_2": zeroing_tensors(block.proj_out_2, block.proj_out_2.weight)}

    def inner_modules(self, block: Any) -> tuple[nn.Module, ...]:
        return (block, block.proj_out_2)

    def proof_target(self, block: Any) -> nn.Module:
        """The model with one of its blocks."""
        model = copy.copy(block)
        model.__dict__["_modules"] = dict(block._modules)
        model.transformer_blocks = block.transformer_blocks[:1]
        return model

    def example(self, block: Any, side: int) -> tuple:
        size, index = block.config.sample_size, torch.zeros(1, dtype=torch.long)
        return torch.randn(1, block.config.in_channels, size, size), index, index, None, False

    def forward(
        self,
        block: Any,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        x, linear, norm = block.pos_embed(hidden_states), block.proj_out_2, block.norm_out
        checkpointed = torch.is_grad_enabled() and block.gradient_checkpointing
        for layer in block.transformer_blocks:
            call = functools.partial(block._gradient_checkpointing_func, layer) if checkpointed else layer
            x = call(x, None, None, None, timestep, cross_attention_kwargs, class_labels)
        conditioning = block.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        shift, scale = block.proj_out_1(F.silu(conditioning)).chunk(2, dim=1)
        x = self._head(norm, linear, x, shift, scale)

        side, p, channels = int(x.shape[1] ** 0.5), block.patch_size, block.out_channels
        x = x.reshape(-1, side, side, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        sample = x.reshape(-1, channels, side * p, side * p)
        if not return_dict:
            return (sample,)
        return block._zeroblock_output(sample=sample)

    def _head(self, norm: Any, linear: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """linear(norm(x) * (1 + scale) + shift)"""
        if left_to_compiler(x):
            return linear(modulated(norm, x, shift, scale))
        plain = is_plain_linear(linear) and is_plain_norm(norm) and bypassable((norm, linear))
        if not plain or not fits(norm, x, shift, scale):
            return linear(modulated(norm, x, shift, scale))

        def vectors(shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return shift, scale

        return adaln.final_layer(self.name, self.zero_skip, (x, shift, scale), norm.eps, vectors, linear)
