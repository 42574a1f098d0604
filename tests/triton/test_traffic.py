"""The counter of bytes is exact, its checks fail where they should, and the committed table is that of the kernels."""

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("ml_dtypes")

import triton.language as tl  # noqa: E402

from . import traffic, traffic_cases  # noqa: E402

traffic.install()

from zeroblock.kernels import group_norm_silu, group_norm_silu_bwd  # noqa: E402
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
    one_read = {name: ratio for name, ratio in ratios.items() if name.startswith(ONE_READ) and "split" not in name}
    assert len(one_read) == 27 and set(one_read.values()) == {1.0}, one_read
    fused = {name: ratios[name] for name in FUSED}
    assert max(fused.values()) <= 1.05, fused
    zero = {name: ratio for name, ratio in ratios.items() if name.endswith("-zero")}
    assert len(zero) >= 4 and max(zero.values()) <= 1.01, zero


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize(
    ("C", "side"),
    [
        (320, 64),
        (320, 32),
        (640, 32),
        (640, 16),
        (1280, 16),
        (1280, 8),
        (960, 16),
        (192, 64),
        (384, 32),
        (576, 16),
        (960, 32),
        (1280, 32),
    ],
)
def test_unet_shapes_are_read_once(C, side, last, dtype):
    """Groups of the U-Net stages stay on chip; what is larger than a register file is split, backward of fp32 first."""
    x = torch.empty(2, C, side, side, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    stat = torch.empty(2, 32, device="meta")
    with recording(run=False) as forward:
        group_norm_silu.forward(x, 32, None, None, 1e-5, None, None, True, last)
    with recording(run=False) as backward:
        group_norm_silu_bwd.backward(x, x, stat, stat, None, None, None, None, 32, True, last)
    assert [launch.kernel.fn.__name__ for launch in forward] == ["_one_read"]
    held = C // 32 * side * side * x.element_size() <= 81920
    assert len(backward) == (1 if held else 3)


def test_backward_reads_once_beside_its_partial_sums():
    """Every backward of a norm: at most 2 % for rows of weights that two launches read."""
    rows = {name: row for name, row in traffic_cases.committed().items() if "norm" in name and "_bwd" in name}
    rows = {name: row for name, row in rows.items() if "split" not in name}
    plain = {name: (int(row["moved"]) - int(row["partials"])) / int(row["compulsory"]) for name, row in rows.items()}
    assert len(plain) == 20 and max(plain.values()) <= 1.02, plain
    partials = {name: int(row["partials"]) / int(row["compulsory"]) for name, row in rows.items()}
    assert max(share for name, share in partials.items() if name.startswith("group_norm")) <= 0.05, partials
    assert max(partials.values()) <= 0.35, partials


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
