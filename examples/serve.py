"""Serves a U-Net of diffusers on the CPU: accelerate, freeze, several threads; and torch.compile beside it.

`zb.freeze` packs the weights once, as the convolutions compute with them, and folds what is zero. Several requests are
answered at once from threads; every answer is the one that the eager model gives, up to rounding.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import diffusers
import torch
from _example import Progress, options, seconds

import zeroblock as zb

args = options(__doc__, requests=(8, "answered by the threads"), threads=(2, "that answer"))
size, width, repeats = (16, 32, 1) if args.quick else (32, 64, 5)

torch.manual_seed(0)
eager = diffusers.UNet2DModel(
    sample_size=size,
    block_out_channels=(width, 2 * width),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
).eval()
eager = eager.to(memory_format=torch.channels_last)
accelerated = copy.deepcopy(eager)
zb.accelerate(accelerated)
frozen = copy.deepcopy(eager)
zb.accelerate(frozen)
print(zb.freeze(frozen))

models = {"eager": eager, "accelerated": accelerated, "accelerated and frozen": frozen}
if not args.quick:
    models["torch.compile"] = torch.compile(eager)
    models["accelerated and compiled"] = torch.compile(copy.deepcopy(accelerated))

x, timestep = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last), torch.tensor(500)
progress = Progress()
print()
with torch.inference_mode():
    expected = eager(x, timestep).sample
    for number, (name, model) in enumerate(models.items(), 1):
        progress("time", number, len(models), name)
        error = (model(x, timestep).sample - expected).abs().max().item()
        assert error < 1e-3, (name, error)
        time = seconds(lambda model=model: model(x, timestep), repeats)
        progress.close()
        print(f"{name:26s} {time * 1e3:8.2f} ms, off by {error:.1e}")


def answer(seed: int) -> tuple[int, float]:
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return seed, (frozen(noise, timestep).sample - eager(noise, timestep).sample).abs().max().item()


with ThreadPoolExecutor(args.threads) as pool:
    answers = list(pool.map(answer, range(args.requests)))
assert all(error < 1e-3 for _, error in answers)
print(f"\n{len(answers)} requests from {args.threads} threads: off by at most {max(e for _, e in answers):.1e}")
