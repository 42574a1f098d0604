"""How exact Winograd's F(4x4) is in float32, beside the library's convolution, both against fp64.

`python -m tests.ops.winograd_errors` prints the table behind the numbers in zeroblock/plan/README.md.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroblock.steps import winograd
from zeroblock.steps.conv import ConvCall, unit_geometry
from zeroblock.steps.conv_bwd import ConvGradsCall

# C, K, H, W
SHAPES = [(32, 48, 17, 23), (64, 64, 32, 32), (128, 128, 16, 16), (320, 320, 32, 32), (512, 64, 9, 12)]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
PADDING = (1, 1)


class Errors(NamedTuple):
    """Of one result: in the L2 norm, and in the maximum norm, each relative to that norm of the result."""

    l2: float
    max: float


def errors(got: Tensor, exact: Tensor) -> Errors:
    difference = got.double() - exact
    return Errors(float(difference.norm() / exact.norm()), float(difference.abs().max() / exact.abs().max()))


def results(shape: tuple[int, int, int, int], layout: torch.memory_format, tile: int) -> dict[str, tuple[Tensor, ...]]:
    """{"y", "dx", "dweight": (ours, the library's, exact)} of random numbers."""
    from zeroblock.backends.cpu import CPU

    C, K, H, W = shape
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, n, H, W, generator=g).to(memory_format=layout) for n in (C, K))
    weight = torch.randn(K, C, 3, 3, generator=g) / (3 * C**0.5)

    def by_library(dtype: torch.dtype) -> list[Tensor]:
        a, w, d = x.to(dtype), weight.to(dtype), dy.to(dtype)
        rest = None, [1, 1], PADDING, [1, 1], False, [0, 0], 1, [True, True, False]
        return [F.conv2d(a, w, padding=1), *torch.ops.aten.convolution_backward(d, a, w, *rest)[:2]]

    ours = winograd.conv(tile, ConvCall(CPU, x, weight, None, None, unit_geometry(PADDING)))
    call = ConvGradsCall(CPU, dy, x, weight, False, PADDING, (True, True, False))
    ours = [ours, *winograd.conv_grads(tile, call)[:2]]
    found = zip(ours, by_library(torch.float32), by_library(torch.float64), strict=True)
    return dict(zip(("y", "dx", "dweight"), found, strict=True))


def main() -> None:
    ratios: dict[str, list[float]] = {"l2": [], "max": []}
    ours: dict[str, list[float]] = {"l2": [], "max": []}
    for shape, (name, layout) in itertools.product(SHAPES, FORMATS.items()):
        for what, (got, library, exact) in results(shape, layout, 4).items():
            mine, theirs = errors(got, exact), errors(library, exact)
            for norm in ratios:
                ours[norm].append(getattr(mine, norm))
                ratios[norm].append(getattr(mine, norm) / getattr(theirs, norm))
            both = zip(("L2", "max"), mine, theirs, strict=True)
            found = (f"{n}: {e:.2e} / {t:.2e} = {e / t:.1f}x" for n, e, t in both)
            print(f"{shape} {name} {what:<8}", *found, sep="  ")
    for norm in ratios:
        times = f"{min(ratios[norm]):.1f} to {max(ratios[norm]):.1f} times the library's"
        print(f"{norm}: error {min(ours[norm]):.1e} to {max(ours[norm]):.1e}, {times}")


if __name__ == "__main__":
    main()
