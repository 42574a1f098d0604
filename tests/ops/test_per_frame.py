"""group_norm_silu(per_frame=True): statistics of each frame of a video. Results and gradients: the cases."""

import pytest
import torch

import zeroblock as zb

GROUPS = 4


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last_3d), ids=str)
def test_what_is_saved_is_x(backend, device, layout):
    x = torch.randn(2, 8, 3, 4, 5, device=device).to(memory_format=layout).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        zb.group_norm_silu(x, GROUPS, per_frame=True)
    large = [t for t in saved if t.numel() >= x.numel()]
    assert large and all(t.data_ptr() == x.data_ptr() for t in large)


@pytest.mark.parametrize("size", ((2, 8, 3, 4, 5), (2, 4, 3, 1, 2), (1, 8, 2, 1, 1)), ids=str)
def test_a_frame_is_what_an_image_is(backend, device, size):
    """Groups of two elements too, and frames of one pixel."""
    x, dy = torch.randn(size, device=device), torch.randn(size, device=device)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        video = x.to(memory_format=layout).requires_grad_()
        y = zb.group_norm_silu(video, GROUPS, per_frame=True)
        (dx,) = torch.autograd.grad(y, video, dy)
        for t in range(size[2]):
            image = x[:, :, t].contiguous().requires_grad_()
            expected = zb.group_norm_silu(image, GROUPS)
            torch.testing.assert_close(y[:, :, t], expected)
            torch.testing.assert_close(dx[:, :, t], torch.autograd.grad(expected, image, dy[:, :, t])[0])


def test_compiles_whole():
    x = torch.randn(2, 8, 3, 4, 5, requires_grad=True)
    run = lambda x: zb.group_norm_silu(x, GROUPS, per_frame=True)  # noqa: E731
    got, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x)
    assert torch.equal(got, expected)
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), x) for y in (got, expected))
    torch.testing.assert_close(a, b)


def test_takes_videos_alone():
    with pytest.raises(
        ValueError, match=r"^group_norm_silu: x must have shape \[N, C, T, H, W\] with per_frame, got \["
    ):
        zb.group_norm_silu(torch.randn(2, 8, 4, 5), GROUPS, per_frame=True)
