"""How the row norms cut x [B, T, D] into programs and tiles, on the host.

A program takes `steps` tiles of ROWS rows of one sample, ROWS x BLOCK_D numbers; a row may have TAIL columns more
(`_rows.py`, `part_columns`).
Lanes that idle and bytes in flight: `python -m tests.triton.streams`.
"""

from __future__ import annotations

from torch import Tensor

from ._rows import PROGRAMS, cdiv, power_of_2

# Elements per thread of all row norms: the first is the default, a measuring plan tries the others as well. None spills
# (python -m tests.triton.static).
FORWARD_PER_THREAD = (16, 8, 32)
BACKWARD_PER_THREAD = (8, 16)
# Longer rows take all warps of a program: there is nothing to try (registers: python -m tests.triton.static).
MAX_TUNED_D = 4096
# Rows that lie in two parts, and their warps: shorter ones share a tile. The second part is at least this share of the
# first: of 1152 columns 10 % of the lanes idle in forward and 25 % in backward, not 44. A quarter there would be 40
# numbers of a thread in place of 24, of several tensors and sums (registers: python -m tests.triton.static).
# Whole are, in backward, the rows of the gated and the residual norms, of four tensors and three sums or more: in parts
# the first would take 250 registers, and spill under triton 3.3. On an H200 its instructions, idle lanes too, take less
# time than its bytes (python -m tests.triton.streams). Whole are also rows whose scale is per token: in parts they take
# 128 registers, not 48, and with weight and bias 255, not 100; of 3072 columns they spill on sm_100; and they compile
# for 0.8 to 1.4 seconds. Their instructions take about as long as their bytes: 1152 columns 576 and 556 cycles.
LEAST_PARTED_D, PARTED_WARPS, FORWARD_SHARE, BACKWARD_SHARE = 513, 4, 4, 2
# A program of backward takes LEAST_ROWS rows or more, so that its partial sums, written and read again, cost at most
# 1n bytes each (bytes: python -m tests.triton.traffic_cases).
LEAST_ROWS = 8
# Programs of backward, and tiles of a program at most, in forward and backward: few enough programs that what each
# reads once is little, enough to fill a GPU. (guess) Of rows longer than LONG_D two programs on each of a B200's 148
# multiprocessors have enough bytes in flight (python -m tests.triton.streams), and of 27,280 tokens partial sums are
# 3 % of the bytes.
BACKWARD_PROGRAMS, FORWARD_STEPS, BACKWARD_STEPS = 512, 16, 256
LONG_D, LONG_PROGRAMS = 2048, 296
# Shared memory that the tiles may take which backward loads ahead: any GPU has it.
BUFFER_BYTES = 65536


def tile(D: int, per_thread: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK_D, num_warps): a long row takes the warps that hold it; of short ones a tile has enough for four
    warps, two at least up to 1024 numbers, 32 at most (registers: python -m tests.triton.static)."""
    block = power_of_2(D)
    elements = max(block, 128 * per_thread, min(2 * block, 2048))
    return min(32, elements // block), block, elements // (32 * per_thread)


def _in_parts(D: int, size: int, share: int) -> tuple[int, int, int, int] | None:
    """(ROWS, BLOCK_D, TAIL, num_warps) of rows that a power of 2 holds badly: in two parts, of which the second is at
    least 1 / share of the first, in as many rows as give each thread 16 bytes of it."""
    if not LEAST_PARTED_D <= D <= MAX_TUNED_D:
        return None
    main = power_of_2(D) // 2
    tail = max(power_of_2(D - main), main // share)
    if tail >= main:
        return None
    return max(1, 16 // size * 32 * PARTED_WARPS // tail), main, tail, PARTED_WARPS


def _whole(D: int, per_thread: int) -> tuple[int, int, int, int]:
    rows, block, warps = tile(D, per_thread)
    return rows, block, 0, warps


def forward_tile(D: int, per_thread: int, size: int) -> tuple[int, int, int, int]:
    """(ROWS, BLOCK_D, TAIL, num_warps). In parts only for the default of `per_thread`, so that a plan has both to
    choose from."""
    parts = _in_parts(D, size, FORWARD_SHARE) if per_thread == FORWARD_PER_THREAD[0] else None
    return parts or _whole(D, per_thread)


def backward_tile(D: int, per_thread: int, size: int, crowded: bool) -> tuple[int, int, int, int]:
    """The same; `crowded`: operands leave no registers for more than a thread has of a whole row."""
    parts = None if crowded or per_thread != BACKWARD_PER_THREAD[0] else _in_parts(D, size, BACKWARD_SHARE)
    return parts or _whole(D, per_thread)


def why_not_tile(D: int) -> str | None:
    return f"rows of {D} numbers leave no choice of tiles" if power_of_2(D) > MAX_TUNED_D else None


def per_thread_choices(D: int, shipped: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the shipped values that rows of D numbers may take."""
    return shipped if why_not_tile(D) is None else shipped[:1]


def forward_steps(B: int, T: int, rows: int) -> int:
    """Tiles of `rows` rows that a program takes: one while there are no more than fill a GPU."""
    return max(1, min(FORWARD_STEPS, B * T // (rows * PROGRAMS), cdiv(T, rows)))


def backward_steps(B: int, T: int, D: int, rows: int) -> int:
    programs = min(LONG_PROGRAMS, BACKWARD_PROGRAMS) if D > LONG_D else BACKWARD_PROGRAMS
    wanted = max(LEAST_ROWS, B * T // programs)
    return max(1, min(BACKWARD_STEPS, wanted // rows, cdiv(T, rows)))


def backward_stages(rows: int, block: int, *streamed: Tensor) -> int:
    """Tiles that a program of backward holds or waits for: those behind the one it works on are on their way into
    shared memory. Rows of more than MAX_TUNED_D leave it no registers, and are enough for a GPU by themselves."""
    sizes = [v.element_size() for v in streamed]
    ahead = 1 if max(sizes) == 4 else 2 if block <= 2048 else 3
    return 1 if block > MAX_TUNED_D else 1 + min(ahead, BUFFER_BYTES // (rows * block * sum(sizes)))
