"""group_norm_silu by thread-block clusters, emulated: groups that one block cannot hold are still read once."""

import pytest
import torch

from zeroblock.backends.cuda import CUDA, MOST_GROUPED
from zeroblock.backends.gpu.one_read import a_cluster_holds
from zeroblock.testing import assert_bitwise_equal, poison_empty, use_backend
from zeroblock.testing.cases import Case
from zeroblock.testing.draw import Draw
from zeroblock.testing.parity import assert_parity

from .simt import emulated

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
layouts = pytest.mark.parametrize("layout", ("dense", "nhwc"))
# So little shared memory that a group of 4 x 1000 numbers takes clusters of 2 to 8 blocks, the last chunk shorter.
SHARED = {"dense": 8 * 1024, "nhwc": 44 * 1024}
SIZES = {"N": 2, "C": 8, "S": (25, 40)}


def _case(**options):
    sizes = {**SIZES, "film": True, "affine": "both"}
    return Case("group_norm_silu", "cluster", sizes, {"num_groups": 2, **options}, ("dense", "nhwc"))


@layouts
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=lambda d: str(d)[6:])
def test_outputs_and_gradients(layout, dtype):
    before = emulated.clusters()
    with emulated.emulated(seed=3), use_backend("cuda"), emulated.gpu(SHARED[layout], 8):
        assert_parity(_case(), dtype, layout)
    slabs = 2 if layout == "dense" else 1
    assert emulated.clusters() - before == 2 * 2 * slabs * 16  # forward and backward, two samples, 16 draws


def test_a_mean_far_above_the_deviation():
    sizes = {**SIZES, "film": False, "mean": 1000.0, "std": 1.0}
    case = Case("group_norm_silu", "cluster", sizes, {"num_groups": 2, "activation": None}, ("dense",))
    with emulated.emulated(seed=4), use_backend("cuda"), emulated.gpu(SHARED["dense"], 8):
        assert_parity(case, torch.float32)


def _inputs(layout):
    draw = Draw(torch.bfloat16, layout)
    x, dy = draw.tensor(2, 8, 25, 40, mean=0.5), draw.tensor(2, 8, 25, 40)
    return x, dy, draw.vector(8, 1.0), draw.vector(8), *draw.chunks(2, 8, 2)


def _both(x, dy, weight, bias, scale, shift, flag=None):
    with poison_empty():
        forward = CUDA.group_norm_silu(x, 2, weight, bias, 1e-5, scale, shift, True, flag)
        mean, rstd = (torch.zeros(2, 2), torch.ones(2, 2)) if flag is not None else forward[1:]
        backward = CUDA.group_norm_silu_bwd(dy, x, mean, rstd, weight, bias, scale, shift, 2, True, flag)
    return [*forward, *backward]


@layouts
def test_the_same_bits_in_any_order_of_threads_and_blocks(layout):
    results = []
    for seed in (0, 1, 2):
        with emulated.emulated(seed), emulated.gpu(SHARED[layout], 8):
            results.append(_both(*_inputs(layout)))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_bitwise_equal(got, expected)


@layouts
def test_a_gpu_without_clusters_or_without_room_for_them_takes_two_passes(layout):
    inputs, before = _inputs(layout), emulated.clusters()
    with emulated.emulated():
        with emulated.gpu(SHARED[layout], 1):
            two_passes = _both(*inputs)
        with emulated.gpu(SHARED[layout], 8), emulated.refusing(only_clusters=True):
            refused = _both(*inputs)
    assert emulated.clusters() == before
    for got, expected in zip(refused, two_passes, strict=True):
        assert_bitwise_equal(got, expected)


# A block holds a group, a cluster does, two passes.
ALL_MODES = {"block": (163 * 1024, 1), "cluster": (None, 8), "two passes": (None, 1)}


@layouts
@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_zero_branch_is_left_by_all_blocks(layout, mode):
    """y is not written. The statistics are: a backward that reads no flag computes with them."""
    (x, *rest), (shared, cluster) = _inputs(layout), ALL_MODES[mode]
    with emulated.emulated(), emulated.gpu(shared or SHARED[layout], cluster):
        zero = CUDA.are_zero([torch.zeros(3)])
        y, mean, rstd, *gradients = _both(x * float("nan"), *rest, flag=zero)
    assert y.isnan().all()
    assert all(torch.equal(t, torch.zeros_like(t)) for t in (mean, rstd, *gradients))


@pytest.mark.parametrize("vector", (True, False), ids=("packs", "one by one"))
@layouts
def test_the_widest_groups_fit_the_smallest_gpu(layout, vector):
    """99 KB for a block: sm_86, sm_89, sm_120. Of odd groups eight make whole packs, and are too wide a slab."""
    channels = MOST_GROUPED if vector else MOST_GROUPED - 1
    x = torch.empty(1, 8 * channels, 2, 4, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)
    stat = torch.zeros(1, 8)
    forward = lambda: CUDA.group_norm_silu(x, 8, None, None, 1e-5, None, None, True)  # noqa: E731
    backward = lambda: CUDA.group_norm_silu_bwd(x, x, stat, stat, *[None] * 4, 8, True)  # noqa: E731
    for call in (forward, backward):
        with emulated.emulated(), emulated.gpu(99 * 1024, 1):
            launches = emulated.recorded(call)
        assert launches and max(shared for _, shared, _ in launches) <= 99 * 1024


@layouts
def test_wider_groups_are_refused_and_served_by_the_reference(layout):
    x = Draw(torch.float32, layout).tensor(1, MOST_GROUPED + 1, 2, 3)
    assert "groups of 3073 channels are wider than the 3072" in CUDA.why_not_groups(x, 1)
    case = Case("group_norm_silu", "wide", {"N": 1, "C": MOST_GROUPED + 1, "S": (2, 3)}, {"num_groups": 1})
    with emulated.emulated(), use_backend("cuda"):
        before = emulated.launches()
        assert_parity(case, torch.float32, layout)
        assert emulated.launches() == before
    assert CUDA.why_not_groups(x, MOST_GROUPED + 1) is None


# Launches at shapes of U-Nets on GPUs with and without clusters: threads apart, (blocks of a cluster) of each.
@pytest.mark.parametrize(
    ("layout", "shape", "sm_80", "sm_90"),
    [
        ("dense", (8, 320, 64, 64), [1], [1]),  # a block holds a group, and there are enough of them
        ("dense", (1, 320, 64, 64), [1, 1], [2]),  # too few blocks: a cluster shares the group
        ("dense", (1, 320, 128, 128), [1, 1], [2]),
        ("dense", (2, 128, 512, 512), [1, 1], [1, 1]),  # 2 MB: more than a cluster has
        ("nhwc", (8, 320, 64, 64), [1, 1], [2]),
        ("nhwc", (2, 640, 64, 64), [1, 1], [2]),
        ("nhwc", (1, 320, 64, 64), [1, 1], [8]),
        ("nhwc", (8, 640, 32, 32), [1], [1]),
    ],
)
def test_launches_at_shapes_of_unets(layout, shape, sm_80, sm_90):
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16).to(memory_format=form)
    call = lambda: CUDA.group_norm_silu(x, 32, None, None, 1e-5, None, None, True)  # noqa: E731
    for name, expected in (("sm_80", sm_80), ("sm_90", sm_90)):
        with emulated.emulated(), emulated.gpu(*emulated.GPUS[name]):
            launches = emulated.recorded(call)
        assert [cluster for _, _, cluster in launches] == expected, (name, launches)
        assert all(shared <= emulated.GPUS[name][0] for _, shared, _ in launches)


# Channels-last images of U-Nets, (channels, side): Stable Diffusion 1.5 and XL, ADM; the last of each concatenated.
STAGES = (
    *((320, 64), (640, 32), (1280, 16), (1280, 8), (640, 64), (960, 64), (1920, 32), (2560, 16)),
    *((320, 128), (640, 64), (1280, 32), (640, 128), (960, 128), (1920, 64)),
    *((192, 64), (384, 32), (576, 16), (768, 8), (256, 256), (256, 128), (512, 64), (1024, 16)),
)
# What not even a cluster of eight holds: tiles of 64 bytes a pixel or more.
TWICE = {(960, 128), (256, 256)}
TWICE_BACKWARD = TWICE | {(960, 64), (320, 128), (640, 128), (1920, 64)}


@pytest.mark.parametrize("batch", (1, 2, 8))
def test_one_read_at_every_stage_of_a_unet(batch):
    """On an H100, but where a cluster is too small; and the fixed rule knows which: CUDA's kernels where they read an
    image once and Triton's twice."""
    for C, side in STAGES:
        x = torch.empty(batch, C, side, side, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        stat = torch.empty(batch, 32)
        forward = lambda: CUDA.group_norm_silu(x, 32, None, None, 1e-5, None, None, True)  # noqa: B023, E731
        backward = lambda: CUDA.group_norm_silu_bwd(x, x, stat, stat, *[None] * 4, 32, True)  # noqa: B023, E731
        shared = emulated.GPUS["sm_90"][0]
        for call, twice, tensors in ((forward, TWICE, 1), (backward, TWICE_BACKWARD, 2)):
            with emulated.emulated(), emulated.gpu(*emulated.GPUS["sm_90"]):
                launches = emulated.recorded(call)
            assert (len(launches) == 1) == ((C, side) not in twice), (C, side, tensors)
            if launches[0][2] > 1 or len(launches) > 1:  # no block holds it alone
                known = a_cluster_holds(batch, C, side * side, 32, 2, tensors, shared)
                assert known == (len(launches) == 1), (C, side, tensors)
