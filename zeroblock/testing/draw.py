"""Seeded inputs for op cases, in the layouts that users' tensors come in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Inputs = dict[str, Tensor | None]
Size = Sequence[int]


class Draw:
    """Seeded normal tensors of one dtype, on one device, in one layout.

    Layouts: "dense"; "nhwc", images channels-last; "strided", every tensor a view of a larger one that is dense in no
    dimension order. Per-sample vectors are chunks of one [B, k * D] tensor in all of them, as in a DiT block.
    """

    def __init__(self, dtype: torch.dtype, layout: str = "dense", seed: int = 0, device: str = "cpu"):
        self.dtype, self.layout, self.device = dtype, layout, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """A dense tensor."""
        return (torch.randn(size, generator=self.generator) * std + mean).to(self.device, self.dtype)

    def tensor(self, *size: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """A tensor in the layout."""
        if self.layout == "strided":
            larger = self.normal(*(n + 3 for n in size[:-1]), 2 * size[-1] + 3, mean=mean, std=std)
            for dim in range(len(size) - 1):
                larger = larger.narrow(dim, 2, size[dim])
            return larger[..., 3 : 2 * size[-1] + 3 : 2]
        t = self.normal(*size, mean=mean, std=std)
        if self.layout == "nhwc":
            return t.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[t.dim()])
        return t

    def tokens(self, B: int, T: int, D: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """[B, T, D]; strided: rows of a larger tensor with T outermost."""
        if self.layout == "strided":
            return self.normal(T, B + 1, D + 5, mean=mean, std=std)[:, 1:, 3 : D + 3].transpose(0, 1)
        return self.normal(B, T, D, mean=mean, std=std)

    def vector(self, n: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        step = 2 if self.layout == "strided" else 1
        return self.normal(step * n, mean=mean, std=std)[::step]

    def chunks(self, B: int, D: int, count: int) -> list[Tensor]:
        """`count` chunks [B, D] of one tensor."""
        step = 2 if self.layout == "strided" else 1
        return list(self.normal(B, (count + 2) * D * step)[:, ::step].chunk(count + 2, dim=1))[1:-1]

    def gate(self, kind: str, B: int, T: int, D: int) -> Tensor:
        """kind: "one" [1], "d" [D], "bd" [B, D] or "btd" [B, T, D]."""
        if kind == "btd":
            return self.tokens(B, T, D)
        return self.chunks(B, D, 1)[0] if kind == "bd" else self.vector(1 if kind == "one" else D)

    def modulation(self, kind: str, B: int, T: int, D: int) -> tuple[Tensor | None, Tensor | None]:
        """(shift, scale); kind: "bd", "btd", "mixed" (shift [B, T, D], scale [B, D]), "shift", "scale" or "none"."""
        shift, scale = self.chunks(B, D, 2)
        if kind in ("btd", "mixed"):
            shift = self.tokens(B, T, D)
        if kind == "btd":
            scale = self.tokens(B, T, D)
        return None if kind in ("scale", "none") else shift, None if kind in ("shift", "none") else scale


def norm_operands(draw: Draw, N: int, C: int, affine: str, film: bool) -> list[Tensor | None]:
    """[weight, bias, scale, shift]; affine: one of AFFINE"""
    weight = draw.vector(C, 1.0) if affine in ("both", "weight") else None
    bias = draw.vector(C) if affine in ("both", "bias") else None
    return [weight, bias, *(draw.chunks(N, C, 2) if film else (None, None))]
