"""One rank of the distributed tests of accelerate(), a process of its own: exits 0 when everything is as without it.

Arguments: rank, world size, rendezvous file, models. Every wrapping trains an accelerated and an untouched model side
by side.
"""

import copy
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DistributedDataParallel

import zeroblock as zb
from zeroblock.blocks import tiny
from zeroblock.convert import Reason
from zeroblock.testing import counters, eager, reset_counters

tiny.IMAGES = tiny.TOKENS = 0  # as in conftest.py: the models here are tiny

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


class DiT(nn.Module):
    """diffusers' DiT as its authors start it."""

    def __init__(self):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.net = DiTTransformer2DModel(2, 8, 4, num_layers=2, sample_size=4, num_embeds_ada_norm=10)
        self.blocks = []  # sharded as a whole: the model itself calls a part of its first block
        for layer in (*(block.norm1.linear for block in self.net.transformer_blocks), self.net.proj_out_2):
            eager.zero_module(layer)

    def forward(self, x, emb):
        index = torch.tensor([1])
        return self.net(x, index, index, return_dict=False)[0]


class LoRA(nn.Module):
    """A frozen net with trained adapters."""

    def __init__(self):
        super().__init__()
        import peft

        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0.0", "1.0"]), self)

    def forward(self, x, emb):
        for block in self.blocks:
            x = x + block(x)
        return x


class Model(NamedTuple):
    """How it is made, the size of its input, {family: (branches executed, skipped)} of four steps of training; the
    names of its zero layers, of which half is zero in a part of the tests."""

    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    counters: dict[str, tuple[int, int]]
    half: Callable[[nn.Module], torch.Tensor] | None = None


MODELS = {
    "guided": Model(Net, (1, 64, 4, 4), {"ResBlock": (4, 4)}, lambda block: block.out_layers[3].weight),
    "dit": Model(DiT, (1, 4, 4, 4), {"BasicTransformerBlock": (8, 8)}),
    "lora": Model(LoRA, (1, 3, 8), {"LoRA": (6, 2)}),
}


def pair(model):
    torch.manual_seed(0)
    theirs = model.make().double()
    return copy.deepcopy(theirs), theirs


def train(model, size, rank, steps=4):
    """[gradients at every step, then the parameters], whole tensors."""
    step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    torch.manual_seed(1 + rank)
    seen = []
    for _ in range(steps):
        x, emb = torch.randn(size).double(), torch.randn(1, 8).double()
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


def ddp(model, rank, mode):
    ours, theirs = pair(model)
    assert not zb.accelerate(ours).left_alone
    reset_counters()
    got = train(DistributedDataParallel(ours, **DDP_MODES[mode]), model.size, rank)
    assert counters().items() >= model.counters.items(), (mode, counters())
    compare(got, train(DistributedDataParallel(theirs, **DDP_MODES[mode]), model.size, rank), mode)


def fsdp(model, rank, mesh, first, half):
    """half: the first half of each zero layer is zero, all of what rank 0 holds and half of what there is."""
    ours, theirs = pair(model)
    for block in (*ours.blocks, *theirs.blocks):
        if half:
            weight = model.half(block).data
            weight[len(weight) // 2 :] = 0.01
    if first == "accelerate":
        assert not zb.accelerate(ours).left_alone
    for net in (ours, theirs):
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    if first == "shard":
        report = zb.accelerate(ours)
        assert not report.left_alone and all(b.zero is None for b in report.branches), report
    if model.half:
        assert model.half(ours.blocks[0]).to_local().any() == (half and rank == 1)
    reset_counters()
    got = train(ours, model.size, rank)
    expected = {name: (sum(counts), 0) if half else counts for name, counts in model.counters.items()}
    assert counters().items() >= expected.items(), counters()
    compare(got, train(theirs, model.size, rank), f"FSDP, {first} first")


def distributed(model, mesh):
    """Weights that stay distributed are the original's; the report says which block that is."""
    ours, _ = pair(model)
    distribute_module(ours.blocks[0], mesh)
    report = zb.accelerate(ours)
    assert [(b.path, b.kind) for b in report.left_alone] == [("blocks.0", Reason.DISTRIBUTED)], report
    assert not any(b.path.startswith("blocks.0") for b in report.branches), report


def main(rank: int, world: int, rendezvous: str, *names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for name in names:
        print(name, flush=True)
        model = MODELS[name]
        for mode in DDP_MODES:
            ddp(model, rank, mode)
        for first in ("accelerate", "shard"):
            for half in (False, True) if model.half else (False,):
                fsdp(model, rank, mesh, first, half)
        if name == "guided":
            distributed(model, mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
