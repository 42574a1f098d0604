"""One rank of the test of plans, a process of its own: exits 0 when it saw what a rank has to see.

Arguments: rank, world size, rendezvous file. Each rank's cache holds another choice for the same step, as two machines
would have measured them; rank 1 has one more, of a shape that rank 0 has not run.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import zeroblock as zb
from zeroblock.plan import planned as _plan

HERE = ("library", "other layout")  # the ways that rank 0 and rank 1 have stored
SHAPES = {"both": (2, 64, 32, 32), "only rank 1": (2, 64, 16, 16), "neither": (4, 64, 32, 32)}


def arguments(shape):
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g).bfloat16()  # noqa: E731
    return draw(*shape), draw(64, 64, 3, 3) / 24, draw(64), draw(*shape)


def result(shape):
    return zb.conv_residual(*arguments(shape))


def plan(shape):
    return zb.explain("conv_residual", *arguments(shape)).plans[0]


def gathered(tensor):
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return found


def never(name, run, device):
    raise AssertionError("nothing may be measured with more than one rank")


def prefers(way):
    def timer(name, run, device):
        run()
        return 0.1 if name == way else 1.0

    return timer


def stored_alone(rank: int, directory: Path) -> None:
    """What a process without a group measured before."""
    with _plan.use(timer=prefers(HERE[rank]), directory=directory):
        for name in ("both", "only rank 1")[: 1 + rank]:
            result(SHAPES[name])
            assert plan(SHAPES[name]).choice == HERE[rank]


def with_ranks(rank: int, directory: Path) -> None:
    with _plan.use(timer=never, directory=directory):
        own, last = plan(SHAPES["both"]), plan(SHAPES["neither"])
        assert (own.choice, own.why) == (HERE[rank], "the fastest as measured, stored on this rank"), own
        assert last.why == "fixed rule: with more than one rank nothing is measured", last
        first, second = gathered(result(SHAPES["both"]))
        assert not torch.equal(first, second), "the two ways round alike: this test shows nothing"
        first, second = gathered(result(SHAPES["neither"]))
        assert torch.equal(first, second)

        zb.share_plans()
        shared = plan(SHAPES["both"])
        assert (shared.choice, shared.why) == (HERE[0], "shared by rank 0"), shared
        for name in ("only rank 1", "neither"):
            assert plan(SHAPES[name]).why == "fixed rule: rank 0 shared no choice for it"
        for shape in SHAPES.values():
            first, second = gathered(result(shape))
            assert torch.equal(first, second), shape

        torch.set_num_threads(1 + rank)  # rank 0's choices are for its own number of threads, whatever the others'
        assert plan(SHAPES["both"]).choice == HERE[0]
        torch.set_num_threads(1)
        group = dist.new_group([1])  # every rank makes it, rank 1 alone is in it
        if rank == 0:
            try:
                zb.share_plans(group)
            except ValueError as error:
                assert "not in the group" in str(error)
            else:
                raise AssertionError("a rank outside the group was let in")
        else:
            zb.share_plans(group)
        assert plan(SHAPES["both"]).why == "shared by rank 0", "a group of one changes nothing"


def main(rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    directory = Path(rendezvous).parent / f"cache-{rank}"
    stored_alone(rank, directory)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    with_ranks(rank, directory)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
