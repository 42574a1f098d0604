"""Launches of channel_rms_norm_silu and residual_norm_modulate at shapes of video models, for `static.py`."""

from __future__ import annotations

import torch

from zeroblock.backends.cuda import CUDA
from zeroblock.backends.residual_norm import Branch, Needed, Norm, Rows, Stats

from . import emulated

BF16, F32 = torch.bfloat16, torch.float32


def norm_launches(target: str) -> dict[str, tuple[int, int, int]]:
    """{kernel: (threads, bytes of dynamic shared memory, blocks of a cluster)}"""
    found: dict[str, tuple[int, int, int]] = {}

    def record(call, *names: str) -> None:
        sizes = emulated.recorded(call)
        assert len(sizes) == len(names), (names, sizes)
        found.update(zip(names, sizes, strict=True))

    def channels(C: int, side: int, last: bool) -> None:
        layout = torch.channels_last if last else torch.contiguous_format
        x, v = torch.empty(1, C, side, side, dtype=BF16).to(memory_format=layout), torch.empty(C, dtype=BF16)
        form = f"<bf16,8,{str(last).lower()}>"
        record(
            lambda: CUDA.channel_rms_norm_silu(x, v, None, 1e-12, False, None, None, True),
            f"channel_rms_norm_silu_fwd_kernel{form}",
        )
        rstd = torch.empty(1, side, side)
        record(
            lambda: CUDA.channel_rms_norm_silu_bwd(x, x, rstd, v, None, None, None, True),
            f"channel_rms_norm_silu_bwd_kernel{form}",
            "channel_rms_norm_silu_bwd_params_kernel",
        )

    def rows(mixed: bool) -> None:
        B, T, D = 1, 4096, 3072
        x, operand, stat = torch.empty(B, T, D, dtype=BF16), torch.empty(B, 6 * D), torch.empty(B, T)
        x_new = x.float() if mixed else x
        v, form = Rows(operand[:, :D], torch.empty(D)), "<Mixed,4>" if mixed else "<bf16,8>"
        branch, norm = Branch(x, v, False, False, None, 1e-6, x_new.dtype), Norm(False, None, None, v, v, 1e-6, BF16)
        record(lambda: CUDA.residual_norm_modulate(x, branch, norm, None), f"residual_norm_fwd_kernel{form}")
        stats, needed = Stats(stat, stat, None), Needed(*[True] * 11)
        record(
            lambda: CUDA.residual_norm_modulate_bwd(x_new, x, x_new, stats, branch, norm, None, BF16, needed),
            f"residual_norm_bwd_kernel{form}",
            "residual_norm_bwd_groups_kernel",
            "residual_norm_bwd_shared_kernel",
        )

    with emulated.emulated(), emulated.gpu(*emulated.GPUS[target]):
        for last in (False, True):
            channels(384, 64, last)
        for mixed in (True, False):
            rows(mixed)
    return found
