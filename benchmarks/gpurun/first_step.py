"""What the first training step of Stable Diffusion 1.5's U-Net compiles, in CPU seconds of Triton and its assembler:
`PYTHONPATH=.:benchmarks python -m gpurun.first_step [--rule] [--target sm_90]`.

The step (bf16, batch 2, 64 x 64 latents) is recorded on meta tensors, so it needs no GPU. The plan tries every way that
it would measure there; --rule: ZEROBLOCK_PLAN=fixed, which tries none. Nothing comes from a cache.
"""

from __future__ import annotations

import argparse
import collections
import os
import tempfile
from typing import Any

import torch

import zeroblock as zb
from zeroblock.kernels import _launch
from zeroblock.plan import planned

from .cache import Launch, distinct, meta_goes_as_a_gpu

DTYPE = torch.bfloat16


def unet(channels: tuple[int, ...] = (320, 640, 1280, 1280)) -> Any:
    import diffusers

    attends = len(channels) - 1
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(
            sample_size=64,
            block_out_channels=channels,
            cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * attends + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attends,
        )
    zb.accelerate(model)
    return model.to(dtype=DTYPE).train()


def step(model: Any, policy: str) -> list[Launch]:
    """The distinct launches of a training step; where ways are measured, of all of them."""
    x, context = (torch.empty(size, device="meta", dtype=DTYPE) for size in ((2, 4, 64, 64), (2, 77, 768)))
    launches: list[Launch] = []
    # As if the library were the slowest way, then as if it were the fastest.
    for library in (2.0, 0.5) if policy == "measure" else (1.0,):
        timer = lambda name, run, device: library if name == "library" else 1.0  # noqa: E731, B023
        with meta_goes_as_a_gpu(), planned.use(policy, timer=timer), _launch.recording(run=False) as recorded:
            y = model(x, torch.empty(2, device="meta", dtype=torch.long), context, return_dict=False)[0]
            y.sum().backward()
        launches += recorded
    return distinct(launches)


def compile(launch: Launch, target: str) -> float:
    """The CPU seconds of compiling one kernel."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        import triton
        from triton.backends.compiler import GPUTarget

        before = sum(os.times()[:4])
        triton.compile(launch.source(), target=GPUTarget("cuda", int(target[3:]), 32), options=launch.options_for(32))
        return sum(os.times()[:4]) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", action="store_true")
    parser.add_argument("--target", default="sm_90")
    options = parser.parse_args()
    launches = step(unet(), "fixed" if options.rule else "measure")
    taken: dict[str, list[float]] = collections.defaultdict(list)
    compile(launches[0], options.target)  # the first kernel of a process loads the compiler, too
    for launch in launches:
        taken[launch.kernel.__name__].append(compile(launch, options.target))
    for name, seconds in taken.items():
        print(f"{sum(seconds):6.1f} {name}: {len(seconds)} kernels, {min(seconds):.2f} to {max(seconds):.2f}")
    every = [s for seconds in taken.values() for s in seconds]
    print(f"{sum(every):6.1f} CPU seconds in all for {len(every)} kernels, the longest {max(every):.2f}")


if __name__ == "__main__":
    main()
