"""HunyuanVideo's blocks (its own code, and trainers' copies of it and of 1.5) and HunyuanDiT's, written down from their
descriptions. Class, attribute, parameter and function names are theirs, since blocks and their attention are found by
them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .oracles_gated import HEADS, D, layer_norm, modulated
from .oracles_gated import Mlp as Tanh

TEXT = 3


def attention(
    q, k=None, v=None, mode="flash", attn_mask=None, total_len=None, attn_params=None, batch_size=1, **lengths
):
    """[B, T, heads, features] of each, or a list of all three (trainers'); [B, T, D]"""
    q, k, v = (t.transpose(1, 2) for t in (q if isinstance(q, list) else (q, k, v)))
    if mode == "flash" and attn_params is None:
        assert lengths["cu_seqlens_q"].shape[0] == 2 * batch_size + 1
    if total_len is not None:
        attn_mask = (torch.arange(k.shape[2]) < total_len[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2)


def apply_rotary_emb(q, k, freqs_cis, head_first=False):
    assert not head_first
    cos, sin = (t[:, None] for t in freqs_cis)

    def rotated(t):
        even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
        return t * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin

    return rotated(q), rotated(k)


class ModulateDiT(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.act, self.linear = nn.SiLU(), nn.Linear(D, factor * D)

    def forward(self, x):
        return self.linear(self.act(x))[:, None]


class MLP(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(D, 2 * D), act, nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(2 * D, D), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def heads(qkv):
    return qkv.unflatten(-1, (3, HEADS, -1)).unbind(2)


def named(q, kv, most, most_kv):
    return {"cu_seqlens_q": q, "cu_seqlens_kv": kv, "max_seqlen_q": most, "max_seqlen_kv": most_kv}


class MMDoubleStreamBlock(nn.Module):
    """Like Flux's, the text behind the image."""

    def __init__(self, apart=False):
        super().__init__()
        self.heads_num, self.hybrid_seq_parallel_attn = HEADS, None
        for name in ("img", "txt"):
            qkv = {f"attn_{i}": nn.Linear(D, D) for i in "qkv"} if apart else {"attn_qkv": nn.Linear(D, 3 * D)}
            norms = {f"attn_{i}_norm": nn.RMSNorm(D // HEADS, eps=1e-6) for i in "qk"}
            parts = {"mod": ModulateDiT(6), "norm1": layer_norm(), **qkv, **norms, "attn_proj": nn.Linear(D, D)}
            parts |= {"norm2": layer_norm(), "mlp": MLP(nn.GELU(approximate="tanh"))}
            for part, module in parts.items():
                setattr(self, f"{name}_{part}", module)

    def compute(self, img, txt, vec, angles, attend):
        of = lambda name, part: getattr(self, f"{name}_{part}")  # noqa: E731
        streams, mods, joint = {"img": img, "txt": txt}, {}, []
        for name, x in streams.items():
            mods[name] = of(name, "mod")(vec).chunk(6, dim=-1)
            h = modulated(of(name, "norm1")(x), *mods[name][:2])
            if hasattr(self, "img_attn_q"):
                q, k, v = (of(name, f"attn_{i}")(h).unflatten(-1, (HEADS, -1)) for i in "qkv")
            else:
                q, k, v = heads(of(name, "attn_qkv")(h))
            q, k = of(name, "attn_q_norm")(q), of(name, "attn_k_norm")(k)
            if name == "img" and angles is not None:
                q, k = apply_rotary_emb(q, k, angles)
            joint.append((q, k, v))
        h = attend(*(torch.cat(pair, dim=1) for pair in zip(*joint, strict=True)))
        out = []
        for name, part in zip(streams, h.split([img.shape[1], txt.shape[1]], dim=1), strict=True):
            x = streams[name] + mods[name][2] * of(name, "attn_proj")(part)
            out.append(x + mods[name][5] * of(name, "mlp")(modulated(of(name, "norm2")(x), *mods[name][3:5])))
        return tuple(out)

    def forward(
        self,
        img,
        txt,
        vec,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        freqs_cis=None,
    ):
        lengths = named(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        attend = lambda q, k, v: attention(q, k, v, batch_size=len(q), **lengths)  # noqa: E731
        return self.compute(img, txt, vec, freqs_cis, attend)


class Double15(MMDoubleStreamBlock):
    def __init__(self):
        super().__init__(apart=True)

    def _forward(self, img, txt, vec, freqs_cis=None, attn_params=None):
        return self.compute(img, txt, vec, freqs_cis, lambda *qkv: attention([*qkv], attn_params=attn_params))

    def forward(self, *args):
        return self._forward(*args)


class MMSingleStreamBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads_num, self.hybrid_seq_parallel_attn = HEADS, None
        self.linear1, self.linear2 = nn.Linear(D, 5 * D), nn.Linear(3 * D, D)
        self.q_norm, self.k_norm, self.pre_norm = nn.RMSNorm(D // HEADS), nn.RMSNorm(D // HEADS), layer_norm()
        self.mlp_act, self.modulation = nn.GELU(approximate="tanh"), ModulateDiT(3)

    def compute(self, x, vec, txt_len, angles, attend):
        shift, scale, gate = self.modulation(vec).chunk(3, dim=-1)
        qkv, mlp = self.linear1(modulated(self.pre_norm(x), shift, scale)).split([3 * D, 2 * D], dim=-1)
        q, k, v = heads(qkv)
        q, k = self.q_norm(q), self.k_norm(k)
        img = apply_rotary_emb(q[:, :-txt_len], k[:, :-txt_len], angles)
        q, k = (torch.cat([a, t[:, -txt_len:]], dim=1) for a, t in zip(img, (q, k), strict=True))
        return x + gate * self.linear2(torch.cat([attend(q, k, v), self.mlp_act(mlp)], dim=2))

    def forward(
        self,
        x,
        vec,
        txt_len,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        freqs_cis=None,
    ):
        lengths = named(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        attend = lambda q, k, v: attention(q, k, v, batch_size=len(q), **lengths)  # noqa: E731
        return self.compute(x, vec, txt_len, freqs_cis, attend)


class Trained:
    """Goes before a block: a trainer's, with a mode of attention, and a list for it; forward checkpoints."""

    attn_mode = "torch"

    def trained(self, mask, total, *lengths):
        more = {"mode": self.attn_mode, "attn_mask": mask, "total_len": total} | named(*lengths)
        return lambda *qkv: attention([*qkv], batch_size=len(qkv[0]), **more)

    def forward(self, *args):
        return self._forward(*args)


class TrainedDouble(Trained, MMDoubleStreamBlock):
    def _forward(
        self,
        img,
        txt,
        vec,
        attn_mask=None,
        total_len=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        freqs_cis=None,
    ):
        given = (attn_mask, total_len, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        return self.compute(img, txt, vec, freqs_cis, self.trained(*given))


class TrainedSingle(Trained, MMSingleStreamBlock):
    def _forward(
        self,
        x,
        vec,
        txt_len,
        attn_mask=None,
        total_len=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        freqs_cis=None,
    ):
        given = (attn_mask, total_len, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        return self.compute(x, vec, txt_len, freqs_cis, self.trained(*given))


class IndividualTokenRefinerBlock(nn.Module):
    """Two gates, norms with parameters."""

    def __init__(self):
        super().__init__()
        self.heads_num, self.norm1, self.norm2, self.mlp = HEADS, layer_norm(True), layer_norm(True), MLP(nn.SiLU())
        self.self_attn_qkv, self.self_attn_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.self_attn_q_norm = self.self_attn_k_norm = nn.Identity()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def attend(self, q, k, v, mask):
        return attention(q, k, v, mode="torch", attn_mask=mask)

    def forward(self, x, c, attn_mask=None):
        gates = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        x = x + gates[0] * self.self_attn_proj(self.attend(*heads(self.self_attn_qkv(self.norm1(x))), attn_mask))
        return x + gates[1] * self.mlp(self.norm2(x))


class Refiner15(IndividualTokenRefinerBlock):
    def attend(self, q, k, v, attn_params):
        return attention([q, k, v], attn_params=attn_params)

    def forward(self, x, c, attn_params):
        return super().forward(x, c, attn_params)


for _kind, _names in {
    "MMDoubleStreamBlock": (Double15, TrainedDouble),
    "MMSingleStreamBlock": (TrainedSingle,),
    "IndividualTokenRefinerBlock": (Refiner15,),
}.items():
    for _class in _names:
        _class.__name__ = _kind

# ---- HunyuanDiT ------------------------------------------------------------------------------------------------------


class FP32_Layernorm(nn.LayerNorm):  # noqa: N801
    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        parameters = (t.to(wide) for t in (self.weight, self.bias))
        return F.layer_norm(x.to(wide), self.normalized_shape, *parameters, self.eps).to(x.dtype)


class Rotated(nn.Module):
    """Attention to a text, or to itself; a tuple."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.kv_proj, self.out_proj = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x, y=None, *rest):
        y = x if y is None or isinstance(y, tuple) else y
        q, k, v = self.q_proj(x), *self.kv_proj(y).chunk(2, dim=-1)
        return (self.out_proj(F.scaled_dot_product_attention(q, k, v)),)


class HunYuanDiTBlock(nn.Module):
    def __init__(self, skip=False):
        super().__init__()
        norm = lambda width=D: FP32_Layernorm(width, eps=1e-6)  # noqa: E731
        self.norm1, self.attn1, self.norm2, self.mlp = norm(), Rotated(), norm(), Tanh()
        self.default_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, D))
        self.attn2, self.norm3, self.gradient_checkpointing = Rotated(), norm(), False
        self.skip_norm, self.skip_linear = (norm(2 * D), nn.Linear(2 * D, D)) if skip else (None, None)

    def _forward(
        self,
        x,
        c=None,
        text_states=None,
        img_clip_embedding=None,
        t_scale=1,
        i_scale=1,
        freq_cis_img=None,
        skip=None,
        is_ipa=False,
    ):
        if self.skip_linear is not None:
            x = self.skip_linear(self.skip_norm(torch.cat([x, skip], dim=-1)))
        x = x + self.attn1(self.norm1(x) + self.default_modulation(c)[:, None], freq_cis_img)[0]
        cross = (img_clip_embedding, t_scale, i_scale, freq_cis_img, is_ipa)
        x = x + self.attn2(self.norm3(x), text_states, *cross)[0]
        return x + self.mlp(self.norm2(x))

    def forward(self, *args, **kwargs):
        return self._forward(*args, **kwargs)
