"""NVlabs/edm2's gains: scalars that are zero at the start, multiplied into a layer's weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.decision import SKIPS, decide
from ..family import Family, lacks, register
from ..report import Obstacle, Reason
from .whole_skip import InferenceSkip, batches


@register
class MPConv(Family):
    """y = conv(x, gain * w / |w|) or x @ (gain * w / |w|)^T, gain being a parameter of the caller or 1.

    Source: NVlabs/edm2 `training/networks_edm2.MPConv`: Block.emb_linear by emb_gain, UNet.out_conv by out_gain.
    Use: zb.accelerate(net).
    Inference: while gain is a tensor that is zero the result is zeros, without normalisation and matmul.
    Training forward: unchanged, the original runs: each forward writes the normalised weight back.
    Training backward: unchanged.
    """

    name = "MPConv"
    classes = ("MPConv",)

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        missing = lacks(block, "weight", "out_channels")
        known = missing or block.weight.dim() in (2, 4)
        return missing or (None if known else Obstacle(Reason.NAMESAKE, "its weight is neither a matrix nor a kernel"))

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        return {}

    def example(self, block: Any, side: int) -> tuple:
        size = () if block.weight.dim() == 2 else (2 * side, 4)
        return torch.randn(2, block.weight.shape[1], *size), torch.tensor(0.7)

    def options(self, block: Any) -> dict[str, tuple]:
        return {"gain": (torch.tensor(0.0), torch.tensor(0.7))}

    def forward(self, block: Any, x: Tensor, gain: Any = 1) -> Tensor:
        if isinstance(gain, Tensor) and not torch.is_grad_enabled() and not block.training:
            if decide(self.name, self.zero_skip, (gain,)) in SKIPS:
                return x.new_zeros(x.shape[0], block.weight.shape[0], *x.shape[2:])
        return self.eager(block, x, gain)


@register
class EDM2UNet(InferenceSkip):
    """The network of EDM2: out_conv(dec(enc(x, emb), emb), gain=out_gain), out_gain zero at the start.

    Source: NVlabs/edm2 `training/networks_edm2.UNet`.
    Use: zb.accelerate(net) for the network or the Precond around it.
    Inference: while out_gain is zero the result is zeros and nothing runs (once for every size it does, to be
    compared).
    Training forward: unchanged, the original runs. Training backward: unchanged.
    """

    name = "EDM2UNet"
    classes = ("UNet",)

    def knows(self, block: Any) -> bool:
        return super().knows(block) and hasattr(block, "out_gain")

    def match(self, block: Any, path: str, root: nn.Module) -> Obstacle | None:
        return lacks(block, "enc", "dec", "out_conv.weight", "out_gain")

    def judged_tensors(self, block: Any) -> tuple[Tensor, ...]:
        return (block.out_gain,)

    def branches(self, block: Any) -> dict[str, tuple[Tensor, ...]]:
        found: dict[str, tuple[Tensor, ...]] = {"out_gain": (block.out_gain,)}
        for path, m in block.named_modules():
            if hasattr(m, "emb_gain"):
                found[f"{path}.emb_gain"] = (m.emb_gain,)
        return found

    def forward(self, block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.skips(block):
            return self.eager(block, x, *args, **kwargs)
        key = (x.shape, x.dtype, *batches(x, args, kwargs))
        y = x.new_zeros(x.shape[0], block.out_conv.weight.shape[0], *x.shape[2:])
        return self.predicted(block, key, y, lambda: self.eager(block, x, *args, **kwargs))
