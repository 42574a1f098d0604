"""Branches of latent-diffusion models whose insides vary from fork to fork: skipped as a whole in inference, otherwise
left as they are (their projections and zero convolutions are the single layers of `zero_layers.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._autocast import autocast_dtype
from ...blocks.layers import is_plain_layer
from ...ops.residual_alone import residual_alone
from ..family import NEVER_ZERO, lacks, register
from ..report import Obstacle, Reason
from .described import described
from .description import GatedBranch, Given
from .stand_in import of_tokens, width_of
from .whole_skip import ControlBranch, InferenceSkip, batches


@register
class SpatialTransformer(InferenceSkip):
    """y = x + proj_out(blocks(proj_in(norm x), context)), proj_out zero at the start.

    Source: CompVis/latent-diffusion `ldm.modules.attention.SpatialTransformer`, Stability-AI/generative-models
    `SpatialTransformer` and `SpatialVideoTransformer`, guoyww/AnimateDiff `TemporalTransformer3DModel`.
    Use: zb.accelerate(model); every block's first zero forward of a kind still runs, to be compared.
    Inference: while proj_out is zero everything is skipped.
    Training forward: proj_out is skipped (family ZeroLayer).
    Training backward: through the whole block, with a gradient of zeros.
    """

    name = "SpatialTransformer"
    classes = ("SpatialTransformer", "SpatialVideoTransformer", "TemporalTransformer3DModel")

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, "norm", "proj_in", "transformer_blocks", "proj_out")
        return missing or (
            None if is_plain_layer(block.proj_out) else Obstacle(Reason.LAYERS, "its proj_out is not a plain layer")
        )

    def zero_layers(self, block: Any) -> list[Any]:
        return [block.proj_out]

    def forward(self, block: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Tensor) or not self.skips(block):
            return self.eager(block, x, *args, **kwargs)
        layer = block.proj_out
        dtype = autocast_dtype(layer.weight) or layer.weight.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        y = residual_alone(x, bias, None, 1, dtype, None)
        key = (x.dtype, dtype, *batches(x, args, kwargs))
        return self.predicted(block, key, y, lambda: self.eager(block, x, *args, **kwargs))


def _given(block: Any, x: Tensor, context: Tensor | None = None) -> Given:
    # Where self-attention is disabled, the first one looks at the context too.
    own = context if getattr(block, "disable_self_attn", False) else None
    return Given((x,), (), {"attn1": {"context": own}, "attn2": {"context": context}})


def _example(block: Any, side: int) -> tuple:
    D = block.norm1.normalized_shape[0]
    return torch.randn(2, side**2, D), torch.randn(2, 3, width_of(block.attn2, "to_k", D))


described(
    "LDMTransformerBlock",
    (GatedBranch("attn1", "norm1"), GatedBranch("attn2", "norm2"), GatedBranch("ff", "norm3")),
    given=_given,
    example=_example,
    gates=lambda block, i: (NEVER_ZERO,),
    classes=("BasicTransformerBlock",),
    has=("_forward", "checkpoint", "attn2.to_k"),
    stand_ins={"attn1": of_tokens, "attn2": of_tokens},
    about="CompVis/latent-diffusion and Stability-AI/generative-models `BasicTransformerBlock`.",
)


@register
class ControlNet(ControlBranch):
    """[zero_conv(h) for every feature map h of a copied encoder] and for the middle block, all zero at the start.

    Source: lllyasviel/ControlNet `cldm.cldm.ControlNet`. Its ResBlocks and zero convolutions are families of their own.
    Use: zb.accelerate(model); the first zero forward of every image size still runs, to be compared.
    Inference: while all zero convolutions are zero the whole control branch is skipped, the results are their biases.
    Training forward: the zero convolutions are skipped, the encoder runs (they need its feature maps).
    Training backward: the zero convolutions' gradients; through the encoder, with gradients of zeros.
    """

    name = "ControlNet"
    classes = ("ControlNet",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(
            block, "input_blocks", "middle_block", "zero_convs.0.0", "middle_block_out.0", "input_hint_block"
        )
        plain = missing is None and all(map(is_plain_layer, self.zero_layers(block)))
        return missing or (None if plain else Obstacle(Reason.LAYERS, "its zero convolutions are not plain ones"))

    def zero_layers(self, block: Any) -> list[Any]:
        return [*(layer[0] for layer in block.zero_convs), block.middle_block_out[0]]

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {"zero_convs": super().branches(block)[""]}

    def forward(self, block: Any, x: Tensor, hint: Any, timesteps: Any, context: Any, **kwargs: Any) -> Any:
        given = {"x": x, "hint": hint, "timesteps": timesteps, "context": context, **kwargs}
        return self.call(block, given, False, lambda: self.eager(block, x, hint, timesteps, context, **kwargs))
