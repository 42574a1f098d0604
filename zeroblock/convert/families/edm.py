"""NVlabs/edm's U-Net block. Its layers are classes of their own: weights are cast to x.dtype at every call,
convolutions resample first, the bias is added afterwards."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ..._layout import in_layout, layout_after
from ...blocks import resblock
from ...blocks.decision import SKIPS, UNTESTED, bypassable, decide, op_policy
from ...blocks.layers import Forwards, computes, parameters_of
from ...blocks.skip import Branch, Tail, skipped_branch
from ...reference import channel_view
from ..family import Family, lacks, register

# The forwards of norms and convolutions that were proved.
_NORMS: Forwards = {}
_CONVS: Forwards = {}


class _Conv:
    """An EDM convolution without its resampling, as the fused ops see one: weight and bias in the dtype of x."""

    stride = dilation = (1, 1)
    groups = 1
    bias_apart = True

    def __init__(self, module: Any, dtype: torch.dtype):
        self.module = module
        self.weight = module.weight.to(dtype)
        self.bias = None if module.bias is None else module.bias.to(dtype)
        self.out_channels, self.in_channels, *self.kernel_size = self.weight.shape
        self.padding = [k // 2 for k in self.kernel_size]

    def modules(self) -> Iterator[nn.Module]:
        return self.module.modules()


class _Dropout(NamedTuple):
    p: float
    training: bool


def _resample(conv: Any, x: Tensor) -> Tensor:
    """What the convolution does before its kernel: a filter that doubles or halves the image."""
    f = conv.resample_filter.to(x.dtype)
    padding = (f.shape[-1] - 1) // 2
    C = x.shape[1]
    if conv.up:
        return F.conv_transpose2d(x, (f * 4).tile(C, 1, 1, 1), groups=C, stride=2, padding=padding)
    return F.conv2d(x, f.tile(C, 1, 1, 1), groups=C, stride=2, padding=padding)


@register
class UNetBlock(Family):
    """y = s * (skip(x) + conv1(dropout(silu(norm1(conv0(silu(norm0 x)), emb))))), s being skip_scale, and in blocks
    with attention then s * (y + proj(attention(norm2 y))); conv1 and proj zero at the start in the ADM architecture.

    Source: NVlabs/edm `training/networks.UNetBlock`: up, down, resample_proj, adaptive_scale or not. (SongUNet starts
    at 1e-5, not at zero: there only the fused path counts.) Snapshots are written as without zeroblock.
    Use: zb.accelerate(net) for the network or the EDMPrecond around it.
    Inference: while conv1 (proj) is zero everything but skip(x) is skipped (the attention is).
    Training forward: conv1 and proj are skipped; conv0 and the attention run once without a graph.
    Training backward: only their and the shortcut's gradients are computed, the others are exact zeros.
    """

    name = "UNetBlock"
    classes = ("UNetBlock",)

    def match(self, block: Any, path: str, root: nn.Module) -> str | None:
        missing = lacks(block, "norm0", "conv0", "affine", "norm1", "conv1", "skip_scale")
        return missing or (None if self._fits(block) else "its layers are not EDM's, or are parametrised or watched")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        found: dict[str, tuple[Tensor, ...]] = {"conv1": (block.conv1.weight,)}
        if block.num_heads:
            found["proj"] = (block.proj.weight,)
        return found

    def example(self, block: Any) -> tuple:
        return torch.randn(2, block.in_channels, 4, 4), torch.randn(2, block.affine.in_features)

    def _fits(self, block: Any) -> bool:
        norms, convs = [block.norm0, block.norm1], [block.conv0, block.conv1]
        if block.num_heads:
            norms.append(block.norm2)
            convs += [block.qkv, block.proj]
        return (
            all(map(_is_conv, convs))
            and not any(conv.up or conv.down for conv in convs[1:])
            and all(map(_is_norm, norms))
            and bypassable((*norms, *convs))
        )

    def forward(self, block: Any, x: Tensor, emb: Tensor) -> Tensor:
        if not self._fits(block):
            return self.eager(block, x, emb)
        y = resblock.forward(self._layers(block, x.dtype), x, emb)
        y = in_layout(y, layout_after(x, block.conv0.weight, block.conv1.weight))  # eager adds into conv1's result
        y = y if block.skip_scale == 1 else y * block.skip_scale
        if block.num_heads:
            y = self._attention(block, y)
            y = y if block.skip_scale == 1 else y * block.skip_scale
        return y

    def _layers(self, block: Any, dtype: torch.dtype) -> resblock.Layers:
        conv0, skip = block.conv0, block.skip
        resamples = conv0.up or conv0.down

        def embed(emb: Tensor, dtype: torch.dtype) -> resblock.Embedding:
            e = block.affine(emb).to(dtype)
            if block.adaptive_scale:
                return *e.chunk(2, dim=1), None
            return None, None, channel_view(e, 4)

        def same(x: Tensor) -> Tensor:
            return x

        return resblock.Layers(
            self.name,
            self.zero_skip,
            block.norm0,
            _Conv(conv0, dtype),
            block.norm1,
            _Conv(block.conv1, dtype),
            _Dropout(block.dropout, block.training),
            embed,
            embedders=(block.affine,),
            shortcut=same if skip is None or resamples else skip,
            resample_h=functools.partial(_resample, conv0) if resamples else None,
            resample_x=skip if resamples else None,
        )

    def _attention(self, block: Any, x: Tensor) -> Tensor:
        norm, qkv, proj = block.norm2, _Conv(block.qkv, x.dtype), _Conv(block.proj, x.dtype)

        def body(x: Tensor) -> tuple[Tensor]:
            h = functional.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=None)
            h = functional.conv_residual(h, qkv.weight, qkv.bias, None, padding=qkv.padding, zero_skip=UNTESTED)
            # [N, heads, features, qkv, T]; fused attention wants the features together.
            q, k, v = h.flatten(2).unflatten(1, (block.num_heads, -1, 3)).permute(3, 0, 1, 4, 2).contiguous().unbind(0)
            return (F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape),)

        answer = decide(self.name, self.zero_skip, (proj.weight,))
        if answer in SKIPS:
            parameters = parameters_of(norm, block.qkv)
            return skipped_branch(Branch(Tail(proj), (x,), parameters, body, lambda h: h, x, carried=True), x)
        (h,), policy = body(x), op_policy(answer, self.zero_skip)
        return functional.conv_residual(h, proj.weight, proj.bias, x, padding=proj.padding, zero_skip=policy)


def _is_norm(norm: Any) -> bool:
    return norm._parameters.get("weight") is not None and hasattr(norm, "num_groups") and computes(norm, _NORMS)


def _is_conv(conv: Any) -> bool:
    weight = conv._parameters.get("weight")
    plain = weight is not None and weight.dim() == 4 and all(k % 2 for k in weight.shape[2:]) and computes(conv, _CONVS)
    return plain and not getattr(conv, "fused_resample", True)
