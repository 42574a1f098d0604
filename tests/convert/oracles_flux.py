"""Flux's blocks as black-forest-labs and those who copied them have them, written down from their descriptions.

Class, attribute, parameter and function names are theirs, since blocks and their attention are found by them.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

D, HEADS, WIDER = 16, 2, 40
TEXT = 3


def apply_rope(q, k, pe):
    """Pairs of features, rotated by the matrices pe[..., 2, 2]."""

    def rotated(t):
        pairs = t.to(torch.promote_types(t.dtype, torch.float32)).unflatten(-1, (-1, 1, 2))
        return (pe * pairs).sum(-1).flatten(-2).type_as(t)

    return rotated(q), rotated(k)


def attention(q, k, v, pe, attn_mask=None, attn_mode="torch", split_attn=False):
    assert attn_mode == "torch" and not split_attn
    q, k = apply_rope(q, k, pe)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2)


def rotations(tokens, dim=1, seed=5):
    """pe for some tokens; `dim` is where the heads are."""
    angles = torch.randn(1, tokens, D // HEADS // 2, generator=torch.Generator().manual_seed(seed))
    rows = [torch.stack(row, -1) for row in ((angles.cos(), -angles.sin()), (angles.sin(), angles.cos()))]
    return torch.stack(rows, -2).unsqueeze(dim)


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        return (h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * self.scale


class QKNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, q, k, v):
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(D, 3 * D, bias=bias), QKNorm(D // HEADS), nn.Linear(D, D)


@dataclasses.dataclass
class Vectors:
    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


class Modulation(nn.Module):
    def __init__(self, double):
        super().__init__()
        self.lin, self.double = nn.Linear(D, (6 if double else 3) * D), double

    def forward(self, vec):
        vectors = self.lin(F.silu(vec))[:, None].split(D, dim=-1)
        return Vectors(*vectors[:3]), Vectors(*vectors[3:]) if self.double else None


def layer_norm():
    return nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)


def modulated(norm, x, mod):
    return (1 + mod.scale) * norm(x) + mod.shift


class DoubleStreamBlock(nn.Module):
    heads_dim = 1

    def __init__(self, qkv_bias=True):
        super().__init__()
        self.hidden_size, self.num_heads = D, HEADS
        for name in ("img", "txt"):
            parts = {
                "mod": Modulation(True),
                "norm1": layer_norm(),
                "attn": SelfAttention(qkv_bias),
                "norm2": layer_norm(),
                "mlp": nn.Sequential(nn.Linear(D, WIDER), nn.GELU(approximate="tanh"), nn.Linear(WIDER, D)),
            }
            for part, module in parts.items():
                setattr(self, f"{name}_{part}", module)

    def attend(self, q, k, v, pe):
        return attention(q, k, v, pe=pe)

    def gated(self, x, gate, branch):
        return x + gate * branch

    def heads(self, qkv):
        t = qkv.unflatten(-1, (3, HEADS, -1)).unbind(2)
        return [h.transpose(1, 2) if self.heads_dim == 1 else h for h in t]

    def forward(self, img, txt, vec, pe):
        streams = {"txt": txt, "img": img}
        mods = {name: getattr(self, f"{name}_mod")(vec) for name in streams}
        joint = []
        for name, x in streams.items():
            attn = getattr(self, f"{name}_attn")
            q, k, v = self.heads(attn.qkv(modulated(getattr(self, f"{name}_norm1"), x, mods[name][0])))
            joint.append((*attn.norm(q, k, v), v))
        q, k, v = (torch.cat(pair, dim=3 - self.heads_dim) for pair in zip(*joint, strict=True))
        h = self.attend(q, k, v, pe)
        out = {}
        for name, part in zip(streams, (h[:, : txt.shape[1]], h[:, txt.shape[1] :]), strict=True):
            first, second = mods[name]
            x = self.gated(streams[name], first.gate, getattr(self, f"{name}_attn").proj(part))
            mlp = getattr(self, f"{name}_mlp")(modulated(getattr(self, f"{name}_norm2"), x, second))
            out[name] = self.gated(x, second.gate, mlp)
        return out["img"], out["txt"]


class SingleStreamBlock(nn.Module):
    heads_dim = 1

    def __init__(self):
        super().__init__()
        self.hidden_size, self.num_heads = D, HEADS
        self.linear1, self.linear2 = nn.Linear(D, 3 * D + WIDER), nn.Linear(D + WIDER, D)
        self.norm, self.pre_norm = QKNorm(D // HEADS), layer_norm()
        self.mlp_act, self.modulation = nn.GELU(approximate="tanh"), Modulation(False)

    attend, gated, heads = DoubleStreamBlock.attend, DoubleStreamBlock.gated, DoubleStreamBlock.heads

    def forward(self, x, vec, pe):
        mod, _ = self.modulation(vec)
        qkv, mlp = self.linear1(modulated(self.pre_norm, x, mod)).split([3 * D, WIDER], dim=-1)
        q, k, v = self.heads(qkv)
        q, k = self.norm(q, k, v)
        h = self.attend(q, k, v, pe)
        return self.gated(x, mod.gate, self.linear2(torch.cat((h, self.mlp_act(mlp)), 2)))


class LastLayer(nn.Module):
    def __init__(self, out_features=6):
        super().__init__()
        self.norm_final, self.linear = layer_norm(), nn.Linear(D, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear((1 + scale) * self.norm_final(x) + shift)


# ---- kohya's trainers: an inner method under checkpointing, a mask, addcmul ------------------------------------------


class Checkpointed:
    """Goes before a block: its forward becomes the inner method."""

    gradient_checkpointing = False
    attn_mode, split_attn = "torch", False

    def _forward(self, *args):
        *args, self.mask = args
        return super().forward(*args)

    def forward(self, *args):
        args = args if len(args) == self.most else (*args, None)
        if self.training and self.gradient_checkpointing:
            return checkpoint(self._forward, *args, use_reentrant=False)
        return self._forward(*args)

    def attend(self, q, k, v, pe):
        return attention(q, k, v, pe, self.mask, self.attn_mode, self.split_attn)

    def gated(self, x, gate, branch):
        return torch.addcmul(x, gate, branch)


class CheckpointedDouble(Checkpointed, DoubleStreamBlock):
    most = 5

    def _forward(self, img, txt, vec, pe, mask=None):
        return super()._forward(img, txt, vec, pe, mask)


class CheckpointedSingle(Checkpointed, SingleStreamBlock):
    most = 4

    def _forward(self, x, vec, pe, mask=None):
        return super()._forward(x, vec, pe, mask)


# ---- torchtitan: attention is a module, heads after tokens -----------------------------------------------------------


class InnerAttention(nn.Module):
    def forward(self, q, k, v, is_causal=True):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)


class WithInner:
    heads_dim = 2

    def __init__(self):
        super().__init__()
        self.inner_attention = InnerAttention()

    def attend(self, q, k, v, pe):
        return self.inner_attention(*apply_rope(q, k, pe), v, is_causal=False).flatten(2)


class DoubleWithInner(WithInner, DoubleStreamBlock):
    pass


class SingleWithInner(WithInner, SingleStreamBlock):
    pass


# ---- forks that compute something else -------------------------------------------------------------------------------


class TwiceGated(DoubleStreamBlock):
    def gated(self, x, gate, branch):
        return x + gate * gate * branch


class Relu(SingleStreamBlock):
    def forward(self, x, vec, pe):
        return super().forward(x, vec, pe).relu()


class Distilled(SingleStreamBlock):
    """Chroma: the modulation comes from elsewhere."""

    def __init__(self):
        super().__init__()
        del self.modulation


for _double in (CheckpointedDouble, DoubleWithInner, TwiceGated):
    _double.__name__ = "DoubleStreamBlock"
for _single in (CheckpointedSingle, SingleWithInner, Relu, Distilled):
    _single.__name__ = "SingleStreamBlock"
