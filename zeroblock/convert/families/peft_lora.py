"""peft's LoRA layers (`tuners/lora/layer.py`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.layers import is_plain_layer
from ...blocks.residual import residual_branch
from ..family import Family, lacks, register
from ..report import Obstacle, Reason


@register
class LoRA(Family):
    """y = base(x) + B(A(dropout x)) * scaling, once for each active adapter; Linear and Conv1d/2d/3d

    B is zero at the start. Source: Hu et al. 2021; peft tuners/lora/layer.py. Variants (DoRA and others), merged and
    disabled adapters, and mixed batches are left to peft.
    Use: zb.accelerate(model) after the adapters are injected; merging and switching them works as before.
    Inference while B is zero: A and B are not run.
    Training forward while zero: A, without a graph.
    Training backward while zero: B's gradient; A's and the branch's part of x's are zeros.
    """

    name = "LoRA"
    classes = ("LoraLayer",)
    dense_backend = "eager"

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        if not {c.__name__ for c in type(block).__mro__} & {"Linear", "Conv1d", "Conv2d", "Conv3d"}:
            return Obstacle(Reason.VARIANT, "a LoRA layer with a forward of its own (embedding or quantised)")
        missing = lacks(block, "base_layer", "lora_A", "lora_B", "lora_dropout", "scaling")
        if missing is None and (getattr(block, "lora_variant", None) or any(block.use_dora.values())):
            return Obstacle(Reason.VARIANT, "it is a variant of LoRA")
        return missing

    def inner_modules(self, block: Any) -> Iterator[nn.Module]:
        yield block
        for adapters in (block.lora_A, block.lora_B, block.lora_dropout):
            yield from adapters.modules()

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {f"lora_B.{name}": (B.weight,) for name, B in block.lora_B.items()}

    def proof_target(self, block: Any) -> nn.Module:
        """The block; on a plain layer in place of a quantised one, which may run nowhere but where it is."""
        A, B = next(iter(block.lora_A.values())), next(iter(block.lora_B.values()))
        if is_plain_layer(block.base_layer) or not isinstance(A, nn.Linear):
            return block
        twin = copy.copy(block)
        twin.__dict__["_modules"] = block._modules | {"base_layer": nn.Linear(A.in_features, B.out_features)}
        return twin

    def example(self, block: Any, side: int) -> tuple:
        A = next(iter(block.lora_A.values()))
        if isinstance(A, nn.Linear):
            return (torch.randn(2, side**2, A.in_features),)
        sizes = [d * (k - 1) + side for d, k in zip(A.dilation, A.kernel_size, strict=True)]
        return (torch.randn(2, A.in_channels, *sizes),)

    def forward(self, block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = [name for name in block.active_adapters if name in block.lora_A]
        plain = not (block.disable_adapters or block.merged or getattr(block, "lora_variant", None) or args or kwargs)
        if not plain or any(block.use_dora[name] for name in adapters):
            return self.eager(block, x, *args, **kwargs)
        result = block.base_layer(x)
        dtype = result.dtype
        for name in adapters:
            x = block._cast_input_dtype(x, block.lora_A[name].weight.dtype)
            result = self._added(block, name, result, x)
        return result.to(dtype)

    def _added(self, block: Any, name: str, result: Tensor, x: Tensor) -> Tensor:
        A, B, dropout, scaling = block.lora_A[name], block.lora_B[name], block.lora_dropout[name], block.scaling[name]
        y = None
        if B.bias is None:
            name, policy, modules = self.name, self.zero_skip, (A, dropout)
            _, y = residual_branch(
                name, policy, result, lambda x: A(dropout(x)) * scaling, B, None, (x,), modules=modules
            )
        return result + B(A(dropout(x))) * scaling if y is None else y
