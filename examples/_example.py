"""What the examples share: their options, small moving pictures to learn from, and a timer."""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
from torch import Tensor

if "--quick" in sys.argv:
    os.environ.setdefault("ZEROBLOCK_PLAN", "fixed")  # a rule chooses the kernels: none is measured

from zeroblock.tools.progress import Progress

__all__ = ["Progress", "options", "pictures", "seconds"]


def options(description: str, **more: tuple[object, str]) -> argparse.Namespace:
    """The command line: --quick, --steps, and `more` as {name: (default, help)}."""
    parser = argparse.ArgumentParser(
        description=description.strip().splitlines()[0],
        epilog="\n".join(description.strip().splitlines()[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds: to see that everything runs")
    for name, (default, text) in more.items():
        parser.add_argument(f"--{name}", default=default, type=type(default), help=f"{text} (default: {default})")
    return parser.parse_args()


def pictures(count: int, size: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    """[count, channels, size, size] in [-1, 1]: a soft disc in a random place, of a random colour."""
    random = torch.Generator().manual_seed(seed)
    grid = torch.linspace(-1, 1, size)
    centre = torch.rand(count, 2, 1, 1, generator=random) * 1.2 - 0.6
    radius = torch.rand(count, 1, 1, generator=random) * 0.3 + 0.2
    distance = ((grid[:, None] - centre[:, 0]) ** 2 + (grid - centre[:, 1]) ** 2).sqrt()
    disc = torch.sigmoid((radius - distance) * 20)[:, None]
    colour = torch.rand(count, channels, 1, 1, generator=random)
    return 2 * disc * colour - 1


def seconds(run, repeats: int) -> float:
    """The fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
