"""How a situation is described in the plan cache and to people: sizes in buckets, layouts and dtypes by name."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .._layout import alignment


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a planned step would do: the candidate, why, and the measured milliseconds (empty: not measured)."""

    step: str
    choice: str
    why: str
    milliseconds: dict[str, float | None]
    not_taken: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.step}: {self.choice} ({self.why})"]
        for name, ms in sorted(self.milliseconds.items(), key=lambda item: (item[1] is None, item[1])):
            lines.append(f"  {name}: " + ("failed" if ms is None else f"{ms:.4g} ms"))
        lines += [f"  {name} does not take it: {why}" for name, why in self.not_taken.items()]
        return "\n".join(lines)


def bucket(n: int) -> int:
    """n rounded up to one of four steps per octave: what is this close in size shares a measurement."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


def layout_name(t: Tensor) -> str:
    if t.is_contiguous():
        return "contiguous"
    if t.dim() in (4, 5):
        format = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
        return "channels-last" if t.is_contiguous(memory_format=format) else "strided"
    return "transposed" if t.dim() == 2 and t.t().is_contiguous() else "strided"


def describe_images(t: Tensor) -> str:
    """[N, C, *S] with batch and space in buckets."""
    sizes = [bucket(n) if d != 1 else n for d, n in enumerate(t.shape)]
    return f"{dtype_name(t)}{sizes} {layout_name(t)}"


def describe_rows(t: Tensor) -> str:
    """[..., K] as a matrix, its rows in buckets."""
    rows = t.numel() // max(1, t.shape[-1])
    return f"{dtype_name(t)}[{bucket(rows)}, {t.shape[-1]}] {layout_name(t)}"


def describe_weight(t: Tensor) -> str:
    return f"{list(t.shape)} {layout_name(t)}"


def describe_alignment(*tensors: Tensor | None) -> str:
    """What follows a description whose tensors do not all start at 16 bytes."""
    return "" if all(alignment(*tensors)) else ", unaligned"


def dtype_name(t: Tensor | torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16 or a tensor of it."""
    dtype = t if isinstance(t, torch.dtype) else t.dtype
    return str(dtype).removeprefix("torch.")


def describe_operand(t: Tensor) -> str:
    """Of a small operand what distinguishes kernels: dtype and number of dimensions."""
    return f"{dtype_name(t)} {'one' if t.dim() == 1 and t.numel() == 1 else f'{t.dim()}-D'}"
