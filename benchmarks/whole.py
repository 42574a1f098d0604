"""Whole models end to end: a small ADM U-Net and DiT-S/2, ours (eager blocks against zeroblock's) and those of
diffusers (as they are against `zb.accelerate`). Nothing is zero.

Group "whole": time. Group "peak": the most memory that a process takes, as the system counts it: each side builds its
model in a child process of its own (this file as a script) and takes two steps. "saved": bytes kept for backward.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from blocks import module_work
from cases import MODES, Case, Work
from torch import Tensor, nn

import zeroblock as zb
from zeroblock.testing import eager
from zeroblock.tools import models

try:
    import diffusers
except ImportError:
    diffusers = None

SIDES = ("eager", "zeroblock")
FROZEN = "_frozen"  # what the names of cases end with whose model is frozen for inference


class Fixed(nn.Module):
    """A model as a function of its images alone."""

    def __init__(self, model: nn.Module, *conditions: Tensor, **options):
        super().__init__()
        self.model, self.conditions, self.options = model, conditions, options

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x, *self.conditions, **self.options)
        return y if isinstance(y, Tensor) else y[0]


def _conditions(batch: int) -> tuple[Tensor, Tensor]:
    """Timesteps and class labels."""
    return torch.arange(10, 10 + batch), torch.arange(batch)


def _adm_unet(quick: bool, own: bool) -> tuple[nn.Module, Tensor]:
    """Three levels of 64, 128 and 192 channels on 64 x 64 images, attention at 16 x 16."""
    width, mult, size, batch = (32, (1, 2), 8, 1) if quick else (64, (1, 2, 3), 64, 2)
    model = models.UNet(zb.nn if own else eager, in_channels=3, model_channels=width, channel_mult=mult)
    return Fixed(model, *_conditions(batch)), torch.randn(batch, 3, size, size)


def _unet2d(quick: bool, own: bool) -> tuple[nn.Module, Tensor]:
    """The same widths and sizes."""
    widths, size, batch = ((32, 64), 8, 1) if quick else ((64, 128, 192), 64, 2)
    plain = len(widths) - 1
    model = diffusers.UNet2DModel(
        sample_size=size, layers_per_block=1, block_out_channels=widths, attention_head_dim=widths[-1] // 4,
        down_block_types=(*("DownBlock2D",) * plain, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *("UpBlock2D",) * plain),
    )  # fmt: skip
    return _diffusers(model, own, torch.tensor(10)), torch.randn(batch, 3, size, size)


def _dit_s2(quick: bool, own: bool) -> tuple[nn.Module, Tensor]:
    """12 blocks of 384 on the 256 patches of 32 x 32 latents."""
    heads, depth, size, batch = (2, 1, 4, 1) if quick else (6, 12, 32, 2)
    model = models.DiT(
        zb.nn if own else eager, image_size=size, in_channels=4, hidden_size=64 * heads, depth=depth, num_heads=heads,
        num_classes=1000,
    )  # fmt: skip
    return Fixed(model, *_conditions(batch)), torch.randn(batch, 4, size, size)


def _dit_s2_diffusers(quick: bool, own: bool) -> tuple[nn.Module, Tensor]:
    heads, depth, size, batch = (2, 1, 4, 1) if quick else (6, 12, 32, 2)
    model = diffusers.DiTTransformer2DModel(heads, 64, 4, num_layers=depth, sample_size=size)
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # labels dropped at random would make the two sides different work
    return _diffusers(model, own, *_conditions(batch)), torch.randn(batch, 4, size, size)


def _diffusers(model: nn.Module, own: bool, *conditions: Tensor) -> Fixed:
    if own and not zb.accelerate(model).blocks:
        raise RuntimeError("no block was accelerated")
    return Fixed(model, *conditions, return_dict=False)


MODELS = {"adm_unet": _adm_unet, "dit_s2": _dit_s2}
if diffusers is not None:
    MODELS |= {"unet2d": _unet2d, "dit_s2_diffusers": _dit_s2_diffusers}


def build(op: str, side: str, mode: str, quick: bool) -> tuple[nn.Module, Tensor]:
    """One side's model and images; both sides have the same weights, none of them zero throughout."""
    torch.manual_seed(0)
    model, x = MODELS[op.removesuffix(FROZEN)](quick, side == "zeroblock")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    model.train(mode == "training")
    if op.endswith(FROZEN) and side == "zeroblock":
        zb.freeze(model)
    return model, x


def _work(quick: bool) -> Callable[[Case], Work]:
    def both(case: Case) -> Work:
        (plain, x), (own, _) = (build(case.op, side, case.mode, quick) for side in SIDES)
        return module_work(plain, own, (x,), case.mode)

    return both


def cases(quick: bool, group: str = "whole") -> Iterator[Case]:
    if diffusers is None:
        print("diffusers is not installed: only the models of zeroblock")
    brief = group == "saved" or (group == "peak" and quick)  # two processes a case
    for op in MODELS:
        for mode in ("training",) if brief else MODES:
            yield Case(group, op, "quick" * quick, "", "fp32", mode, _work(quick))
        if not brief:
            yield Case(group, op + FROZEN, "quick" * quick, "", "fp32", "inference", _work(quick))
        if group == "peak" and quick:
            return


def high_water(case: Case) -> tuple[int, int, float]:
    """(eager's, zeroblock's, eager's before its first step): the most bytes their processes ever held."""
    work = case.work()
    with torch.set_grad_enabled(case.mode == "training"):
        work.own.step(case.mode)()  # measures the plans, so that the child finds them on disk and measures none
    arguments = [case.op, case.mode, str(torch.get_num_threads()), *(["--quick"] if case.shape else [])]
    found = []
    for side in SIDES:
        command = [sys.executable, str(Path(__file__)), side, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{side}: {done.stderr.strip().splitlines()[-1]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found[0]["peak"], found[1]["peak"], float(found[0]["before"])


def _most_resident() -> int:
    """Bytes. Not from getrusage where /proc is at hand: a child's ru_maxrss begins with its parent's size."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _child() -> None:
    parser = argparse.ArgumentParser(description="Two steps of one side of a model; prints its memory as JSON.")
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("op")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("threads", type=int)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, x = build(options.op, options.side, options.mode, options.quick)
    work = module_work(model, model, (x,), options.mode)
    before = _most_resident()
    with torch.set_grad_enabled(options.mode == "training"):
        step = work.own.step(options.mode)
        for _ in range(2):
            step()
    print(json.dumps({"peak": _most_resident(), "before": before}))


if __name__ == "__main__":
    _child()
