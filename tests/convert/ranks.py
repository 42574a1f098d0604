"""Starts a distributed test: one process for each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..support import HANG


def run_on_two_ranks(worker: Path, folder: Path, *arguments: str) -> None:
    """The script `worker`, with rank, world size, a rendezvous file in `folder` and the arguments; both must exit 0."""
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(worker),
                str(rank),
                "2",
                str(folder / "rendezvous"),
                *arguments,
            ],
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # else this folder's triton stands in for a missing package
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=HANG)[0] for rank in ranks]
    finally:
        for rank in ranks:  # one that failed leaves the other waiting
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
