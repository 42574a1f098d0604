"""gate_residual: y = residual + gate * branch; the gate is per sample, per token, per channel or a single number.

math    fp32, rounded once. Every tensor is seen as [B, T, D]: a gate [D] is one sample of B * T tokens, a gate [1] one
        row of all elements.
grid    (row blocks, column blocks, B); tiles are narrow and tall, so that a per-sample gate is read rarely. 3ns bytes.
zero    none, the kernel takes no flag.

Backward: dbranch = dy * gate, dgate = sum of dy * branch over what shares a gate. 3ns bytes, 2ns without dgate, 4ns for
a per-token gate.

order   a program adds its rows in order into one partial sum per column, [B, P, D] in fp32; `sum_partials` adds the P.
        A per-token gate needs no sum.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dtypes import long_name
from ._launch import launch
from ._reduce import sum_partials
from ._rows import PER_SAMPLE, PER_TOKEN, PROGRAMS, cdiv, operand_rows, power_of_2, sample_row, token_rows

# A fourth kind of operand: one number for everything, whose gradient is the sum over the whole tile.
SINGLE = 3
# A tile is COLUMNS columns (or fewer) and as many rows as make ELEMENTS: rows of 128 numbers are whole sectors, and no
# tile spills (python -m tests.triton.static).
COLUMNS, ELEMENTS = 128, 4096
# Tiles of a program of backward, at most: then it writes one partial sum per column of 512 rows (bytes:
# python -m tests.triton.traffic_cases).
STEPS = 16
# Elements per thread: the first is the default, a measuring plan tries the other as well. Neither spills
# (python -m tests.triton.static).
PER_THREAD = (32, 16)


def tile(D: int, kind: int) -> tuple[int, int]:
    """(ROWS, COLS)"""
    columns = ELEMENTS if kind == SINGLE else min(COLUMNS, power_of_2(D))
    return ELEMENTS // columns, columns


@triton.jit
def _forward(
    residual,
    gate,
    branch,
    y,
    T,
    D,
    gate_b,
    gate_t,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GATE: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    t, mask, at = token_rows(b, tl.program_id(0).to(tl.int64), T, d, D, ROWS)
    value = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    if GATE == 3:
        value *= tl.load(gate).to(tl.float32)
    else:
        row = sample_row(gate, b, gate_b, d, D, GATE)
        value *= operand_rows(gate, row, b, t, gate_b, gate_t, d, mask, GATE)
    value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, value, mask=mask)


@triton.jit
def _backward(
    dy,
    gate,
    branch,
    dbranch,
    dgate,
    part_dgate,
    T,
    D,
    steps,
    gate_b,
    gate_t,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GATE: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    if GATE == 3:
        row = tl.load(gate).to(tl.float32)
    else:
        row = sample_row(gate, b, gate_b, d, D, GATE)
    total = tl.zeros([COLS], tl.float32)
    for step in range(steps):
        t, mask, at = token_rows(b, tl.program_id(0).to(tl.int64) * steps + step, T, d, D, ROWS)
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        if dgate is not None or part_dgate is not None:
            product = g * tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
            if GATE == 2:
                tl.store(dgate + at, product, mask=mask)
            else:
                total += tl.sum(product, 0)
        if dbranch is not None:
            tl.store(dbranch + at, g * operand_rows(gate, row, b, t, gate_b, gate_t, d, mask, GATE), mask=mask)
    if part_dgate is not None:
        part = b * tl.num_programs(0) + tl.program_id(0)
        if GATE == 3:
            tl.store(part_dgate + tl.program_id(1), tl.sum(total, 0))
        else:
            tl.store(part_dgate + part * D + d, total, mask=d < D)


def sizes(x: Tensor, gate: Tensor) -> tuple[int, int, int, int]:
    """(B, T, D, kind of gate) under which a dense x [..., D] and its gate are seen."""
    if gate.numel() == 1 and gate.dim() == 1:
        return 1, 1, x.numel(), SINGLE
    B, T, D = x.shape
    if gate.dim() == 1:
        return 1, B * T, D, PER_SAMPLE
    return B, T, D, PER_SAMPLE if gate.dim() == 2 else PER_TOKEN


def gate_strides(gate: Tensor) -> tuple[int, int]:
    return gate.stride(0) if gate.dim() > 1 else 0, gate.stride(1) if gate.dim() == 3 else 0


def forward(
    residual: Tensor,
    gate: Tensor,
    branch: Tensor,
    dtype: torch.dtype,
    per_thread: int = PER_THREAD[0],
) -> Tensor:
    """y in `dtype`, like residual; residual and branch dense in one order, the gate with dense rows."""
    B, T, D, kind = sizes(branch, gate)
    rows, columns = tile(D, kind)
    y = torch.empty_like(residual, dtype=dtype)
    gate_b, gate_t = gate_strides(gate)
    launch(
        _forward,
        (cdiv(T, rows), cdiv(D, columns), B),
        num_warps=ELEMENTS // (32 * per_thread),
        residual=residual,
        gate=gate,
        branch=branch,
        y=y,
        T=T,
        D=D,
        gate_b=gate_b,
        gate_t=gate_t,
        ROWS=rows,
        COLS=columns,
        GATE=kind,
    )
    return y


def backward(
    dy: Tensor, gate: Tensor, branch: Tensor, need_dgate: bool, need_dbranch: bool, per_thread: int = PER_THREAD[0]
) -> tuple[Tensor | None, Tensor | None]:
    """(dgate like the gate, dbranch like the branch); dy and branch dense in one order."""
    B, T, D, kind = sizes(branch, gate)
    rows, columns = tile(D, kind)
    blocks = cdiv(D, columns)
    steps = max(1, min(STEPS, B * blocks * cdiv(T, rows) // PROGRAMS, cdiv(T, rows)))
    programs = cdiv(T, rows * steps)
    dbranch = torch.empty_like(branch) if need_dbranch else None
    dgate = part = None
    if need_dgate and kind == PER_TOKEN:
        dgate = gate.new_empty(gate.shape)
    elif need_dgate:
        size = (1, blocks, 1) if kind == SINGLE else (B, programs, D)
        part = branch.new_empty(size, dtype=torch.float32)
    gate_b, gate_t = gate_strides(gate)
    launch(
        _backward,
        (programs, blocks, B),
        num_warps=ELEMENTS // (32 * per_thread),
        dy=dy,
        gate=gate,
        branch=branch,
        dbranch=dbranch,
        dgate=dgate,
        part_dgate=part,
        T=T,
        D=D,
        steps=steps,
        gate_b=gate_b,
        gate_t=gate_t,
        ROWS=rows,
        COLS=columns,
        GATE=kind,
    )
    if part is not None:
        dgate = sum_partials(part, gate.dtype).view(gate.shape)
    return dgate, dbranch


def _compile(D: int, dtype: torch.dtype, kind: str) -> None:
    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    B, T = 8, 256
    x = new(B, T, D)
    gate = {"sample": new(B, 6 * D)[:, :D], "token": x, "channel": new(D), "single": new(1)}[kind]
    for per_thread in PER_THREAD:
        forward(x, gate, x, dtype, per_thread)
        for needs in ((True, True), (True, False), (False, True)):
            backward(x, gate, x, *needs, per_thread)


COMPILE_CASES = {
    f"gate_residual-{D}-{long_name(dtype)}-{kind}{'-unaligned' if D % 8 else ''}": partial(_compile, D, dtype, kind)
    for D, dtype, kind in (
        *((1152, torch.bfloat16, kind) for kind in ("sample", "token", "channel", "single")),
        *((1152, dtype, "sample") for dtype in (torch.float16, torch.float32)),
        (64, torch.bfloat16, "sample"),
        (37, torch.float32, "sample"),
    )
}
