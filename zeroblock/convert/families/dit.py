"""facebookresearch/DiT and what was built on it: willisma/SiT, chuanyangjin/fast-DiT."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ... import functional
from ...blocks import adaln
from ...blocks.broadcast import add_gated, tokens_and_condition
from ...blocks.decision import bypassable
from ...blocks.layers import SILUS, Forwards, computes, is_plain_linear, is_plain_norm
from ...blocks.one_pass import copy_if_gates_are_zero
from ...blocks.residual import residual_branch
from ...plan.mode import rounds_as_eager
from .. import seam
from ..family import Family, lacks, register
from ..report import Obstacle, Reason
from .adaln import gate_rows, zeroing_tensors

_NOT_PLAIN = Obstacle(Reason.LAYERS, "its norms or linear layers are not the plain ones the fused ops take")


# The forwards of timm's classes that were proved.
_ATTENTIONS: Forwards = {}
_MLPS: Forwards = {}
_MLP_NAMES = ("Mlp", "FFN")
_GELUS: Forwards = {nn.GELU.forward: None}


def inactive(dropout: Any) -> bool:
    """Dropout that does nothing now."""
    return isinstance(dropout, nn.Identity) or isinstance(dropout, nn.Dropout) and not (dropout.training and dropout.p)


class _Modulated(Family):
    """What blocks and final layers share: plain norms, and the attributes they are known by."""

    parts: tuple[str, ...]

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, *self.parts)
        return missing or (None if self._fits(block) else _NOT_PLAIN)

    def _fits(self, block: Any) -> bool:
        raise NotImplementedError


_PARTS = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")


@register
class DiTBlock(_Modulated):
    """x = x + gate_msa * attn(modulate(norm1 x)), then x + gate_mlp * mlp(modulate(norm2 x)); adaLN zero at the start.

    Source: facebookresearch/DiT `models.DiTBlock`, SiT, fast-DiT; timm's Attention and Mlp.
    Use: zb.accelerate(model). torch.utils.checkpoint around the block works as before.
    Inference: while the gates' rows of adaLN_modulation are zero the block returns a copy of x.
    Training forward: attention and mlp run once without a graph, for the gradient of the gates; their last linear not,
    when it is itself zero.
    Training backward: only adaLN_modulation's gate rows get a gradient, everything else is exact zeros.
    """

    name = "DiTBlock"
    eager_rounding = True
    remakes = True
    classes = ("DiTBlock", "SiTBlock")
    parts: tuple[str, ...] = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation.1")

    def _fits(self, block: Any) -> bool:
        parts = block._modules  # spares the walk through nn.Module's attributes
        one, two = parts.get("norm1"), parts.get("norm2")
        return is_plain_norm(one) and is_plain_norm(two) and bypassable((one, two))

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        linear = block.adaLN_modulation[-1]
        attn, mlp = (gate_rows(linear, adaln.CHUNKS, gate) for gate in adaln.GATES)
        return {"attn": attn, "mlp": mlp}

    def example(self, block: Any, side: int) -> tuple:
        D = block.adaLN_modulation[-1].in_features
        return torch.randn(2, side**2, D), torch.randn(2, D)

    def forward(self, block: Any, x: Tensor, c: Tensor) -> Tensor:
        if x.dim() != 3 or c.dim() != 2 or not self._fits(block):
            return self.eager(block, x, c)
        given = x, c
        x, c = tokens_and_condition(x, c)
        parts = block._modules
        norm1, attn, norm2, mlp, modulation = [parts[name] for name in _PARTS]
        if not block.training and not is_compiling():
            last = modulation[-1]
            y = copy_if_gates_are_zero(self.name, self.zero_skip, x, last, block.children(), adaln.CHUNKS, adaln.GATES)
            if y is not None:
                return y
        seams = seam.possible(x)
        prepared = seam.taken(block, given, {}) if seams else None
        if prepared is not None and prepared.streams[0]() is not x:
            prepared = None
        vectors = modulation(c).chunk(adaln.CHUNKS, dim=1) if prepared is None else prepared.rows
        of_attn, of_mlp = vectors[adaln.MSA], vectors[adaln.MLP]
        attention_half, last_half = _attention_half(norm1, attn), mlp_half(norm2, mlp)
        if last_half is None:
            x = self._half(x, of_attn, norm1, attn, attention_half)
            return self._half(x, of_mlp, norm2, mlp, None)
        normed = None if prepared is None else prepared.normed[0]
        following = seam.following(block) if seams else None
        after = None
        if following is not None:
            after = adaln.Next(lambda: self._first_norm(following, c), [])
        name, policy = self.name, self.zero_skip
        if attention_half is not None:
            y = adaln.forward(name, policy, x, vectors, attention_half, last_half, normed, after)
        else:
            shift, scale, gate = of_attn
            whole = adaln.Whole(_modulated(norm1, attn), (x, shift, scale), (attn,))
            if normed is not None:
                whole = adaln.Whole(attn, (normed,), (attn,))
            y = adaln.forward_around(name, policy, x, gate, whole, of_mlp, last_half, after)
        if seams:
            prepared = None
            if after is not None and after.found:
                h, rows = after.found[0]
                prepared = seam.Prepared(rows, (h,), (weakref.ref(y),))
            seam.leave(block, given, {}, (y,), prepared)
        return y

    def _first_norm(self, block: Any, c: Tensor) -> tuple[float, adaln.Vectors] | None:
        if not self._fits(block):
            return None
        parts = block._modules
        return parts["norm1"].eps, parts["adaLN_modulation"](c).chunk(adaln.CHUNKS, dim=1)

    def _half(self, x: Tensor, vectors: adaln.Vectors, norm: Any, layer: nn.Module, half: adaln.Half | None) -> Tensor:
        """x + gate * layer(modulate(norm x)); half None: the layer is called as a whole."""
        if half is not None:
            return adaln.half(self.name, self.zero_skip, x, vectors, half)
        shift, scale, gate = vectors
        body = _modulated(norm, layer)
        _, y = residual_branch(self.name, self.zero_skip, x, body, None, gate, (x, shift, scale), modules=(layer,))
        return add_gated(x, gate, body(x, shift, scale), tokens=True) if y is None else y


def _modulated(norm: Any, layer: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """layer(modulate(norm x)) as a function of x, shift and scale"""

    rounding = "eager" if rounds_as_eager() else "once"

    def body(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer(functional.layer_norm_modulate(x, shift, scale, eps=norm.eps, rounding=rounding))

    return body


def _attention_half(norm: Any, attn: Any) -> adaln.Half | None:
    """timm's Attention by its layers; None: it is to be called as a whole."""
    parts = attn._modules
    if rounds_as_eager():
        return None
    if type(attn).__name__ != "Attention" or not hasattr(attn, "num_heads"):
        return None
    if "qkv" not in parts or "proj" not in parts or "attn_drop" not in parts or "proj_drop" not in parts:
        return None
    first, last = parts["qkv"], parts["proj"]
    plain = is_plain_linear(first) and is_plain_linear(last) and computes(attn, _ATTENTIONS)
    between = [m for name, m in parts.items() if m is not None and name not in ("qkv", "proj")]
    q_norm, k_norm = parts.get("q_norm"), parts.get("k_norm")
    known = all(inactive(m) or m in (q_norm, k_norm) for m in between)
    if not (plain and known and bypassable((attn,))):
        return None

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = q if q_norm is None else q_norm(q)
        k = k if k_norm is None else k_norm(k)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    norms = tuple(m for m in (q_norm, k_norm) if m is not None)
    return adaln.Half(norm.eps, first, attend, last, norms)


def mlp_half(norm: Any, mlp: Any) -> adaln.Half | None:
    """timm's Mlp (VAR's FFN) by its layers; None: it is to be called as a whole."""
    parts = mlp._modules
    if type(mlp).__name__ not in _MLP_NAMES or "fc1" not in parts or "act" not in parts or "fc2" not in parts:
        return None
    if not is_plain_norm(norm) or rounds_as_eager():
        return None
    act, first, last = parts["act"], parts["fc1"], parts["fc2"]
    if type(act) not in (nn.GELU, nn.SiLU):
        return None
    rest = [m for name, m in parts.items() if m is not None and name not in ("fc1", "act", "fc2")]
    silu = type(act) is nn.SiLU
    plain = is_plain_linear(first) and is_plain_linear(last)
    plain = plain and computes(mlp, _MLPS) and computes(act, SILUS if silu else _GELUS)
    if not (plain and all(map(inactive, rest)) and bypassable((mlp,))):
        return None
    gelu = "gelu_tanh" if getattr(act, "approximate", None) == "tanh" else "gelu"
    return adaln.Half(norm.eps, first, "silu" if silu else gelu, last)


@register
class FinalLayer(_Modulated):
    """linear(norm_final(x) * (1 + scale) + shift), both linears zero at the start.

    Source: facebookresearch/DiT `models.FinalLayer`, SiT, fast-DiT.
    Use: zb.accelerate(model).
    Inference: while linear is zero the result is its bias; norm, modulation and linear are skipped.
    Training forward: linear is skipped; norm and modulation run for its gradient.
    Training backward: only linear's gradients are computed, the others are exact zeros.
    """

    name = "FinalLayer"
    eager_rounding = True
    classes = ("FinalLayer",)
    parts: tuple[str, ...] = ("norm_final", "linear", "adaLN_modulation.1")

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        obstacle, modulation = super().match(block, path, root), getattr(block, "adaLN_modulation", None)
        if obstacle is not None or modulation is None:
            return obstacle
        vectors = modulation[-1].out_features // block.linear.in_features
        said = f"its adaLN_modulation gives {vectors} vectors, not 2"
        return None if vectors == 2 else Obstacle(Reason.NAMESAKE, said)

    def _fits(self, block: Any) -> bool:
        norm, linear = block.norm_final, block.linear
        return is_plain_norm(norm) and is_plain_linear(linear) and bypassable((norm, linear))

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"linear": zeroing_tensors(block.linear, block.linear.weight)}

    def example(self, block: Any, side: int) -> tuple:
        linear = block.adaLN_modulation[-1]
        return torch.randn(2, side**2, block.linear.in_features), torch.randn(2, linear.in_features)

    def forward(self, block: Any, x: Tensor, c: Tensor) -> Tensor:
        if x.dim() != 3 or c.dim() != 2 or not self._fits(block):
            return self.eager(block, x, c)
        x, c = tokens_and_condition(x, c)
        modulation, eps = block.adaLN_modulation, block.norm_final.eps

        def vectors(c: Tensor) -> tuple[Tensor, ...]:
            return modulation(c).chunk(2, dim=1)

        return adaln.final_layer(self.name, self.zero_skip, (x, c), eps, vectors, block.linear, (modulation,))
