"""Trains a U-Net of diffusers with accelerate, bfloat16 autocast and an average of its weights (EMA).

Two copies of the model, from the same weights and with the same noise: as diffusers made it, and accelerated. Printed:
the report, both losses, time and memory saved for backward of a step. The accelerated one is written as an ordinary
diffusers checkpoint (`save_pretrained`) and read back.
"""

import copy
import tempfile

import diffusers
import torch
import torch.nn.functional as F
from _example import Progress, options, pictures, seconds
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import zeroblock as zb
from zeroblock.testing import saved_activation_bytes

args = options(__doc__, steps=(40, "optimizer steps"), batch=(8, "pictures in a step"))
steps, size, width = (2, 16, 32) if args.quick else (args.steps, 32, 64)

torch.manual_seed(0)
eager = diffusers.UNet2DModel(
    sample_size=size,
    block_out_channels=(width, 2 * width),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
)
fast = copy.deepcopy(eager)
print(zb.accelerate(fast))  # in place: parameters, state_dict and class checks stay

schedule = diffusers.DDPMScheduler(num_train_timesteps=1000)
images = pictures(256, size)


class Training:
    def __init__(self, model):
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))

    def loss(self, clean, noise, timesteps):
        noisy = schedule.add_noise(clean, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.model(noisy, timesteps).sample
        return F.mse_loss(predicted.float(), noise)

    def step(self, *batch):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(*batch)
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)
        return loss.item()


runs = {"eager": Training(eager), "accelerated": Training(fast)}
losses = {name: [] for name in runs}
progress = Progress(lines=6)
random = torch.Generator().manual_seed(1)
for number in range(1, steps + 1):
    clean = images[torch.randint(len(images), (args.batch,), generator=random)]
    noise = torch.randn(clean.shape, generator=random)
    timesteps = torch.randint(0, 1000, (args.batch,), generator=random)
    for name, run in runs.items():
        losses[name].append(run.step(clean, noise, timesteps))
    progress("train", number, steps, "  ".join(f"{name} {values[-1]:.4f}" for name, values in losses.items()))
progress.close()

print(f"\n{'':12s} {'last losses':>12s} {'ms a step':>10s} {'saved MiB':>10s}")
for name, run in runs.items():
    last = sum(losses[name][-10:]) / len(losses[name][-10:])
    time = seconds(lambda run=run: run.step(clean, noise, timesteps), 1 if args.quick else 5)
    saved = saved_activation_bytes(lambda run=run: run.loss(clean, noise, timesteps), list(run.model.parameters()))
    print(f"{name:12s} {last:12.4f} {time * 1e3:10.1f} {saved / 2**20:10.1f}")

with tempfile.TemporaryDirectory() as folder:
    fast.save_pretrained(folder)
    again = diffusers.UNet2DModel.from_pretrained(folder)
same = all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), again.state_dict().values(), strict=True))
assert same and list(fast.state_dict()) == list(again.state_dict())
print("\nsaved as a diffusers checkpoint, read back: every weight is the same")
