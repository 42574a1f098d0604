"""Decodes latents with an autoencoder of diffusers: as it is, accelerated, and accelerated and frozen.

Printed: time, the most memory held beside the weights, and the distance from the original's pictures.
"""

import copy
from pathlib import Path

import diffusers
import torch
from _example import Progress, options, seconds

import zeroblock as zb

args = options(__doc__, size=(32, "of the latents; pictures are 8 times as large"))
size, widths, repeats = (8, (32, 32), 1) if args.quick else (args.size, (64, 128, 128, 128), 3)


def peak_bytes(run) -> float:
    """How much more memory the process held during the call than before it, at most; on Linux, else nan."""
    process = Path("/proc/self")
    if not (process / "clear_refs").exists():
        return float("nan")

    def resident(which: str) -> int:
        return 1024 * int((process / "status").read_text().split(f"{which}:")[1].split()[0])

    (process / "clear_refs").write_text("5")  # the high-water mark begins anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


torch.manual_seed(0)
blocks = len(widths)
eager = diffusers.AutoencoderKL(
    block_out_channels=widths,
    down_block_types=("DownEncoderBlock2D",) * blocks,
    up_block_types=("UpDecoderBlock2D",) * blocks,
    latent_channels=4,
).eval()
accelerated = copy.deepcopy(eager)
print(zb.accelerate(accelerated))
frozen = copy.deepcopy(accelerated)
zb.freeze(frozen)

latents = torch.randn(1, 4, size, size)
progress = Progress()
print()
with torch.inference_mode():
    expected = eager.decode(latents).sample
    models = {"eager": eager, "accelerated": accelerated, "accelerated and frozen": frozen}
    for number, (name, model) in enumerate(models.items(), 1):
        progress("time", number, len(models), name)
        error = ((model.decode(latents).sample - expected).abs().max() / expected.abs().max()).item()
        assert error < 1e-3, (name, error)
        peak = peak_bytes(lambda model=model: model.decode(latents))
        time = seconds(lambda model=model: model.decode(latents), repeats)
        progress.close()
        print(f"{name:24s} {time * 1e3:8.1f} ms, peak {peak / 2**20:6.1f} MiB, off by {error:.0e} of the largest")
