"""Tencent/HunyuanVideo (`hyvideo/modules`), and kohya-ss/musubi-tuner's copies of it and of 1.5: Flux's blocks with the
text behind the image. Attention stays the author's: the function `attention` that the block's method calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.remade import joined
from ..family import SMALL
from .described import described
from .description import GatedBranch, Given
from .diffusers_flux import TEXT
from .stand_in import home, of_heads


def _parallel(block: Any) -> bool:
    """Its sequence is spread over several devices."""
    return bool(getattr(block, "hybrid_seq_parallel_attn", None))


def _musubis(block: Any) -> bool:
    return hasattr(block, "attn_mode")


# ---- what the copies are called with ---------------------------------------------------------------------------------


def _lengths(q: Any, kv: Any, most: Any, most_kv: Any) -> dict[str, Any]:
    return {"cu_seqlens_q": q, "cu_seqlens_kv": kv, "max_seqlen_q": most, "max_seqlen_kv": most_kv}


def _as_musubi_attends(given: Given, block: Any, attn_mask: Any, total_len: Any) -> Given:
    given.layers["attn"] |= {"attn_mask": attn_mask, "total_len": total_len, "mode": block.attn_mode}
    return given


def _two(
    block: Any,
    img: Tensor,
    txt: Tensor,
    vec: Tensor,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    freqs_cis: Any = None,
) -> Given:
    attn = _lengths(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
    return Given((img, txt), (), {"attn": attn, "angles": freqs_cis})


def _two_of_musubi(
    block: Any,
    img: Tensor,
    txt: Tensor,
    vec: Tensor,
    attn_mask: Any = None,
    total_len: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    freqs_cis: Any = None,
) -> Given:
    given = _two(block, img, txt, vec, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, freqs_cis)
    return _as_musubi_attends(given, block, attn_mask, total_len)


def _two_of_15(
    block: Any, img: Tensor, txt: Tensor, vec: Tensor, freqs_cis: Any = None, attn_params: Any = None
) -> Given:
    return Given((img, txt), (), {"attn": {"attn_params": attn_params}, "angles": freqs_cis})


def _one(
    block: Any,
    x: Tensor,
    vec: Tensor,
    txt_len: int,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    freqs_cis: Any = None,
) -> Given:
    attn = _lengths(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
    return Given((x,), (), {"attn": attn, "angles": freqs_cis, "text": txt_len})


def _one_of_musubi(
    block: Any,
    x: Tensor,
    vec: Tensor,
    txt_len: int,
    attn_mask: Any = None,
    total_len: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    freqs_cis: Any = None,
) -> Given:
    given = _one(block, x, vec, txt_len, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, freqs_cis)
    return _as_musubi_attends(given, block, attn_mask, total_len)


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention(block: Any, qkv: list[Tensor], layers: dict[str, Any]) -> Tensor:
    attention, attn, B = home(block).attention, layers["attn"], len(qkv[0])
    if "attn_params" in attn:
        return attention(qkv, **attn)
    return attention(*((qkv,) if "mode" in attn else qkv), batch_size=B, **attn)


def _heads(block: Any, name: str, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a stream, [B, T, heads, features]."""
    whole = block._modules.get(f"{name}_attn_qkv")
    parts = whole(h).chunk(3, dim=-1) if whole is not None else [getattr(block, f"{name}_attn_{i}")(h) for i in "qkv"]
    q, k, v = (t.unflatten(-1, (block.heads_num, -1)) for t in parts)
    return getattr(block, f"{name}_attn_q_norm")(q).to(v), getattr(block, f"{name}_attn_k_norm")(k).to(v), v


def _attend(block: Any, h: tuple[Tensor, Tensor], layers: dict[str, Any]) -> tuple[Tensor, Tensor]:
    (q, k, v), txt = (_heads(block, name, t) for name, t in zip(("img", "txt"), h, strict=True))
    if layers["angles"] is not None:
        q, k = home(block).apply_rotary_emb(q, k, layers["angles"], head_first=False)
    both = [torch.cat(pair, dim=1) for pair in zip((q, k, v), txt, strict=True)]
    attn, T = _attention(block, both, layers), q.shape[1]
    return block.img_attn_proj(attn[:, :T]), block.txt_attn_proj(attn[:, T:])


def _beside(block: Any, h: Tensor, layers: dict[str, Any]) -> Tensor:
    """Attention and MLP, side by side"""
    text, D = layers["text"], h.shape[-1]
    h = block.linear1(h)
    q, k, v = h[..., : 3 * D].unflatten(-1, (3, block.heads_num, -1)).unbind(2)
    q, k = block.q_norm(q).to(v), block.k_norm(k).to(v)
    if layers["angles"] is not None:
        rotated = home(block).apply_rotary_emb(q[:, :-text], k[:, :-text], layers["angles"], head_first=False)
        q, k = (torch.cat([t, rest[:, -text:]], dim=1) for t, rest in zip(rotated, (q, k), strict=True))
    return joined((_attention(block, [q, k, v], layers), block.mlp_act(h[..., 3 * D :])), dim=2)


# ---- the families ----------------------------------------------------------------------------------------------------


def _samples(side: int) -> int:
    """The lengths of sequences are those of so many samples: a large example is cut to one."""
    return 2 if side == SMALL else 1


def _rest(block: Any, D: int, side: int, image: int) -> tuple:
    """What a proof gives its attention."""
    T, B = image + TEXT, _samples(side)
    ends = torch.tensor([0, *(n for i in range(B) for n in ((i + 1) * T - 1, (i + 1) * T))], dtype=torch.int32)
    mask = (None, torch.tensor([T - 1, T][:B])) if _musubis(block) else ()
    return *mask, ends, ends, T, T, _angles(block, D, image)


def _angles(block: Any, D: int, tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(tokens, D // block.heads_num)
    return angles.cos(), angles.sin()


def _two_example(block: Any, side: int) -> tuple:
    B, T, D = _samples(side), side**2, block.img_mod.linear.in_features
    rest = _rest(block, D, side, T) if hasattr(block, "img_attn_qkv") else (_angles(block, D, T), 0.5)
    return torch.randn(B, T, D), torch.randn(B, TEXT, D), torch.randn(B, D), *rest


def _one_example(block: Any, side: int) -> tuple:
    B, T, D = _samples(side), side**2, block.modulation.linear.in_features
    return torch.randn(B, T, D), torch.randn(B, D), TEXT, *_rest(block, D, side, T - TEXT)


def _two_rows(block: Any, img: Any, txt: Any, vec: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return *block.img_mod(vec).chunk(6, dim=-1), *block.txt_mod(vec).chunk(6, dim=-1)


def _one_rows(block: Any, x: Any, vec: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return block.modulation(vec).chunk(3, dim=-1)


def _of_both(*names: str) -> tuple[str, ...]:
    return tuple(f"{stream}_{name}" for stream in ("img", "txt") for name in names)


_TRAINED = ", as kohya-ss/musubi-tuner has it"

for name, given, attention, more, about in (
    ("MMDoubleStreamBlock", _two, ("attn_qkv",), (), ""),
    ("MusubiMMDoubleStreamBlock", _two_of_musubi, ("attn_qkv",), ("attn_mode",), _TRAINED),
    ("MusubiMM15DoubleStreamBlock", _two_of_15, ("attn_q", "attn_k", "attn_v"), (), f"{_TRAINED}, of 1.5"),
):
    others = _of_both(*attention, "attn_q_norm", "attn_k_norm", "attn_proj")
    of_text = GatedBranch("txt_attn_proj", "txt_norm1", 6, 7, 8, stream=1)
    described(
        name,
        (
            GatedBranch("img_attn_proj", "img_norm1", 0, 1, 2, call=_attend, context=of_text, others=others),
            GatedBranch("img_mlp", "img_norm2", 3, 4, 5),
            GatedBranch("txt_mlp", "txt_norm2", 9, 10, 11, stream=1),
        ),
        rows=_two_rows,
        given=given,
        example=_two_example,
        linear=("img_mod.linear", "txt_mod.linear"),
        classes=("MMDoubleStreamBlock",),
        has=("heads_num", *others, *more),
        unless=_parallel,
        stand_ins={"attention": of_heads},
        about=f"Tencent/HunyuanVideo `MMDoubleStreamBlock`{about}.",
    )

_ONE = GatedBranch("linear1", "pre_norm", 0, 1, 2, call=_beside, last="linear2", others=("q_norm", "k_norm", "mlp_act"))
for name, given_one, more, about in (
    ("MMSingleStreamBlock", _one, (), ""),
    ("MusubiMMSingleStreamBlock", _one_of_musubi, ("attn_mode",), _TRAINED),
):
    described(
        name,
        (_ONE,),
        rows=_one_rows,
        given=given_one,
        example=_one_example,
        linear="modulation.linear",
        classes=("MMSingleStreamBlock",),
        has=("heads_num", *more),
        unless=_parallel,
        stand_ins={"attention": of_heads},
        about=f"Tencent/HunyuanVideo `MMSingleStreamBlock`{about}.",
    )

# ---- the refiner of the text -----------------------------------------------------------------------------------------


def _refines(block: Any, h: Tensor, c: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return block.self_attn_proj(home(block).attention(*_refined(block, h), mode="torch", attn_mask=attn_mask))


def _refines_15(block: Any, h: Tensor, c: Tensor, attn_params: Any) -> Tensor:
    return block.self_attn_proj(home(block).attention([*_refined(block, h)], attn_params=attn_params))


def _refined(block: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = block.self_attn_qkv(h).unflatten(-1, (3, block.heads_num, -1)).unbind(2)
    return block.self_attn_q_norm(q).to(v), block.self_attn_k_norm(k).to(v), v


def _refiner_example(block: Any, side: int) -> tuple:
    D, T = block.adaLN_modulation[1].in_features, side**2
    mask = torch.ones(2, 1, T, T, dtype=torch.bool)
    mask[1, ..., -1] = False
    return torch.randn(2, T, D), torch.randn(2, D), mask


def _refiner_rows(block: Any, c: Tensor, attn_mask: Any = None) -> tuple[Tensor, ...]:
    return block.adaLN_modulation(c).chunk(2, dim=1)


def _refiner_rows_15(block: Any, c: Tensor, attn_params: Any) -> tuple[Tensor, ...]:
    return _refiner_rows(block, c)


def _refiner_example_15(block: Any, side: int) -> tuple:
    return *_refiner_example(block, side)[:2], 0.5


_PARTS = ("self_attn_qkv", "self_attn_q_norm", "self_attn_k_norm")
for name, rows, refines, example, about in (
    ("IndividualTokenRefinerBlock", _refiner_rows, _refines, _refiner_example, ""),
    ("MusubiTokenRefinerBlock", _refiner_rows_15, _refines_15, _refiner_example_15, f"{_TRAINED}, of 1.5"),
):
    described(
        name,
        (
            GatedBranch("self_attn_proj", "norm1", gate=0, call=refines, others=_PARTS),
            GatedBranch("mlp", "norm2", gate=1),
        ),
        rows=rows,
        example=example,
        linear="adaLN_modulation.1",
        classes=("IndividualTokenRefinerBlock",),
        has=("self_attn_qkv", "heads_num"),
        stand_ins={"attention": of_heads},
        about=f"Tencent/HunyuanVideo `IndividualTokenRefinerBlock`{about}.",
    )
