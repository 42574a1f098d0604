"""The counter of bytes is exact, its checks fail where they should, and the committed table is that of the kernels."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("ml_dtypes")

import triton.language as tl  # noqa: E402

from . import partials, traffic, traffic_cases  # noqa: E402

traffic.install()

from zeroblock.kernels import _group_tiles, _row_tiles, group_norm_silu, group_norm_silu_bwd  # noqa: E402
from zeroblock.kernels._launch import recording  # noqa: E402


@triton.jit
def _scaled_copy(x, weight, y, rows, D, stride, BLOCK: tl.constexpr, PASSES: tl.constexpr, BUG: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    for _ in tl.static_range(PASSES):
        v = tl.load(x + row * stride + i, mask=i <= D if BUG == "load beyond" else i < D, other=0.0)
    v *= tl.load(weight + i, mask=i < D, other=0.0)
    out = y + row * D + (i // 2 if BUG == "twice" else i)
    if BUG == "neighbour":
        out += row % 2 * -4
    if BUG == "in place":
        tl.store(x + (row + 1) % rows * stride + i, v, mask=i < D)
    tl.store(out, v, mask=i < (D + 1 if BUG == "store beyond" else D))


def run(bug="none", passes=1, dtype=torch.float32):
    x = torch.randn(4, 80, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 8:45]
    weight, y = torch.ones(37, dtype=dtype), torch.full((4, 37), float("nan"), dtype=dtype)
    with traffic.record() as recorded:
        _scaled_copy[(4,)](x, weight, y, 4, 37, x.stride(0), BLOCK=64, PASSES=passes, BUG=bug)
    return recorded, x, weight, y


@pytest.mark.parametrize("passes", (1, 2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_counts(dtype, passes):
    recorded, x, weight, y = run(passes=passes, dtype=dtype)
    (launch,), size = recorded.launches, dtype.itemsize
    assert torch.equal(y, x) and not recorded.problems
    loads, rows, stores = (launch.counts[key] for key in (("x", "load"), ("weight", "load"), ("y", "store")))
    assert loads.requested == loads.lanes == passes * x.numel() * size and loads.footprint == x.numel() * size
    assert rows.requested == 4 * 37 * size and rows.footprint == 37 * size
    assert stores.requested == stores.footprint == y.numel() * size
    assert loads.operations == 4 * passes and stores.operations == 4
    row_sectors = [len({(t.data_ptr() + i * size) // 32 for i in range(37)}) for t in x]
    assert loads.sectors == passes * sum(row_sectors) * 32
    assert launch.moved() == loads.requested + rows.requested + stores.requested  # nothing here is small


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("load beyond", "load out of bounds by 1 lanes"),
        ("store beyond", "store out of bounds by 1 lanes"),
        ("twice", "elements stored twice by one operation"),
        ("neighbour", "store of elements that another program stored"),
        ("in place", "load of elements that another program stored"),
    ],
)
def test_planted_bug_is_caught(bug, message):
    """The load beyond a row lands between the rows of a strided view: inside the storage, outside the tensor."""
    recorded, *_ = run(bug)
    assert any(message in problem for problem in recorded.problems), recorded.problems


def test_store_after_a_load_of_another_program_is_a_race():
    @triton.jit
    def shift(x, N: tl.constexpr):
        i = tl.program_id(0)
        tl.store(x + i, tl.load(x + i + 1, mask=i + 1 < N, other=0.0))

    with traffic.record() as recorded:
        shift[(8,)](torch.arange(8.0), N=8)
    assert any("store of elements that another program loaded" in problem for problem in recorded.problems)


def test_small_operands_count_once():
    """One row of 64 shared by 64 programs is 1/64 of what they stream."""
    x, weight, y = torch.randn(64, 64), torch.ones(64), torch.empty(64, 64)
    with traffic.record() as recorded:
        _scaled_copy[(64,)](x, weight, y, 64, 64, 64, BLOCK=64, PASSES=2, BUG="none")
    assert recorded.moved() == 2 * x.nbytes + weight.nbytes + y.nbytes


# ---- the committed table --------------------------------------------------------------------------------------------

ONE_READ = (
    "group_norm_silu-",
    "channel_rms_norm_silu-",
    "layer_norm_modulate-",
    "rms_norm_modulate-",
    "gate_residual-",
    "gate_residual_layer_norm_modulate-",
    "residual_norm_modulate-",
)
# Channels-last rows of 64 bytes at the large stages are more groups than a program holds.
TWICE = {
    *(f"group_norm_silu-{size}-bf16-nhwc" for size in ("320x64", "640x32", "96x64")),
    *(f"group_norm_silu-640x32-bf16-{layout}-split" for layout in ("nchw", "nhwc")),
}
FUSED = (
    "conv_residual-1x1",
    "conv_residual-3x3-0",
    "linear_gate_residual-0",
    "group_norm_silu_conv_residual-1x1-partial",
)


@pytest.mark.parametrize("name", traffic_cases.CASES)
def test_traffic_is_that_of_the_table(name):
    """Exact numbers: a kernel that reads an element more shows. `python -m tests.triton.traffic_cases` renews them."""
    committed = traffic_cases.committed()
    assert name in committed, "not in traffic.csv: run python -m tests.triton.traffic_cases"
    assert {key: str(value) for key, value in traffic_cases.row(name).items()} == committed[name]


def test_table_has_no_other_rows():
    assert list(traffic_cases.committed()) == list(traffic_cases.CASES)


def test_table_reaches_the_targets():
    ratios = {name: float(row["ratio"]) for name, row in traffic_cases.committed().items()}
    one_read = {name: ratio for name, ratio in ratios.items() if name.startswith(ONE_READ) and name not in TWICE}
    assert len(one_read) == 26 and set(one_read.values()) == {1.0}, one_read
    twice = {name: ratios[name] for name in TWICE}
    assert 1.49 < min(twice.values()) and max(twice.values()) < 1.56, twice
    fused = {name: ratios[name] for name in FUSED}
    assert max(fused.values()) <= 1.05, fused
    zero = {name: ratio for name, ratio in ratios.items() if name.endswith("-zero")}
    assert len(zero) >= 4 and max(zero.values()) <= 1.01, zero


STAGES = [
    *((320, 64), (320, 32), (640, 32), (640, 16), (1280, 16), (1280, 8), (960, 16), (192, 64), (384, 32), (576, 16)),
    *((960, 32), (1280, 32), (2560, 16), (96, 64), (640, 64), (960, 64)),
]


def norm_launches(C, side, last, dtype, N):
    """Those of the forward, and of the backward of a norm without parameters."""
    x = torch.empty(N, C, side, side, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    stat = torch.empty(N, 32, device="meta")
    with recording(run=False) as forward:
        group_norm_silu.forward(x, 32, None, None, 1e-5, None, None, True, last)
    with recording(run=False) as backward:
        group_norm_silu_bwd.backward(x, x, stat, stat, None, None, None, None, 32, True, last)
    return forward, backward


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize(("C", "side"), STAGES)
def test_unet_stages(C, side, last, dtype):
    """Contiguous groups are read once where they fit the registers; channels-last rows are of 64 bytes and of whole
    sectors, read once at the small stages; no thread holds more than 80 numbers, all that a compiler unrolls."""
    for launches, most, in_registers in zip(
        norm_launches(C, side, last, dtype, 8), ((40960, 20480), (20480, 10240)), (80, 40), strict=True
    ):
        kernels = [launch.kernel.__name__ for launch in launches]
        if last:
            assert kernels == ["_one_read"] or C // 32 * side**2 * 2 > most[1] or side > 8
        else:
            assert (kernels == ["_one_read"]) == (C // 32 * side**2 <= most[0])
        assert kernels == ["_one_read"] or len(kernels) == 2
        for launch in launches:
            given = launch.arguments
            if kernels == ["_one_read"]:
                tile = (given["HEAD"] + given["TAIL"]) * given["PIXELS"]
                assert tile <= min(most[last], in_registers * 32 * launch.options["num_warps"])
            if last:
                row = min(given["GROUPS"] * given["CPG"], given.get("LANES", C)) * x_size(given)
                assert row >= min(64, C * x_size(given))
                assert _group_tiles.sectors_per_byte(row, C * x_size(given)) <= 1.1


def x_size(given) -> int:
    return given["x"].element_size()


@pytest.mark.parametrize("N", (1, 2))
@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize(("C", "side"), [(C, side) for C, side in STAGES if C * side**2 >= 2**19])
def test_few_samples_occupy_the_gpu(C, side, last, N):
    """Of a large image there are programs for most SMs (an A100 has 108), however few its groups are."""
    for launches in norm_launches(C, side, last, torch.bfloat16, N):
        for launch in launches:
            assert math.prod(launch.grid) >= 96, (launch.kernel.__name__, launch.grid)


@pytest.mark.parametrize(
    "name", [name for name in traffic_cases.CASES if name.startswith("group_norm_silu") and "nhwc" in name]
)
def test_channels_last_groups_move_whole_sectors(name):
    row = traffic_cases.committed()[name]
    assert int(row["sectors"]) <= 1.1 * int(row["requested"])


def test_backward_reads_once_beside_its_partial_sums():
    """Every backward of a norm: at most 2 % for rows of weights that two launches read."""
    rows = {name: row for name, row in traffic_cases.committed().items() if "norm" in name and "_bwd" in name}
    large = tuple(
        f"group_norm_silu_bwd-{size}" for size in ("320x64", "640x32-bf16-nhwc", "1280x16-bf16-nhwc", "96x64")
    )
    rows = {
        name: row
        for name, row in rows.items()
        if "split" not in name and not name.startswith((*large, "group_norm_silu_bwd-2560x16"))
    }
    plain = {name: (int(row["moved"]) - int(row["partials"])) / int(row["compulsory"]) for name, row in rows.items()}
    assert len(plain) == 16 and max(plain.values()) <= 1.02, plain
    partials = {name: int(row["partials"]) / int(row["compulsory"]) for name, row in rows.items()}
    assert max(share for name, share in partials.items() if name.startswith("group_norm")) <= 0.05, partials
    assert max(partials.values()) <= 0.35, partials


def test_partial_sums_of_many_tokens_are_3_percent(monkeypatch):
    """Of a video's 27,280 tokens of 3072; twice as many programs would show."""
    shares = {kind: partials.share(kind, 27280) for kind in partials.KINDS}
    assert max(shares.values()) <= 0.03, shares
    monkeypatch.setattr(_row_tiles, "LONG_PROGRAMS", 512)
    assert partials.share("layer_norm_modulate", 27280) > 0.03


def test_a_second_read_would_show_in_the_table(monkeypatch):
    """Planted: the op runs twice."""
    from zeroblock.kernels import gate_residual

    def twice(*arguments):
        stock(*arguments)
        return stock(*arguments)

    stock = gate_residual.forward
    monkeypatch.setattr(gate_residual, "forward", twice)
    row = traffic_cases.row("gate_residual-channel")
    assert (
        float(row["ratio"]) > 1.9 and str(row["moved"]) != traffic_cases.committed()["gate_residual-channel"]["moved"]
    )
