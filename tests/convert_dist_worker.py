"""One rank of the distributed tests of accelerate(), a process of its own: exits 0 when everything is as without it.

Arguments: rank, world size, rendezvous file. Every wrapping trains an accelerated and an untouched model side by side.
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import zeroblock as zb
from zeroblock.testing import counters, eager, reset_counters

DDP_MODES = {
    "default": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "find unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(eager.ResBlock(64, 8, 0.0, use_scale_shift_norm=True) for _ in range(2))
        self.out = eager.zero_module(nn.Conv2d(64, 3, 1))

    def forward(self, x, emb):
        for block in self.blocks:
            x = block(x, emb)
        return self.out(x)


def pair():
    torch.manual_seed(0)
    theirs = Net().double()
    return copy.deepcopy(theirs), theirs


def train(model, rank, steps=4):
    """[gradients at every step, then the parameters], whole tensors."""
    step = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(1 + rank)
    seen = []
    for _ in range(steps):
        x, emb = torch.randn(1, 64, 4, 4).double(), torch.randn(1, 8).double()
        step.zero_grad()
        (model(x, emb) - 1).square().mean().backward()
        seen += [None if p.grad is None else whole(p.grad).clone() for p in model.parameters()]
        step.step()
    return seen + [whole(p.detach()).clone() for p in model.parameters()]


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def compare(ours, theirs, what):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), f"{what}: {i}"
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, i=i: f"{what}, {i}: {m}")


def ddp(rank, mode):
    ours, theirs = pair()
    assert zb.accelerate(ours).blocks == 3
    reset_counters()
    got = train(DistributedDataParallel(ours, **DDP_MODES[mode]), rank)
    assert counters()["ResBlock"][1] == 4 and counters()["ResBlock"][0] == 4, (mode, counters())
    compare(got, train(DistributedDataParallel(theirs, **DDP_MODES[mode]), rank), mode)


def fsdp(rank, mesh, first, half):
    """half: the first half of each last convolution is zero, all of what rank 0 holds and half of what there is."""
    ours, theirs = pair()
    for block in (*ours.blocks, *theirs.blocks):
        if half:
            block.out_layers[3].weight.data[32:] = 0.01
    if first == "accelerate":
        assert zb.accelerate(ours).blocks == 3
    for model in (ours, theirs):
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if first == "shard":
        report = zb.accelerate(ours)
        assert report.blocks == 2 and all(b.zero is None for b in report.branches), report
    weight = ours.blocks[0].out_layers[3].weight.to_local()
    assert weight.any() == (half and rank == 1)
    reset_counters()
    got = train(ours, rank)
    assert counters()["ResBlock"] == ((8, 0) if half else (4, 4)), counters()
    compare(got, train(theirs, rank), f"FSDP, {first} first")


def main(rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    for mode in DDP_MODES:
        ddp(rank, mode)
    mesh = init_device_mesh("cpu", (world,))
    for first in ("accelerate", "shard"):
        for half in (False, True):
            fsdp(rank, mesh, first, half)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
