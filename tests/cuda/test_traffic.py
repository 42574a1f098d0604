"""Bytes and FLOPs of the CUDA kernels: the committed table is what they do, reaches its targets, and can fail."""

import pytest

from .simt import compare, emulated, traffic

pytestmark = pytest.mark.slow

ROWS = traffic.committed()
TRITON = {row["case"]: row for row in compare.read(compare.TRITON / "traffic.csv")}


def test_ops_read_and_write_once():
    ratios = {case: float(row["ratio"]) for case, row in ROWS.items()}
    once = {
        case: ratio
        for case, ratio in ratios.items()
        if "_bwd" not in case and not case.startswith("conv_moments") and not case.startswith("group_norm_silu-")
    }
    assert 0.99 < once.pop("residual_norm_modulate-indexed") <= 1  # no token chooses the row that is not read
    assert len(once) >= 14 and set(once.values()) == {1.0}, once
    held = [case for case in ratios if case.endswith("-cluster") or "1280x8" in case]
    forward = [ratios[case] for case in held if "_bwd" not in case]
    assert len(forward) == 4 and set(forward) == {1.0}, "a group on chip or in a cluster is read once"
    assert max(ratios[case] for case in held) < 1.06


def test_two_passes_touch_x_twice_and_no_more():
    for form in ("nchw", "nhwc"):
        row = ROWS[f"group_norm_silu-320x64-bf16-{form}"]
        assert int(row["distinct"]) / int(row["compulsory"]) < 1.52
        assert float(ROWS[f"group_norm_silu_bwd-320x64-bf16-{form}"]["ratio"]) < 1.8


def test_both_backends_must_move_and_multiply_the_same():
    """The same op at the same shape: compulsory bytes may differ by the flag, and by what only one of them returns."""
    shared = [case for case in ROWS if case in TRITON]
    assert len(shared) >= 20
    for case in shared:
        ours, theirs = ROWS[case], TRITON[case]
        assert abs(int(ours["compulsory"]) - int(theirs["compulsory"])) <= 0.01 * int(theirs["compulsory"]), case
        if case.startswith("conv_residual"):
            assert ours["dot_flops"] == theirs["dot_flops"], case


PRINTED = """\
copy-8 1 0 data 4096 4096 4096 0 0 0
copy-8 1 1 data 4096 0 0 4096 4096 0
copy-8 1 2 scratch 512 0 0 512 512 0
copy-8 1 3 data 16 160 16 0 0 0
copy-8 end
copy-8 2 0 data 4096 8192 4096 0 0 64
copy-8 2 1 data 4096 0 0 4096 4096 64
copy-8 end
"""


def test_what_the_numbers_mean():
    forward, backward = traffic.parse(PRINTED)
    assert forward == {
        "case": "copy-8",
        "compulsory": "8208",
        "moved": str(8208 + 512),
        "partials": "512",
        "ratio": "1.062",
        "distinct": str(8208 + 512),
        "requested": str(8192 + 512 + 160),
        "dot_flops": "0",
    }
    assert (backward["case"], backward["moved"], backward["dot_flops"]) == ("copy_bwd-8", "8192", "64")


def test_a_second_read_shows():
    twice = PRINTED.replace("data 4096 4096 4096 0 0 0", "data 4096 8192 4096 0 0 0")
    assert [float(row["ratio"]) for row in traffic.parse(twice)] == [1.561, 1.0]


@pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
def test_the_table_is_what_the_kernels_do():
    """Exact numbers: `python -m tests.cuda.simt.traffic` renews them."""
    assert {row["case"]: row for row in traffic.count()} == ROWS


# ---- beside Triton --------------------------------------------------------------------------------------------------


def test_the_comparison_is_of_the_committed_tables():
    assert compare.PAGE.read_text() == compare.render(), "python -m tests.cuda.simt.compare renews it"


def test_the_comparison_needs_every_kernel_in_both_tables(monkeypatch):
    monkeypatch.setattr(compare, "PAIRS", (compare.PAIRS[0]._replace(cuda=("no_such_kernel",)),))
    with pytest.raises(KeyError):
        compare.render()
    monkeypatch.setattr(compare, "PAIRS", (compare.PAIRS[0]._replace(triton=("no-such-case", ("_forward",))),))
    with pytest.raises(AssertionError, match="not in the Triton table"):
        compare.render()
