"""Transformer blocks of Wan, LTX-Video and latent diffusion as their authors have them, written down from their
descriptions. Class, attribute and parameter names are theirs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .oracles_gated import HEADS, D, modulated

TEXT = 3


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Attends(nn.Module):
    """To a context, or to itself."""

    def __init__(self, context_dim=D):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(D, D), nn.Linear(context_dim, D), nn.Linear(context_dim, D)
        self.to_out = nn.Linear(D, D)

    def attend(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
        return self.to_out(h.transpose(1, 2).flatten(2))

    def forward(self, x, context=None):
        return self.attend(x, context)


# ---- Wan -------------------------------------------------------------------------------------------------------------


class WanLayerNorm(nn.LayerNorm):
    def __init__(self, dim, affine=False):
        super().__init__(dim, elementwise_affine=affine, eps=1e-6)

    def forward(self, x):
        return super().forward(wide(x)).type_as(x)


class WanSelfAttention(Attends):
    """Where it is published it needs a GPU."""

    on_gpu = False

    def forward(self, x, seq_lens, grid_sizes, freqs):
        assert not self.on_gpu
        return self.attend(x.to(self.to_q.weight.dtype))


class WanCrossAttention(Attends):
    def forward(self, x, context, context_lens):
        return self.attend(x.to(self.to_q.weight.dtype), context)


class WanAttentionBlock(nn.Module):
    """Six vectors of the timestep and of a table; 2.1: of each sample, 2.2: of each token. Float32 from the first gate
    on."""

    version = "2.1"

    def __init__(self, cross_attn_norm=True):
        super().__init__()
        self.norm1, self.self_attn = WanLayerNorm(D), WanSelfAttention()
        self.norm3 = WanLayerNorm(D, True) if cross_attn_norm else nn.Identity()
        self.cross_attn, self.norm2 = WanCrossAttention(), WanLayerNorm(D)
        self.ffn = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(approximate="tanh"), nn.Linear(2 * D, D))
        self.modulation = nn.Parameter(torch.randn(1, 6, D) / D**0.5)

    def stored(self, x, like):
        return x

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        assert e.dtype in (torch.float32, torch.float64)
        like = x
        table = self.modulation if self.version == "2.1" else self.modulation[None]
        e = (wide(table) + e).chunk(6, dim=1 if self.version == "2.1" else 2)
        e = e if self.version == "2.1" else [t.squeeze(2) for t in e]
        h = self.stored(modulated(wide(self.norm1(x)), *e[:2]), like)
        x = self.stored(x + self.self_attn(h, seq_lens, grid_sizes, freqs) * e[2], like)
        x = x + self.cross_attn(self.norm3(x), context, context_lens)
        h = self.stored(modulated(wide(self.norm2(x)), *e[3:5]), like)
        return self.stored(x + self.ffn(h) * e[5], like)


class Wan22AttentionBlock(WanAttentionBlock):
    version = "2.2"


class TrainedWanBlock(WanAttentionBlock):
    """A trainer's: the stream keeps its dtype, forward checkpoints."""

    def __init__(self, model_version="2.1"):
        super().__init__()
        self.version = self.model_version = model_version

    def stored(self, x, like):
        return x.to(like.dtype)

    def _forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        return super().forward(x, e, seq_lens, grid_sizes, freqs, context, context_lens)

    def forward(self, *args):
        return self._forward(*args)


class Head(nn.Module):
    version = "2.1"

    def __init__(self):
        super().__init__()
        self.norm, self.head = WanLayerNorm(D), nn.Linear(D, 6)
        self.modulation = nn.Parameter(torch.randn(1, 2, D) / D**0.5)

    def forward(self, x, e):
        e = e[:, None] if self.version == "2.1" else e
        shift, scale = (t + e for t in self.modulation[0])
        return self.head(modulated(self.norm(x), shift, scale))


class Wan22Head(Head):
    version = "2.2"


Wan22AttentionBlock.__name__ = TrainedWanBlock.__name__ = "WanAttentionBlock"
Wan22Head.__name__ = "Head"

# ---- LTX-Video, latent diffusion -------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, dim, affine=True, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x):
        h = wide(x)
        h = (h * (h.square().mean(-1, keepdim=True) + self.eps).rsqrt()).type_as(x)
        return h if self.weight is None else h * self.weight


class LTXAttention(Attends):
    def forward(
        self,
        hidden_states,
        freqs_cis=None,
        encoder_hidden_states=None,
        attention_mask=None,
        skip_layer_mask=None,
        skip_layer_strategy=None,
    ):
        h = hidden_states if freqs_cis is None else hidden_states * freqs_cis[0]
        return self.attend(h, encoder_hidden_states, None if attention_mask is None else attention_mask[:, None])


class LTXBlock(nn.Module):
    def __init__(self, adaptive_norm="single_scale_shift"):
        super().__init__()
        self.adaptive_norm, self.only_cross_attention, self._chunk_size = adaptive_norm, False, None
        self.norm1, self.attn1, self.attn2 = RMSNorm(D, False), LTXAttention(), LTXAttention(12)
        self.norm2, self.ff = RMSNorm(D, False), nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)

    def forward(
        self,
        hidden_states,
        freqs_cis=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep=None,
        cross_attention_kwargs=None,
        class_labels=None,
        skip_layer_mask=None,
        skip_layer_strategy=None,
    ):
        x = before = hidden_states
        rows = (self.scale_shift_table + timestep.unflatten(-1, (6, -1))).unbind(2)
        own = {"freqs_cis": freqs_cis, "attention_mask": attention_mask, "skip_layer_strategy": skip_layer_strategy}
        cross = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        x = x + rows[2] * self.attn1(modulated(self.norm1(x), *rows[:2]), skip_layer_mask=skip_layer_mask, **own)
        x = x + self.attn2(x, freqs_cis=freqs_cis, **cross)
        x = x + rows[5] * self.ff(modulated(self.norm2(x), *rows[3:5]))
        return x if skip_layer_mask is None else torch.lerp(before, x, skip_layer_mask.view(-1, 1, 1))


class LDMBlock(nn.Module):
    """Without modulation or gates; forward checkpoints."""

    def __init__(self, disable_self_attn=False):
        super().__init__()
        self.checkpoint, self.disable_self_attn = False, disable_self_attn
        self.attn1, self.attn2 = Attends(12 if disable_self_attn else D), Attends(12)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(D) for _ in range(3))
        self.ff = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x, context=None):
        return self._forward(x=x, context=context)

    def _forward(self, x, context=None):
        x = self.attn1(self.norm1(x), context=context if self.disable_self_attn else None) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


LTXBlock.__name__ = LDMBlock.__name__ = "BasicTransformerBlock"
