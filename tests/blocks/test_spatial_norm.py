"""The norm conditioned on latents against its definition: any stretch, pieces in time, layouts, gradients; and that in
inference nothing of the size of f is written but the result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeroblock.blocks.spatial_norm import WHOLE, first_frame_apart, spatial_norm_silu, stretched

from ..ops.test_memory import allocations

# Sizes of f and of the latents: powers of two, none, one dimension that shrinks, none that changes, an odd first frame.
SIZES = {
    "video": ((4, 8, 12), (2, 4, 3)),
    "thirds": ((6, 6, 9), (2, 3, 3)),
    "narrower": ((4, 4, 3), (2, 4, 6)),
    "equal": ((2, 4, 3), (2, 4, 3)),
    "odd": ((5, 8, 6), (3, 2, 3)),
    "odd-thirds": ((7, 4, 6), (3, 2, 3)),
    "one-frame": ((1, 8, 6), (1, 2, 3)),
    "image": ((8, 12), (4, 3)),
}


def _layers(dims: int, dtype: torch.dtype) -> tuple[nn.GroupNorm, nn.Module, nn.Module]:
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 8, 1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype), conv(3, 8, 1).to(dtype), conv(3, 8, 1).to(dtype)


def _definition(f: Tensor, norm, z: Tensor, conv_y, conv_b) -> Tensor:
    """diffusers' CogVideoXSpatialNorm3D and SpatialNorm, with the SiLU behind."""
    if f.dim() == 5 and f.shape[2] > 1 and f.shape[2] % 2 == 1:
        first = F.interpolate(z[:, :, :1], size=f[:, :, :1].shape[2:])
        z = torch.cat([first, F.interpolate(z[:, :, 1:], size=f[:, :, 1:].shape[2:])], 2)
    else:
        z = F.interpolate(z, size=f.shape[2:])
    return F.silu(norm(f) * conv_y(z) + conv_b(z))


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels-last"))
@pytest.mark.parametrize("name", SIZES)
def test_result_and_gradients_are_those_of_the_definition(name, last):
    size, small = SIZES[name]
    norm, *convs = _layers(len(size), torch.float64)
    layout = torch.contiguous_format if not last else torch.channels_last if len(size) == 2 else torch.channels_last_3d
    f, z = (torch.randn(2, c, *s, dtype=torch.float64).to(memory_format=layout) for c, s in ((8, size), (3, small)))
    pieces = first_frame_apart(f) if len(size) == 3 else WHOLE
    wanted = [f.requires_grad_(), z.requires_grad_(), *norm.parameters(), *(p for c in convs for p in c.parameters())]
    expected, y = _definition(f, norm, z, *convs), spatial_norm_silu(f, norm, z, *convs, pieces)
    with torch.no_grad():
        inference = spatial_norm_silu(f, norm, z, *convs, pieces)
    for got in (y, inference):
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected)
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, wanted, dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)
    assert stretched(z, f, pieces).shape == (2, 3, *size)


def test_inference_writes_one_tensor_of_that_size():
    norm, *convs = _layers(3, torch.float32)
    f, z = torch.randn(1, 8, 9, 32, 64), torch.randn(1, 3, 3, 8, 16)
    with torch.no_grad():
        ours, theirs = (
            [n for n in allocations(call) if n >= f.nbytes // 4]
            for call in (
                lambda: spatial_norm_silu(f, norm, z, *convs, first_frame_apart(f)),
                lambda: _definition(f, norm, z, *convs),
            )
        )
    assert ours == [f.nbytes] and len(theirs) > 5


def test_under_autocast_it_is_as_exact_as_eager():
    norm, *convs = _layers(3, torch.float32)
    f, z = torch.randn(1, 8, 4, 8, 8), torch.randn(1, 3, 2, 4, 4)
    exact = _definition(f.double(), norm.double(), z.double(), *(c.double() for c in convs))
    norm, *convs = _layers(3, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = spatial_norm_silu(f, norm, z, *convs), _definition(f, norm, z, *convs)
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
