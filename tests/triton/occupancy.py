"""What fits on a multiprocessor of the targets."""

from __future__ import annotations

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# Data sheets and the CUDA programming guide: shared memory a block may use and a multiprocessor has, warps, blocks.
LIMITS = {
    "sm_80": (166912, 167936, 64, 32),
    "sm_90": (232448, 233472, 64, 32),
    "sm_100": (232448, 233472, 64, 32),
    "sm_120": (101376, 102400, 48, 24),
    "gfx942": (65536, 65536, 32, 16),
}
MOST_THREADS = 1024


def warp(target: str) -> int:
    """Threads of a warp."""
    return 64 if target.startswith("gfx") else 32


def occupancy(target: str, warps: int, registers: int, shared: int) -> int:
    """Blocks that fit on one multiprocessor (NVIDIA's occupancy calculator; AMD: waves by vector registers)."""
    _, on_chip, most_warps, most_blocks = LIMITS[target]
    if target.startswith("gfx"):
        waves = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8))
        return min(most_blocks, waves // warps, on_chip // shared if shared else most_blocks)
    by_registers = 65536 // (-(-max(registers, 1) * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = on_chip // (-(-(shared + 1024) // 128) * 128)
    return min(most_blocks, most_warps // warps, by_registers, by_shared)
