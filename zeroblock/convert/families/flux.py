"""The blocks of black-forest-labs/flux and of the code that trainers copied from it: pytorch/torchtitan, kohya's
sd-scripts and musubi-tuner.

Attention stays the author's: the function `attention` that stands beside the block in its module, whatever it is at the
call, or the block's `inner_attention`.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ...blocks import adaln
from ...blocks.broadcast import may_grow
from ...blocks.one_pass import copy_if_gates_are_zero
from ...ops.remade import joined
from ..family import Family, lacks, register
from ..report import Obstacle, Reason
from .adaln import feed_forward, gate_rows, gated_projection, modulated_linear, zeroing_tensors
from .diffusers_mmdit import TwoStreams
from .dit import FinalLayer

# The attributes of a block that musubi's attention takes as arguments.
_OPTIONS = ("attn_mode", "split_attn")


class _Attending(Family):
    """What both blocks share: how they come by their attention."""

    eager_rounding = True
    remakes = True

    def entry(self, kind: type[nn.Module]) -> str:
        """Trainers' forward only checkpoints."""
        return "_forward" if hasattr(kind, "_forward") else "forward"

    def on_class_created(self, kind: type[nn.Module]) -> None:
        kind._zeroblock_home = self._home(kind._zeroblock.original)  # type: ignore[attr-defined]

    def _home(self, kind: type[nn.Module]) -> Any:
        """The module that defines the method, under its decorators."""
        return sys.modules.get(inspect.unwrap(getattr(kind, self.entry(kind))).__module__)

    def _no_attention(self, block: nn.Module) -> Obstacle | None:
        wanted = "attention" if _inner(block) is None else "apply_rope"
        found = callable(getattr(self._home(type(block)), wanted, None))
        return None if found else Obstacle(Reason.VARIANT, f"the module of its class has no {wanted}")

    def _rotary(self, block: Any, tokens: int) -> Tensor:
        """For a proof: the rotations that pe holds, of every pair of a head's features."""
        angles = torch.randn(1, tokens, _width(block) // block.num_heads // 2)
        cos, sin = angles.cos(), angles.sin()
        pe = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
        return pe.unsqueeze(1 if _inner(block) is None else 2)


def _width(block: Any) -> int:
    return block.hidden_size


def _is_known(x: Tensor, vec: Tensor, pe: Any, others: tuple[Any, ...]) -> bool:
    """No argument of a fork's own is given; copies differ in what they do to float16, which some clip."""
    given = any(value is not None for value in others)
    return not given and x.dim() == 3 and vec.dim() == 2 and isinstance(pe, Tensor) and x.dtype != torch.float16


def _vectors(modulation: Any) -> adaln.Vectors:
    """shift, scale and gate, [B, D]"""
    return tuple(t.squeeze(1) for t in (modulation.shift, modulation.scale, modulation.gate))


def _inner(block: Any) -> nn.Module | None:
    """The attention, where it is a module of the block: it has the heads after the tokens."""
    return block._modules.get("inner_attention")


def _heads(block: Any, qkv: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of each head."""
    B, T, width = qkv.shape
    order = (2, 0, 3, 1, 4) if _inner(block) is None else (2, 0, 1, 3, 4)
    heads = block.num_heads
    q, k, v = qkv.view(B, T, 3, heads, width // (3 * heads)).permute(order).unbind(0)
    q, k = norm(q, k, v)
    return q, k, v


def _attention(block: Any, q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """[B, T, D], the heads side by side"""
    home, inner = type(block)._zeroblock_home, _inner(block)
    if inner is None:
        fields = block.__dict__
        return home.attention(q, k, v, pe=pe, **{n: fields[n] for n in _OPTIONS if n in fields})
    q, k = home.apply_rope(q, k, pe)
    return inner(q, k, v, is_causal=False).flatten(2)


@register
class DoubleStreamBlock(_Attending, TwoStreams):
    """img + gate * proj(attn), then img + gate * mlp(modulate(norm2 img)), and txt likewise; one joint attention

    The two-stream block of Flux. Source: `DoubleStreamBlock` of black-forest-labs/flux, pytorch/torchtitan,
    kohya-ss/sd-scripts and musubi-tuner (FLUX.1). float16 and a fork's own arguments (masks) go to the original.
    Use: zb.accelerate(model), before torch.compile; checkpointing stays in charge, attention is the author's.
    Inference: attention is not run while the gates of both streams are zero, an MLP not while its own is.
    Training forward while the gates are zero: attention and MLP run once, without a graph.
    Training backward while zero: the gates' gradients alone; the rest are zeros.
    """

    name = "DoubleStreamBlock"
    classes = ("DoubleStreamBlock",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        parts = ("mod.lin", "norm1", "attn.qkv", "attn.norm", "attn.proj", "norm2", "mlp.2")
        missing = lacks(block, "num_heads", "hidden_size", *(f"{s}_{part}" for s in ("img", "txt") for part in parts))
        return missing or self._no_attention(block)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        img, txt = block.img_mod.lin, block.txt_mod.lin
        return {
            "attn": gate_rows(img, 6, 2) + gate_rows(txt, 6, 2),
            "img_mlp": gate_rows(img, 6, 5),
            "txt_mlp": gate_rows(txt, 6, 5),
        }

    def example(self, block: Any, side: int) -> tuple:
        D = _width(block)
        pe = self._rotary(block, 3 + side**2)
        return torch.randn(2, side**2, D), torch.randn(2, 3, D), torch.randn(2, D), pe

    def forward(
        self, block: Any, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        if not _is_known(img, vec, pe, (*rest, *named.values())) or txt.dim() != 3:
            return self.eager(block, img, txt, vec, pe, *rest, **named)
        shift, scale, gate, *img_mlp = _both(block.img_mod(vec))
        txt_shift, txt_scale, txt_gate, *txt_mlp = _both(block.txt_mod(vec))
        T = txt.shape[1]

        def attend(
            img: Tensor, shift: Tensor, scale: Tensor, txt: Tensor, txt_shift: Tensor, txt_scale: Tensor, pe: Tensor
        ) -> tuple[Tensor, Tensor]:
            a, b = block.txt_attn, block.img_attn
            qkv = modulated_linear(block.img_norm1, img, shift, scale, b.qkv)
            txt_qkv = modulated_linear(block.txt_norm1, txt, txt_shift, txt_scale, a.qkv)
            streams = zip(_heads(block, txt_qkv, a.norm), _heads(block, qkv, b.norm), strict=True)
            q, k, v = (torch.cat(pair, dim=2 if _inner(block) is None else 1) for pair in streams)
            h = _attention(block, q, k, v, pe)
            return h[:, T:], h[:, :T]

        img, txt = self.attended(
            attend,
            img,
            txt,
            (gate, txt_gate),
            (img, shift, scale, txt, txt_shift, txt_scale, pe),
            _attention_modules(block),
            (block.img_attn.proj, block.txt_attn.proj),
        )
        img = feed_forward(self, block.img_mlp, block.img_norm2, img, *img_mlp)
        return img, feed_forward(self, block.txt_mlp, block.txt_norm2, txt, *txt_mlp)


def _both(modulations: Any) -> adaln.Vectors:
    """shift, scale and gate of attention, then of the MLP"""
    first, second = modulations
    return *_vectors(first), *_vectors(second)


def _attention_modules(block: Any) -> tuple[nn.Module, ...]:
    streams = ((block.img_norm1, block.img_attn), (block.txt_norm1, block.txt_attn))
    modules = tuple(m for norm, attn in streams for m in (norm, attn.qkv, attn.norm))
    inner = _inner(block)
    return modules if inner is None else (*modules, inner)


@register
class SingleStreamBlock(_Attending):
    """x + gate * linear2([attn, gelu(mlp)]), attn and mlp of linear1(modulate(norm x)); x both streams as one

    The one-stream block of Flux. Source: `SingleStreamBlock` of black-forest-labs/flux, pytorch/torchtitan,
    kohya-ss/sd-scripts and musubi-tuner (FLUX.1). float16 and a fork's own arguments (masks) go to the original.
    Use: zb.accelerate(model), before torch.compile; checkpointing stays in charge, attention is the author's.
    Inference while the gate or linear2 is zero: nothing else is run; with zero gate rows in modulation.lin nothing is.
    Training forward while zero: norm, linear1, attention and activation run once, without a graph.
    Training backward while zero: the gate's (or linear2's) gradient alone; the rest are zeros.
    """

    name = "SingleStreamBlock"
    classes = ("SingleStreamBlock",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        parts = ("num_heads", "hidden_size", "modulation.lin", "pre_norm", "linear1", "norm", "mlp_act", "linear2")
        return lacks(block, *parts) or self._no_attention(block)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        linear2 = block.linear2
        return {"gate": gate_rows(block.modulation.lin, 3, 2), "linear2": zeroing_tensors(linear2, linear2.weight)}

    def example(self, block: Any, side: int) -> tuple:
        D, T = _width(block), side**2
        return torch.randn(2, T, D), torch.randn(2, D), self._rotary(block, T)

    def forward(self, block: Any, x: Tensor, vec: Tensor, pe: Tensor, *rest: Any, **named: Any) -> Tensor:
        if not _is_known(x, vec, pe, (*rest, *named.values())):
            return self.eager(block, x, vec, pe, *rest, **named)
        if not block.training and not is_compiling() and not may_grow(x, (vec,)):
            linear, bypassed = block.modulation.lin, block.children()
            y = copy_if_gates_are_zero(self.name, self.zero_skip, x, linear, bypassed, 3, (2,))
            if y is not None:
                return y
        modulation, _ = block.modulation(vec)
        shift, scale, gate = _vectors(modulation)

        def before_last(x: Tensor, shift: Tensor, scale: Tensor, pe: Tensor) -> Tensor:
            D = x.shape[-1]
            h = modulated_linear(block.pre_norm, x, shift, scale, block.linear1)
            attn = _attention(block, *_heads(block, h[..., : 3 * D], block.norm), pe)
            return joined((attn, block.mlp_act(h[..., 3 * D :])), dim=2)

        inner = _inner(block)
        modules = (block.pre_norm, block.linear1, block.norm, block.mlp_act, *(() if inner is None else (inner,)))
        return gated_projection(self, x, gate, before_last, (x, shift, scale, pe), block.linear2, *modules)


@register
class LastLayer(FinalLayer):
    """linear(norm_final(x) * (1 + scale) + shift), (shift, scale) = adaLN_modulation(vec)

    Flux's final layer, DiT's under another name. Source: `LastLayer` of black-forest-labs/flux, pytorch/torchtitan,
    kohya-ss/sd-scripts and musubi-tuner. Where x, vec and weights differ in dtype, the original runs: some copies cast.
    Use: zb.accelerate(model).
    Inference: while linear is zero the result is its bias; norm, modulation and linear are skipped.
    Training forward: linear is skipped; norm and modulation run for its gradient.
    Training backward: only linear's gradients are computed, the others are exact zeros.
    """

    name = "LastLayer"
    classes = ("LastLayer",)

    def forward(self, block: Any, x: Tensor, vec: Tensor) -> Tensor:  # type: ignore[override]
        if not x.dtype == vec.dtype == block.linear.weight.dtype:
            return self.eager(block, x, vec)
        return super().forward(block, x, vec)
