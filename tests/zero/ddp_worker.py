"""One rank of the DDP test, a process of its own: exits 0 when every gradient is the mean of eager's.

Arguments: rank, world size, rendezvous file.
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import zeroblock as zb
from zeroblock.testing import eager


def make(ns):
    torch.manual_seed(0)
    blocks = [ns.ResBlock(32, 16, 0.0, use_scale_shift_norm=True).double() for _ in range(2)]
    for block in blocks[1:]:
        block.load_state_dict(blocks[0].state_dict())
    return torch.nn.ModuleList(blocks)


class Net(torch.nn.Module):
    def __init__(self, ns):
        super().__init__()
        self.blocks = make(ns)

    def forward(self, x, emb):
        for block in self.blocks:
            x = block(x, emb)
        return x


def example(rank):
    torch.manual_seed(1 + rank)
    return torch.randn(1, 32, 4, 4).double(), torch.randn(1, 16).double()


def main(rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    ours, theirs = Net(zb.nn), Net(eager)
    ddp = DistributedDataParallel(ours)
    for step in range(2):  # the second backward finds out whether the first one's reduction finished
        if step == 1:  # one block has left its zero phase
            for net in (ours, theirs):
                net.blocks[1].out_layers[3].weight.data.fill_(0.1)
        ddp.zero_grad()
        theirs.zero_grad()
        ddp(*example(rank)).square().sum().backward()
        for r in range(world):
            (theirs(*example(r)).square().sum() / world).backward()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None, name
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
