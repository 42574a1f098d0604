"""The row norms keep the memory busy and their lanes too, by the model of streams.py."""

import pytest

pytest.importorskip("triton")

from . import streams  # noqa: E402
from .test_static import compiling  # noqa: E402

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


@pytest.mark.parametrize(
    ("D", "idle"), [(640, 0.17), (768, 0.0), (1152, 0.25), (1280, 0.17), (1536, 0.0), (2048, 0.0), (3072, 0.0)]
)
def test_backward_lanes_idle_little(D, idle):
    """Of the norm, whose instructions are more than its bytes allow time for; not of the gated one, whose are fewer:
    its rows are whole."""
    plain, gated = (streams.launches(D)[op] for op in BACKWARD)
    assert plain.idle == pytest.approx(idle, abs=0.01)
    assert gated.idle == pytest.approx(1 - D / (1 << (D - 1).bit_length()))


def test_instructions_of_the_gated_backward_take_less_time_than_its_bytes():
    """So that its idle lanes, 44 % of 1152, cost nothing (a model). Those of the other are fewer than with whole rows,
    496 and 984."""
    done = compiling("-m", "tests.triton.streams")
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines()[2:]:
        op, D, *_, both = (cell.strip() for cell in line.strip("|").split("|"))
        found[op, int(D)] = [float(number) for number in both.split(",") if number]
    for D, whole in ((1152, 496), (3072, 984)):
        plain, gated = (found[op, D] for op in BACKWARD)
        assert 0 < plain[0] < 0.75 * whole and 0 < gated[0] < gated[1], found


def test_no_row_leaves_more_than_a_quarter_of_the_lanes_idle():
    assert max(streams.launches(D)["layer_norm_modulate"].idle for D in range(520, 4097, 8)) <= 0.25
