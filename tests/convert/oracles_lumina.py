"""The blocks of Lumina 2 and Z-Image as their authors and a trainer have them, written down from their descriptions.
Class, attribute and parameter names are theirs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from .oracles_authors import Attends, RMSNorm
from .oracles_gated import HEADS, D


class Masked(Attends):
    def forward(self, x, mask, freqs_cis):
        return self.attend(x * freqs_cis.real.mean(), mask=mask[:, None, None])


class MaskedByName(Masked):
    def forward(self, hidden_states, attention_mask=None, freqs_cis=None):
        return super().forward(hidden_states, attention_mask, freqs_cis)


class MaskedByParameters(Attends):
    def forward(self, hidden_states, freqs_cis=None, attn_params=None):
        return self.attend(hidden_states * freqs_cis.real.mean())


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x, apply_fp16_downscale=False):
        return self.w2(F.silu(self.w1(x)))


class JointTransformerBlock(nn.Module):
    attention_kind = Masked

    def __init__(self, modulation=True):
        super().__init__()
        self.dim, self.head_dim, self.modulation, self.attention = D, D // HEADS, modulation, self.attention_kind()
        self.feed_forward = FeedForward()
        for name in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"):
            setattr(self, name, RMSNorm(D))
        if modulation:
            self.adaLN_modulation = self.modulations(nn.SiLU(), nn.Linear(D, 4 * D))

    def modulations(self, act, linear):
        return nn.Sequential(act, linear)

    def vectors(self, c):
        return self.adaLN_modulation(c)

    def compute(self, x, c, attend, feed):
        if not self.modulation:
            x = x + self.attention_norm2(attend(self.attention_norm1(x)))
            return x + self.ffn_norm2(feed(self.ffn_norm1(x)))
        scale, gate, scale_mlp, gate_mlp = self.vectors(c)[:, None].chunk(4, dim=-1)
        x = x + gate.tanh() * self.attention_norm2(attend(self.attention_norm1(x) * (1 + scale)))
        return x + gate_mlp.tanh() * self.ffn_norm2(feed(self.ffn_norm1(x) * (1 + scale_mlp)))

    def forward(self, x, x_mask, freqs_cis, adaln_input=None):
        return self.compute(x, adaln_input, lambda h: self.attention(h, x_mask, freqs_cis), self.feed_forward)


class ZImageTransformerBlock(JointTransformerBlock):
    attention_kind = MaskedByName

    def modulations(self, act, linear):
        return nn.ModuleList([linear])

    def vectors(self, c):
        return self.adaLN_modulation[0](c)

    def forward(self, x, attn_mask, freqs_cis, adaln_input=None):
        attend = lambda h: self.attention(h, attention_mask=attn_mask, freqs_cis=freqs_cis)  # noqa: E731
        return self.compute(x, adaln_input, attend, self.feed_forward)


class TrainedZImageBlock(ZImageTransformerBlock):
    """A trainer's: without a mask, forward checkpoints."""

    attention_kind = MaskedByParameters

    def _forward(self, x, freqs_cis, adaln_input=None, attn_params=None):
        attend = lambda h: self.attention(h, freqs_cis=freqs_cis, attn_params=attn_params)  # noqa: E731
        feed = (lambda h: self.feed_forward(h, apply_fp16_downscale=True)) if self.modulation else self.feed_forward
        return self.compute(x, adaln_input, attend, feed)

    def forward(self, *args):
        return self._forward(*args)


TrainedZImageBlock.__name__ = "ZImageTransformerBlock"
