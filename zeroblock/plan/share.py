"""One plan for all ranks of a process group.

Candidates round differently. Replicas whose ranks each measured, or read different caches, would differ in their last
bits. So with more than one rank nothing is measured (`PlannedOp._decided`), and `share_plans` puts the choices of rank
0 in the place of everyone's own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from . import planned
from .measure import place


def share_plans(group: dist.ProcessGroup | None = None) -> None:
    """Makes every rank of the group compute as rank 0 does: its measured choices, broadcast once.

    With more than one rank nothing is measured: each rank uses the choices stored in its own cache, and the fixed rule
    where there is none. After this call every rank uses the choices that rank 0 has stored for its device and number of
    threads, and the fixed rule where there is none: equal arguments give equal bits on ranks of equal hardware.
    `zeroblock.explain` says which it is. To have choices stored, run the same shapes once in a single process that has
    rank 0's cache directory, or on rank 0 before the process group is made.

    The choices hold until the process ends or the next call. A rank's cache is not changed. A rank that is run with
    ZEROBLOCK_PLAN=fixed keeps to the fixed rule; where rank 0 is, all do. Without a process group, or with one rank in
    it, nothing changes.

    Args:
        group: the process group, all of whose ranks must call this; None is the default group. Its rank 0 shares.

    Raises ValueError on a rank that is not in the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("share_plans: this rank is not in the group")
    if dist.get_world_size(group) == 1:
        return
    content = [_choices_here() if rank == 0 else {}]
    dist.broadcast_object_list(content, group=group, group_src=0)
    planned.adopt(content[0])


def _choices_here() -> dict[str, str]:
    """What is stored for the devices of this process, by situation without the place."""
    places = {place(torch.device("cpu"))}
    if torch.cuda.is_available():
        places.add(place(torch.device("cuda", torch.cuda.current_device())))
    found = {}
    for situation, entry in planned.own_choices().items():
        parts = situation.split(planned.SEPARATOR)
        if len(parts) == 3 and parts[1] in places:
            found[planned.SEPARATOR.join((parts[0], parts[2]))] = entry.choice
    return found
