"""Tensors in every layout that users' tensors come in, and what it means that two are laid out alike.

Compared are the strides of all dimensions of more than one element, and the format that torch's next kernel would take
the tensor for: strides of dimensions of one element decide it.
"""

from __future__ import annotations

import torch
from torch._prims_common import suggest_memory_format

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SPACE = {1: (6,), 2: (4, 6), 3: (3, 4, 6)}


def weight_layouts(dims):
    """In one dimension torch has no format but contiguous, though its kernels fall for some permuted weights."""
    return ("contiguous",) if dims == 1 else ("contiguous", "channels-last")


def layouts(dims, channels):
    """The same of an input of one channel."""
    return ("contiguous", "expanded") if dims == 1 == channels else LAYOUTS


def last(x):
    return x.to(memory_format=LAST[x.dim()]) if x.dim() in LAST else x.transpose(1, 2).contiguous().transpose(1, 2)


def half_of_channels(x):
    return last(torch.cat([x, x], 1))[:, : x.shape[1]]


def part_of_rows(x):
    return last(torch.cat([x, x], 2))[:, :, : x.shape[2]]


def permuted(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def from_an_image(x):
    """One image, [H, W, C] with a batch dimension put in front."""
    return x[0].movedim(0, -1).contiguous().movedim(-1, 0).unsqueeze(0)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": last,
    "half of the channels": half_of_channels,
    "part of the rows": part_of_rows,
    "every other": lambda x: torch.cat([x, x], -1)[..., ::2],
    "permuted": permuted,
    "expanded": lambda x: last(x[:1]).expand_as(x),
    "from an image": from_an_image,
}


def assert_format(got, eager, what, strides_alone=False):
    assert got.shape == eager.shape and got.dtype == eager.dtype, what
    strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (got, eager)]
    assert strides[0] == strides[1], f"{what}: strides {got.stride()}, eager gives {eager.stride()} for {got.shape}"
    if strides_alone:
        return
    formats = suggest_memory_format(got), suggest_memory_format(eager)
    assert formats[0] == formats[1], f"{what}: {got.stride()} is {formats[0]}, eager's {eager.stride()} {formats[1]}"


def formats(results, what, outputs=99):
    """results: (ours, eager's) lists of tensors, gradients after the `outputs`: these nobody but an optimizer reads."""
    for i, (got, expected) in enumerate(zip(*results, strict=True)):
        assert_format(got, expected, (*what, i), strides_alone=i >= outputs)


TOKENS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "rows of more": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "columns of more": lambda t: torch.cat([t, t], 2)[..., : t.shape[2]],
    "expanded": lambda t: t[:1].expand_as(t),
}
