"""diffusers' ControlNets (`models/controlnets`): the whole control branch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ... import zero
from ..family import register
from ..report import Obstacle, Reason
from .whole_skip import ControlBranch, InferenceSkip

# Where they keep the layers through which their feature maps leave, in the order of the results.
_LAYERS = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_blocks", "controlnet_single_blocks")


@functools.cache
def _names(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _given(family: Any, block: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name."""
    return dict(zip(_names(type(block)._zeroblock.original.forward), args, strict=False)) | kwargs


def _is_zero(scale: Any) -> bool:
    """A number, or every number of a list; a tensor is not read."""
    scales = scale if isinstance(scale, (list, tuple)) and scale else [scale]
    return all(isinstance(s, (int, float)) and s == 0 for s in scales)


@register
class ControlNetModel(ControlBranch):
    """conditioning_scale * zero_layer(h) for every feature map h of a copied encoder

    Source: diffusers models/controlnets: ControlNetModel, ControlNetUnionModel, SparseControlNetModel,
    SD3ControlNetModel, FluxControlNetModel. The zero layers are a family of their own (ZeroLayer).
    Use: zb.accelerate(controlnet), in eval mode; the first zero forward of every image size still runs, to be compared.
    Inference while all zero layers are zero, or conditioning_scale is 0: the encoder is not run, the results are
    the scaled biases, or zeros.
    Training forward: the encoder runs (each zero layer needs its input), zero layers do not.
    Training backward while zero: each zero layer's gradients; the encoder's are zeros.
    """

    name = "ControlNetModel"
    classes = (
        "ControlNetModel",
        "ControlNetUnionModel",
        "SparseControlNetModel",
        "SD3ControlNetModel",
        "FluxControlNetModel",
    )

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        if type(block).forward.__qualname__ not in {f"{name}.forward" for name in self.classes}:
            return Obstacle(Reason.FORK, "its forward is not diffusers' own")
        return (
            None if self.zero_layers(block) else Obstacle(Reason.VARIANT, "it has no zero layers for its feature maps")
        )

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"controlnet": super().branches(block)[""]}

    def zero_layers(self, block: Any) -> list[Any]:
        found = [getattr(block, name) for name in _LAYERS if hasattr(block, name)]
        return [layer for m in found for layer in (m if isinstance(m, nn.ModuleList) else [m])]

    def scales(self, block: Any, given: dict[str, Any]) -> list[Any]:
        layers, scale = self.zero_layers(block), given.get("conditioning_scale", 1.0)
        if isinstance(scale, (list, tuple)):
            scale = scale[0]
        if not given.get("guess_mode") or block.config.global_pool_conditions:
            return [scale] * len(layers)
        return list(torch.logspace(-1, 0, len(layers), device=layers[0].weight.device) * scale)

    def forward(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        given = _given(self, block, args, kwargs)
        scaled_away = _is_zero(given.get("conditioning_scale", 1.0))
        return self.call(block, given, scaled_away, lambda: self.eager(block, *args, **kwargs))


@register
class UNetControlNetXSModel(InferenceSkip):
    """A U-Net and a smaller control U-Net beside it, h = h + conditioning_scale * zero_conv(h_control) at every level

    Source: diffusers models/controlnets/controlnet_xs.py. The zero convolutions are a family of their own (ZeroLayer).
    Use: zb.accelerate(unet), in eval mode; the first zero forward of every image size still runs, to be compared.
    Inference while all zero convolutions towards the U-Net are zero, or conditioning_scale is 0: the control U-Net is
    not run.
    Training forward: both run, zero convolutions do not.
    Training backward while zero: each zero convolution's gradients; the control U-Net's are zeros.
    """

    name = "UNetControlNetXSModel"
    classes = ("UNetControlNetXSModel", "ControlNetXSAdapter")

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        if type(block).forward.__qualname__ == "ControlNetXSAdapter.forward":
            return Obstacle(
                Reason.PARTS, "it is the parts of a control U-Net: accelerate the UNetControlNetXSModel made of it"
            )
        if type(block).forward.__qualname__ != "UNetControlNetXSModel.forward":
            return Obstacle(Reason.FORK, "its forward is not diffusers' own")
        known = "apply_control" in _names(type(block).forward)
        return None if known else Obstacle(Reason.FORK, "its forward cannot leave the control away")

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"control": super().branches(block)[""]}

    def zero_layers(self, block: Any) -> list[Any]:
        levels: Iterable[Any] = (*block.down_blocks, block.mid_block, *block.up_blocks)
        towards = (m.ctrl_to_base for m in levels)
        rest = (layer for m in towards for layer in (m if isinstance(m, nn.ModuleList) else [m]))
        return [block.control_to_base_for_conv_in, *rest]

    def judged_tensors(self, block: Any) -> tuple[Tensor, ...] | None:
        """Biases too: they go through the U-Net."""
        weights = super().judged_tensors(block)
        biases = (layer.bias for layer in self.zero_layers(block))
        return None if weights is None else (*weights, *(b for b in biases if b is not None))

    def forward(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        given = _given(self, block, args, kwargs)
        eager = functools.partial(self.eager, block, *args, **kwargs)
        if not given.get("apply_control", True) or not self.skips(block, _is_zero(given.get("conditioning_scale", 1))):
            return eager()
        alone = self.eager(block, **(given | {"apply_control": False}))
        sample = alone[0]
        key = (sample.shape, sample.dtype, type(alone))
        seen = self.confirmed.setdefault(block, {})
        if key in seen and seen[key]:
            return alone
        theirs = eager()
        seen.setdefault(key, zero.may_test(sample) and torch.equal(theirs[0], sample))
        return theirs
