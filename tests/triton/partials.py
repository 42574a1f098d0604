"""What partial sums add to the bytes of the row norms' backward, exactly, of the tensors that a launch is given:
`python -m tests.triton.partials` prints it. Nothing is run: the tensors are on meta.

A program writes a row of each sum and the finish reads it: 8 D bytes, beside 6 D (a norm) or 12 D (with gate and
residual) of each token in bf16. With few tokens there are as many programs as fill a GPU, and their sums stay in its
cache; with many, a program takes so many tokens that the sums are 3 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BF16 = torch.bfloat16
D = 3072
TOKENS = (1024, 4608, 27280)  # a Wan 2.2 block of a benchmark, FLUX.1 at 1024 x 1024, Wan 2.2 TI2V at 704 x 1280 x 121
KINDS = ("layer_norm_modulate", "gate_residual_layer_norm_modulate", "sample", "token", "indexed")


def _bytes(tensors: Sequence[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _case(kind: str, T: int) -> tuple[list[Tensor], Callable[[], Any]]:
    """(what is read of the size of the tokens, call); sample, token, indexed: residual_norm_modulate with tables, in
    fp32."""
    from zeroblock.kernels import gate_residual_layer_norm_modulate, layer_norm_modulate, residual_norm_modulate_bwd
    from zeroblock.kernels._modulation import Branch, Norm, Rows

    dx, dy, x, branch = (torch.empty(1, T, D, dtype=BF16) for _ in range(4))
    stat, row = torch.empty(1, T), torch.empty(1, D, dtype=BF16)
    if kind == "layer_norm_modulate":
        return [dy, x], lambda: layer_norm_modulate.backward(dy, x, stat, stat, row, row, None, None, False)
    if kind == "gate_residual_layer_norm_modulate":
        backward = gate_residual_layer_norm_modulate.backward
        return [dx, dy, x, branch], lambda: backward(dx, dy, x, stat, stat, row, branch, row, row)
    size = {"sample": (1, D), "token": (1, T, D), "indexed": (1, 2, D)}[kind]
    gate, shift, scale = (Rows(torch.empty(size), torch.empty(D)) for _ in range(3))
    index = torch.empty(1, T, dtype=torch.int32) if kind == "indexed" else None
    parts = (
        Branch(branch, gate, False, False, None, 1e-6, BF16),
        Norm(False, None, None, shift, scale, 1e-6, BF16),
    )
    own = [gate.rows, scale.rows] if kind == "token" else []  # shift is not read
    arguments = (dx, dy, x, stat, stat, None, *parts, index, BF16, [True] * 11)
    return [dx, dy, x, branch, *own], lambda: residual_norm_modulate_bwd.backward(*arguments)  # type: ignore[list-item]


def share(kind: str, T: int) -> float:
    """Bytes of partial sums, written and read, by those of what has to be read and written."""
    from zeroblock.kernels._launch import recording

    with torch.device("meta"):
        read, call = _case(kind, T)
        with recording(run=False) as launches:
            written = call()
    given = {name: t for launch in launches for name, t in launch.arguments.items()}
    sums = [t for name, t in given.items() if name.startswith("part_") or name == "partials"]
    assert any(isinstance(t, Tensor) for t in sums), list(given)
    return 2 * _bytes(sums) / (_bytes(read) + _bytes(written))


def main() -> None:
    print(f"| partial sums, D = {D} | " + " | ".join(f"{T} tokens" for T in TOKENS) + " |")
    print("| --- |" + " ---: |" * len(TOKENS))
    for kind in KINDS:
        print(f"| {kind} | " + " | ".join(f"{share(kind, T):.1%}" for T in TOKENS) + " |")


if __name__ == "__main__":
    main()
