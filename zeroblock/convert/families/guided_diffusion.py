"""The U-Net blocks of openai/improved-diffusion and openai/guided-diffusion, and of what was built on them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ...blocks import resblock
from ...blocks.decision import bypassable, op_policy
from ...blocks.layers import DROPOUTS, SILUS, Forwards, computes, fits_fused, is_group_norm
from ...blocks.residual import residual_branch
from ...reference import channel_view
from ..family import Family, lacks, register
from ..report import Obstacle, Reason

_NOT_PLAIN = Obstacle(Reason.LAYERS, "its norms or convolutions are not the plain ones the fused ops take")


class _Entered(Family):
    """A block that is called through `_forward`, for checkpoints, or (glide-text2im's) directly."""

    method = "_forward"
    parts: tuple[str, ...]

    def entry(self, kind: type[nn.Module]) -> str:
        return self.method if hasattr(kind, self.method) else "forward"

    def _fits(self, block: Any) -> bool:
        raise NotImplementedError

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, *self.parts)
        return missing or (None if self._fits(block) else _NOT_PLAIN)


@register
class ResBlock(_Entered):
    """y = skip(x_upd x) + conv2(dropout(silu(norm2(conv1(h_upd(silu(norm1 x))), emb)))), conv2 zero at the start.

    Source: openai/guided-diffusion and openai/improved-diffusion `unet.ResBlock`, CompVis/latent-diffusion and
    lllyasviel/ControlNet `openaimodel.ResBlock`, Stability-AI/generative-models `openaimodel.ResBlock`, `VideoResBlock`
    (and its time_stack), openai/consistency_models, openai/glide-text2im; converted to fp16 too.
    Use: zb.accelerate(model). The block's own use_checkpoint stays in charge.
    Inference: while conv2's weight is zero everything but skip(x_upd x) is skipped.
    Training forward: conv2 is skipped; norm, activation and dropout are recomputed for its gradient.
    Training backward: only conv2's and the shortcut's gradients are computed, the others are exact zeros.
    """

    name = "ResBlock"
    classes = ("ResBlock",)
    parts = ("in_layers.2", "out_layers.3", "skip_connection")

    def forward(self, block: Any, x: Tensor, emb: Any) -> Tensor:
        # An embedding for each frame; more of them than frames make the result longer.
        more_frames = isinstance(emb, Tensor) and emb.dim() > 2 and emb.shape[1] not in (1, x.shape[2])
        if more_frames or not self._fits(block):
            return self.eager(block, x, emb)
        return resblock.forward(self._layers(block), x, emb)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"out_layers.3": (block.out_layers[3].weight,)}

    def example(self, block: Any, side: int) -> tuple:
        conv = block.in_layers[2]
        x = torch.randn(2, conv.in_channels, *(4, 2 * side, 4)[-len(conv.kernel_size) :])
        if not isinstance(block.emb_layers, nn.Module):
            return x, None
        frames = (4,) if getattr(block, "exchange_temb_dims", False) else ()
        last: Any = list(block.emb_layers.children())[-1]
        return x, torch.randn(2, *frames, last.in_features)

    def _fits(self, block: Any) -> bool:
        head, tail = block.in_layers._modules, block.out_layers._modules
        if len(head) != 3 or len(tail) != 4:
            return False
        norm1, act1, conv1 = head.values()
        norm2, act2, dropout, conv2 = tail.values()
        swish = _own_swish(norm1), _own_swish(norm2)
        return (
            _activates(act1, swish[0])
            and _activates(act2, swish[1])
            and type(dropout).forward in DROPOUTS
            and resblock.fusable(norm1, conv1, norm2, conv2, swish)
            and bypassable((block.in_layers, block.out_layers))
        )

    def _layers(self, block: Any) -> resblock.Layers:
        norm1, _, conv1 = block.in_layers._modules.values()
        norm2, _, dropout, conv2 = block.out_layers._modules.values()
        updown = getattr(block, "updown", False)
        no_embedding = getattr(block, "skip_t_emb", False)

        def embed(emb: Tensor, dtype: torch.dtype) -> resblock.Embedding:
            if no_embedding:
                return None, None, None
            e = block.emb_layers(emb).to(dtype)
            if block.use_scale_shift_norm:
                return *e.chunk(2, dim=1), None
            if e.dim() == 2:
                return None, None, channel_view(e, conv1.weight.dim())
            e = e.reshape(*e.shape, *[1] * (conv1.weight.dim() - e.dim()))  # an embedding for each frame
            return None, None, e.transpose(1, 2) if block.exchange_temb_dims else e

        return resblock.Layers(
            self.name,
            self.zero_skip,
            norm1,
            conv1,
            norm2,
            conv2,
            dropout,
            embed,
            embedders=() if no_embedding else (block.emb_layers,),
            shortcut=block.skip_connection,
            resample_h=block.h_upd if updown else None,
            resample_x=block.x_upd if updown else None,
        )


def _own_swish(norm: nn.Module) -> float:
    """1 where the norm ends in SiLU itself, as glide-text2im's may."""
    return norm.__dict__.get("swish", 0.0)


def _activates(act: nn.Module, swish: float) -> bool:
    """Whether one SiLU follows the norm: the module act, or the norm's own."""
    return type(act) is nn.Identity if swish else computes(act, SILUS)


@register
class AttentionBlock(_Entered):
    """y = x + proj_out(attention(qkv(norm x))), all pixels attending to each other, proj_out zero at the start; in
    glide-text2im to encoder_kv(encoder_out) too.

    Source: `unet.AttentionBlock` and `openaimodel.AttentionBlock` of the repositories of ResBlock.
    Use: zb.accelerate(model). The block's own checkpointing stays in charge; attention is PyTorch's fused one, or the
    block's own flash attention.
    Inference: while proj_out's weight is zero everything is skipped.
    Training forward: proj_out is skipped; the attention runs once without a graph, for its gradient.
    Training backward: only proj_out's gradients are computed, the others are exact zeros.
    """

    name = "AttentionBlock"
    classes = ("AttentionBlock",)
    parts = ("norm", "qkv", "attention", "proj_out")

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        obstacle = super().match(block, path, root)
        if obstacle is None:
            _try_order(block.attention)
        return obstacle

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"proj_out": (block.proj_out.weight,)}

    def proof_target(self, block: Any) -> nn.Module:
        """The block; with a stand-in for an attention that is called as a whole, which need not run on a CPU."""
        if _order(block) is not None:
            return block
        twin = copy.copy(block)
        twin.__dict__["_modules"] = block._modules | {"attention": _AnyAttention()}
        return twin

    def example(self, block: Any, side: int) -> tuple:
        depth = (2,) if block.qkv.weight.dim() == 5 else ()
        return (torch.randn(2, block.qkv.in_channels, *depth, side + 1, side),)

    def options(self, block: Any) -> dict[str, tuple]:
        encoder = getattr(block, "encoder_kv", None)
        return {} if encoder is None else {"encoder_out": (torch.randn(2, encoder.in_channels, 3),)}

    def forward(self, block: Any, x: Tensor, encoder_out: Tensor | None = None) -> Tensor:
        norm, qkv, proj = block.norm, block.qkv, block.proj_out
        if not self._fits(block) or x.dim() != qkv.weight.dim() > 3:
            return self.eager(block, x) if encoder_out is None else self.eager(block, x, encoder_out)
        pixels = x.reshape(*x.shape[:2], -1) if qkv.weight.dim() == 3 else x

        def body(pixels: Tensor, encoder_out: Tensor | None = None) -> Tensor:
            h = functional.group_norm_silu(pixels, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=None)
            extra = () if encoder_out is None else (block.encoder_kv(encoder_out),)
            return _attend(block, qkv(h).flatten(2), *extra).reshape(pixels.shape)

        activations: tuple[Tensor, ...] = (pixels,)
        modules: tuple[nn.Module, ...] = (norm, qkv, block.attention)
        if encoder_out is not None:
            activations, modules = (pixels, encoder_out), (*modules, block.encoder_kv)
        trusted = "" if _order(block) else None
        answer, y = residual_branch(
            self.name, self.zero_skip, pixels, body, proj, None, activations, modules=modules, trusted=trusted
        )
        if y is None:
            h, policy = body(*activations), op_policy(answer, self.zero_skip)
            y = functional.conv_residual(h, proj.weight, proj.bias, pixels, padding=0, zero_skip=policy)
        return y.reshape(x.shape)

    def _fits(self, block: Any) -> bool:
        convs = (block.qkv, block.proj_out)
        return (
            is_group_norm(block.norm)
            and computes(block.attention, _ATTENTIONS)
            and all(fits_fused(conv) and conv.kernel_size in _POINTS for conv in convs)
            and bypassable((block.norm, block.qkv, block.attention, block.proj_out))
        )


_POINTS = ((1,), (1, 1), (1, 1, 1))

# The forwards of the attentions that were proved.
_ATTENTIONS: Forwards = {}


class _AnyAttention(nn.Module):
    """In the place of one that the block calls as a whole; all of its inputs count."""

    def forward(self, qkv: Tensor, encoder_kv: Tensor | None = None) -> Tensor:
        q, k, v = qkv.chunk(3, dim=1)
        return q * k.softmax(-1) + v * (1 if encoder_kv is None else encoder_kv.mean())


# ---- attentions by their formula -------------------------------------------------------------------------------------

# In which order qkv's channels come.
_HEADS_FIRST, _QKV_FIRST = "(heads, qkv, features)", "(qkv, heads, features)"
# {(class, heads): the order}, as found by trying; None: another attention, or it does not run on a CPU.
_orders: dict[tuple[type, int], str | None] = {}


def _order(block: Any) -> str | None:
    """The order of qkv's channels; None: the attention is to be called as a whole."""
    attention = block.attention
    heads = attention.__dict__.get("n_heads")
    if heads is not None:
        return _orders.get((type(attention), heads))
    # improved-diffusion's is given one head at a time and does not know how many there are.
    return _HEADS_FIRST if type(attention).__name__ == "QKVAttention" else None


def _try_order(attention: Any) -> None:
    """Finds the order of an attention that knows its heads: repositories differ in it under one name."""
    heads = attention.__dict__.get("n_heads")
    key = type(attention), heads
    if not isinstance(heads, int) or key in _orders:
        return
    qkv = torch.randn(
        2, heads * 3 * 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            theirs = type(attention).forward(attention, qkv)
            ours = {order: _attention(order, heads, qkv) for order in (_HEADS_FIRST, _QKV_FIRST)}
            _orders[key] = next((o for o, y in ours.items() if torch.allclose(y, theirs, rtol=1e-3, atol=1e-3)), None)
        except Exception:  # whatever foreign code raises: the proof says what
            _orders[key] = None


def _attend(block: Any, qkv: Tensor, *encoder_kv: Tensor) -> Tensor:
    """[N, 3C, T] (and [N, 2C, S] of an encoder) -> [N, C, T]"""
    order = _order(block)
    if order is None:
        return block.attention(qkv, *encoder_kv)
    return _attention(order, block.attention.__dict__.get("n_heads") or block.num_heads, qkv, *encoder_kv)


def _attention(order: str, heads: int, qkv: Tensor, *encoder_kv: Tensor) -> Tensor:
    q, k, v = _split(order, heads, qkv, 3)
    for extra in encoder_kv:
        k, v = (torch.cat(pair, dim=2) for pair in zip(_split(order, heads, extra, 2), (k, v), strict=True))
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(qkv.shape[0], -1, qkv.shape[2])


def _split(order: str, heads: int, t: Tensor, count: int) -> tuple[Tensor, ...]:
    """[N, heads, T, features] of each."""
    first = order == _HEADS_FIRST
    shape, permutation = ((heads, count), (2, 0, 1, 4, 3)) if first else ((count, heads), (1, 0, 2, 4, 3))
    # Fused attention wants the features together.
    return t.unflatten(1, (*shape, -1)).permute(permutation).contiguous().unbind(0)
