"""What skipping parts of a zero would gain: `python benchmarks/finer_zeros.py` (docs/zero-branches.md quotes it).

Output channels of a ResBlock's last convolution that are zero (pruned), and samples whose gates are zero. Compared with
the dense call are the least that a skip by parts does: find the parts that are not zero, compute those, put the results
where they belong. Prints medians in microseconds.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import zeroblock as zb

SHAPES = (2, 128, 64, 64), (2, 512, 16, 16), (1, 320, 64, 64), (1, 1280, 16, 16)


def medians(*functions: Callable[[], object], seconds: float = 1.5) -> list[float]:
    """Microseconds of each, called in turns."""
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            found.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(found) for found in times]


def kept_rows(weight: Tensor) -> Tensor:
    """The output channels that are not zero: the first element of most tells, and where it is zero all are read."""
    kept = weight[:, 0, 0, 0] != 0
    if not kept.all():
        doubtful = (~kept).nonzero().flatten()
        kept[doubtful] = weight[doubtful].flatten(1).any(1)
    return kept.nonzero().flatten()


def pruned_channels(shape: tuple[int, ...], share: float) -> str:
    channels = shape[1]
    h, residual = torch.randn(shape), torch.randn(shape)
    weight, bias = 0.02 * torch.randn(channels, channels, 3, 3), torch.randn(channels)
    weight[torch.randperm(channels)[: round(share * channels)]] = 0

    def dense() -> Tensor:
        return zb.conv_residual(h, weight, bias, residual)

    def parts() -> Tensor:
        kept = kept_rows(weight)
        y = residual + bias[:, None, None]
        found = zb.conv_residual(h, weight[kept], None, residual[:, kept])
        return y.index_copy_(1, kept, found.add_(bias[kept, None, None]))

    torch.testing.assert_close(parts(), dense(), rtol=1e-3, atol=1e-3)
    whole, by_parts, scan = medians(dense, parts, lambda: kept_rows(weight))
    return f"{whole:9.0f}{by_parts:9.0f}{whole / by_parts:7.2f}x   scan {scan:.0f} us, {100 * scan / whole:.2f} %"


def zero_samples() -> str:
    """A DiT block of a batch of two, one sample of which has zero gates."""
    block = zb.nn.DiTBlock(384, 6)
    for p in block.parameters():
        p.normal_(std=0.02)
    x, c = torch.randn(2, 256, 384), torch.randn(2, 384)

    def parts() -> Tensor:
        vectors = block.adaLN_modulation(c).unflatten(1, (6, -1))[:, [2, 5]]
        kept = vectors.flatten(1).any(1).nonzero().flatten()[:1]  # as if the other sample's were zero
        return x.clone().index_copy_(0, kept, block(x[kept], c[kept]))

    whole, by_parts = medians(lambda: block(x, c), parts)
    return f"{whole:9.0f}{by_parts:9.0f}{whole / by_parts:7.2f}x"


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        for shape in SHAPES:
            for share in (0.0, 0.25, 0.5, 0.75):
                print(f"{share:4.0%} of channels zero, {shape!s:20}{pruned_channels(shape, share)}", flush=True)
        print(f"one of two samples zero, DiT block   {zero_samples()}")
