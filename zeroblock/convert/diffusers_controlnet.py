"""diffusers' ControlNet (`models/controlnets/controlnet.py`): the whole control branch."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .. import zero
from .._autocast import autocast_dtype
from .._layout import channels_last_format
from ..nn import _common
from ._core import lacks, register
from ._inference import InferenceSkip
from ._transformer import draws, held_by, is_plain

_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")


@register
class ControlNetModel(InferenceSkip):
    """conditioning_scale * zero_conv(h) for every feature map h of a copied encoder, and for the middle block

    Source: diffusers models/controlnets/controlnet.py. The zero convolutions are a family of their own (ZeroLayer).
    Use: zb.accelerate(controlnet), in eval mode; the first zero forward of every image size still runs, to be compared.
    Inference while all zero convolutions are zero, or conditioning_scale is 0: the encoder is not run, the results are
    the scaled biases, or zeros.
    Training forward: the encoder runs (each zero convolution needs its input), zero convolutions do not.
    Training backward while zero: each zero convolution's gradients; the encoder's are zeros.
    """

    name = "ControlNetModel"
    classes = ("ControlNetModel",)

    def match(self, block: nn.Module, path: str, root: nn.Module) -> str | None:
        if type(block).forward.__qualname__ != "ControlNetModel.forward":
            return "its forward is not diffusers' own"
        missing = lacks(block, "conv_in", "down_blocks", "mid_block", "controlnet_down_blocks", "controlnet_mid_block")
        if missing is not None:
            return missing
        for down in block.down_blocks:
            if type(down).__name__ not in _BLOCKS:
                return f"a {type(down).__name__} among its down_blocks: the sizes of its feature maps are not known"
        if len(self._sizes(block, (64, 64))) != len(block.controlnet_down_blocks):
            return "it has not one zero convolution for every feature map"
        return None

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"controlnet": tuple(t for conv in self.zero_layers(block) for t in held_by(conv, conv.weight))}

    def zero_layers(self, block: Any) -> list[Any]:
        return [*block.controlnet_down_blocks, block.controlnet_mid_block]

    def _sizes(self, block: Any, size: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Height and width of every feature map of the encoder; the last one is also the middle block's."""
        sizes = [size]
        for down in block.down_blocks:
            sizes += [size] * len(down.resnets)
            for sampler in down.downsamplers or ():
                padding = sampler.conv.padding[0]  # with 0, the map is padded by one at its far side
                size = tuple((n + (2 * padding or 1) - 3) // 2 + 1 for n in size)
                sizes.append(size)
        return sizes

    def forward(
        self,
        block: Any,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given = dict(zip(_REST, args, strict=False)) | kwargs
        guess, return_dict = given.get("guess_mode", False), given.get("return_dict", True)
        eager = functools.partial(
            self.eager, block, sample, timestep, encoder_hidden_states, controlnet_cond, conditioning_scale
        )
        if len(args) > len(_REST) or not self._is_zero(block, sample, conditioning_scale):
            return eager(*args, **kwargs)
        pooled = block.config.global_pool_conditions
        maps = self._scaled_biases(block, sample, conditioning_scale, guess and not pooled)
        if pooled:
            maps = [t.mean(dim=(2, 3), keepdim=True) for t in maps]
        # The first call of a kind runs, to be compared: other versions may have other feature maps.
        seen, key = self.confirmed.setdefault(block, {}), (sample.shape, sample.dtype, guess, maps[0].dtype, pooled)
        if not seen.get(key):
            theirs = eager(*args, **kwargs)
            down, mid = theirs if isinstance(theirs, tuple) else theirs.values()
            found = [*down, mid]
            seen[key] = len(found) == len(maps) and all(map(torch.equal, found, maps))
            return theirs
        if not return_dict:
            return maps[:-1], maps[-1]
        output = sys.modules[type(block).__module__].ControlNetOutput
        return output(down_block_res_samples=maps[:-1], mid_block_res_sample=maps[-1])

    def _is_zero(self, block: Any, sample: Tensor, conditioning_scale: Any) -> bool:
        convs = self.zero_layers(block)
        if (
            torch.is_grad_enabled()
            or sample.dim() != 4
            or not is_plain(sample, *(t for conv in convs for t in (conv.weight, conv.bias)))
            or not all(map(_common.is_plain_conv, convs))
            or not zero.may_skip_branch(self.name, self.zero_skip, convs[0].weight)
            or not zero.bypassable(block.children())
        ):
            return False
        scaled_away = isinstance(conditioning_scale, (int, float)) and conditioning_scale == 0
        found = (scaled_away or all(zero.is_exactly_zero(conv.weight) for conv in convs)) and not draws(block)
        zero.count(self.name, found)
        return found

    def _scaled_biases(self, block: Any, sample: Tensor, scale: Any, guess: bool) -> list[Tensor]:
        convs = self.zero_layers(block)
        scales = [scale] * len(convs)
        if guess:
            scales = torch.logspace(-1, 0, len(convs), device=sample.device) * scale
        sizes = self._sizes(block, tuple(sample.shape[2:]))
        layout = channels_last_format(sample) or channels_last_format(block.conv_in.weight) or torch.contiguous_format
        maps = []
        for conv, size, s in zip(convs, [*sizes, sizes[-1]], scales, strict=True):
            dtype = autocast_dtype(conv.weight) or conv.weight.dtype
            y = torch.zeros(
                (sample.shape[0], conv.weight.shape[0], *size), dtype=dtype, device=sample.device
            ).contiguous(memory_format=layout)
            if conv.bias is not None:
                y += conv.bias.to(dtype)[:, None, None]
            maps.append(y * s)
        return maps


_REST = (
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "added_cond_kwargs",
    "cross_attention_kwargs",
    "guess_mode",
    "return_dict",
)
