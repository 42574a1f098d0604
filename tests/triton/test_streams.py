"""The row norms keep the memory busy and their lanes too, by the model of streams.py."""

import pytest

pytest.importorskip("triton")

from . import streams  # noqa: E402

BACKWARD = ("layer_norm_modulate_bwd", "gate_residual_layer_norm_modulate_bwd")


@pytest.mark.parametrize("target", streams.PROCESSORS)
@pytest.mark.parametrize("D", (1152, 3072))
def test_backward_has_25_kb_in_flight(D, target):
    """Of x and dy, and what else is read, on their way while a program reduces."""
    for op in BACKWARD:
        found = streams.launches(D)[op]
        row = streams.facts(op, D, target, found.warps)
        assert int(row["spills"]) == 0 and streams.in_flight(found, row) >= 25, (op, found, row)


def test_a_kernel_without_its_buffers_is_caught():
    found = streams.launches(1152)[BACKWARD[0]]
    row = streams.facts(BACKWARD[0], 1152, "sm_90", found.warps)
    with pytest.raises(AssertionError, match="not in shared memory"):
        streams.in_flight(found, row | {"shared": str(found.buffers - 1)})
    assert streams.in_flight(found._replace(ahead=0), row) == 0


@pytest.mark.parametrize(
    ("D", "idle"),
    [(640, 0.0), (768, 0.0), (1152, 0.1), (1280, 0.0), (1536, 0.0), (2048, 0.0), (2304, 0.1), (3072, 0.0)],
)
def test_forward_lanes_idle_little(D, idle):
    for op in ("layer_norm_modulate", "gate_residual_layer_norm_modulate"):
        assert streams.launches(D)[op].idle == pytest.approx(idle), op


def test_no_row_leaves_more_than_a_quarter_of_the_lanes_idle():
    assert max(streams.launches(D)["layer_norm_modulate"].idle for D in range(520, 4097, 8)) <= 0.25
