"""Data-parallel training with DDP or FSDP2, under torchrun.

    torchrun --nproc-per-node 2 examples/train_distributed.py --engine ddp     (or: --engine fsdp2)

Accelerate first, then wrap. With more than one rank nothing is measured during training; `zb.share_plans()` gives every
rank what rank 0 has measured before, so that all run the same kernels. Without torchrun it runs as one process.
"""

import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _example import Progress, options, pictures
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import zeroblock as zb
from zeroblock.testing import eager
from zeroblock.tools import models

args = options(__doc__, engine=("ddp", "ddp or fsdp2"), steps=(30, "optimizer steps"))
steps = 2 if args.quick else args.steps
for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}.items():
    os.environ.setdefault(name, value)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same weights everywhere
model = models.DiT(eager, hidden_size=96, depth=3, num_heads=3)
report = zb.accelerate(model)
zb.share_plans()
if args.engine == "fsdp2":
    for block in model.blocks:
        fully_shard(block)
    trained = fully_shard(model)
else:
    trained = DistributedDataParallel(model)
if rank == 0:
    print(report)

optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
images = pictures(256, 16, channels=1)[rank::ranks]  # each rank its own share
progress = Progress(lines=4 if rank == 0 else 0)
torch.manual_seed(1 + rank)
for number in range(1, steps + 1):
    clean = images[torch.randint(len(images), (8,))]
    noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (8,))
    signal = (timesteps / 1000 * torch.pi / 2).cos()[:, None, None, None]
    noisy = signal * clean + (1 - signal**2).sqrt() * noise
    loss = F.mse_loss(trained(noisy, timesteps, torch.zeros(8, dtype=torch.long)), noise)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        progress("train", number, steps, f"loss {loss.item():.4f}")
progress.close()

mean = loss.detach().clone()
dist.all_reduce(mean)
if rank == 0:
    print(f"{args.engine}, {ranks} rank{'s' * (ranks > 1)}: last loss, mean of the ranks: {mean.item() / ranks:.4f}")
# What holds the group goes first, and the ranks leave together: else a thread of gloo may outlive the group, and abort.
del trained, model, optimizer, loss, mean
gc.collect()
dist.barrier()
dist.destroy_process_group()
