"""group_norm_silu(per_frame=True): statistics of each frame of a video. Results and gradients: the cases."""

import pytest
import torch

import zeroblock as zb

GROUPS = 4


def test_frames_of_channels_last_are_not_copied(backend, device):
    x = torch.randn(2, 8, 3, 4, 5, device=device).to(memory_format=torch.channels_last_3d).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        zb.group_norm_silu(x, GROUPS, per_frame=True)
    large = [t for t in saved if t.numel() >= x.numel()]
    assert large and all(t.data_ptr() == x.data_ptr() for t in large)


def test_a_frame_is_what_an_image_is(backend, device):
    x = torch.randn(2, 8, 3, 4, 5, device=device)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        y = zb.group_norm_silu(x.to(memory_format=layout), GROUPS, per_frame=True)
        for t in range(3):
            last = layout is torch.channels_last_3d
            image = x[:, :, t].contiguous(memory_format=torch.channels_last if last else layout)
            assert torch.equal(y[:, :, t], zb.group_norm_silu(image, GROUPS))


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
