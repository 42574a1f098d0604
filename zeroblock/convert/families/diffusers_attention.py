"""Residual branches of diffusers without a gate (`models/attention.py`, `attention_processor.py`, `transformers/
transformer_2d.py`): attention and feed-forward of Stable Diffusion's transformer blocks, attention of U-Nets and VAEs.
Nothing of theirs starts at zero; while somebody holds their last layer at zero they are not run in inference."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from ..._autocast import autocast_dtype
from ...ops.residual_alone import residual_alone
from ..family import lacks, register
from ..report import Obstacle
from .whole_skip import InferenceSkip, batches


def plain_processor(attn: Any) -> bool:
    """Whether all that the result of the attention's processor can depend on is known (`_state`): others' classes may
    add anything to the output layer's result, at a strength that changes."""
    processor = attn.processor
    if not type(processor).__module__.startswith("diffusers.") or isinstance(processor, nn.Module):
        return False
    fields = processor.__dict__
    return not fields or all(isinstance(v, (bool, int, float, str, type(None))) for v in fields.values())


def _state(processor: Any) -> tuple:
    """The class of a processor, its code and its settings."""
    kind = type(processor)
    return kind, kind.__call__, *sorted(processor.__dict__.items())


class _Ungated(InferenceSkip):
    """What the branches share: known by name in diffusers, dense as they are."""

    inner = True
    last: tuple[str, ...]  # the path of the layer that holds the branch at zero

    def knows(self, block: Any) -> bool:
        return type(block).__name__ in self.classes and type(block).__module__.startswith("diffusers.")

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, ".".join(self.last))

    def zero_layers(self, block: Any) -> list[Any]:
        for name in self.last:
            block = block._modules[name]
        return [block]

    def _residual_alone(self, block: Any, x: Tensor, residual: bool) -> Tensor:
        """(x +) the bias of the last layer, in eager's dtype."""
        (layer,) = self.zero_layers(block)
        dtype = autocast_dtype(layer.weight) or layer.weight.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        if residual:
            return residual_alone(x, bias, None, 1 if x.dim() == 4 else -1, dtype, None)
        y = x.new_zeros((*x.shape[:-1], layer.weight.shape[0]), dtype=dtype)
        return y if bias is None else y + bias


@register
class Attention(_Ungated):
    """y = to_out(softmax(q k^T) v), (y + x) / rescale_output_factor where it adds its own residual

    Source: diffusers models/attention_processor.py; attn1 and attn2 of a BasicTransformerBlock with plain norms, the
    attention of UNet2DModel and of the VAE. Left to diffusers while it is not zero.
    Use: zb.accelerate(model).
    Inference while to_out is zero: nothing but its bias is computed (once for every kind of input the attention runs,
    to be compared).
    Training forward while to_out is zero: to_out is skipped (family ZeroLayer).
    Training backward while zero: through the attention, with a gradient of zeros.
    """

    name = "Attention"
    classes = ("Attention",)
    last = ("to_out", "0")

    def judged_tensors(self, block: Any) -> tuple[Tensor, ...] | None:
        return super().judged_tensors(block) if plain_processor(block) else None

    def forward(self, block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x, residual = hidden_states, block.residual_connection
        fits = isinstance(x, Tensor) and (x.dim() == 3 or x.dim() == 4 and residual)
        eager = functools.partial(self.eager, block, x, *args, **kwargs)
        if not fits or not self.skips(block):
            return eager()
        y = self._residual_alone(block, x, residual)
        if residual:
            y = y / block.rescale_output_factor
        key = (x.dim(), x.is_contiguous(), x.dtype, y.dtype, *_state(block.processor), *batches(x, args, kwargs))
        return self.predicted(block, key, y, eager)


def keep_output_class(kind: type[nn.Module]) -> None:
    """What a transformer's forward returns its result in, whatever module a subclass is of. Looked up once: a compiler
    would read all of the modules to find it."""
    forward: Any = inspect.unwrap(kind._zeroblock.method)  # type: ignore[attr-defined]
    kind._zeroblock_output = forward.__globals__.get("Transformer2DModelOutput")  # type: ignore[attr-defined]


@register
class FeedForward(_Ungated):
    """y = linear(act(proj x))

    Source: diffusers models/attention.py, FeedForward of blocks with plain norms. Left to diffusers while it is not
    zero.
    Use: zb.accelerate(model).
    Inference while the last linear is zero: nothing but its bias is computed (once for every kind of input it runs, to
    be compared).
    Training forward while the last linear is zero: it is skipped (family ZeroLayer).
    Training backward while zero: through the layers before it, with a gradient of zeros.
    """

    name = "FeedForward"
    classes = ("FeedForward",)
    last = ("net", "2")

    def forward(self, block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        eager = functools.partial(self.eager, block, hidden_states, *args, **kwargs)
        if not self.skips(block):
            return eager()
        y = self._residual_alone(block, hidden_states, False)
        return self.predicted(block, (hidden_states.dim(), hidden_states.dtype, y.dtype), y, eager)


@register
class Transformer2DModel(_Ungated):
    """y = x + proj_out(blocks(proj_in(norm x), context))

    Source: diffusers models/transformers/transformer_2d.py, for images. Left to diffusers while it is not zero; the
    branches of its blocks are rows of their own.
    Use: zb.accelerate(unet).
    Inference while proj_out is zero: nothing but its bias is added (once for every kind of input all runs, to be
    compared).
    Training forward while proj_out is zero: proj_out is skipped (family ZeroLayer).
    Training backward while zero: through the blocks, with a gradient of zeros.
    """

    name = "Transformer2DModel"
    classes = ("Transformer2DModel",)
    last = ("proj_out",)

    def on_class_created(self, kind: type[nn.Module]) -> None:
        keep_output_class(kind)

    def knows(self, block: Any) -> bool:
        return super().knows(block) and getattr(block, "is_input_continuous", False)

    def forward(self, block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        eager = functools.partial(self.eager, block, hidden_states, *args, **kwargs)
        if args[7:] or not self.skips(block):
            return eager()
        output = block._zeroblock_output
        wrap = (lambda y: output(sample=y)) if kwargs.get("return_dict", True) else (lambda y: (y,))
        y = self._residual_alone(block, hidden_states, True)
        x = hidden_states
        key = (x.is_contiguous(), x.dtype, y.dtype, *batches(x, args, kwargs))
        return self.predicted(block, key, y, eager, wrap)
