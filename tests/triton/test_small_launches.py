"""The launchers' constants made small: several steps of a program, several programs of a sample, tiles that are cut.
Unchanged they do so from the sizes of training on, which no interpreter runs.
"""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("ml_dtypes")

from . import interpret  # noqa: E402

interpret.install()

from zeroblock.kernels import (  # noqa: E402
    _group_tiles,
    _launch,
    _row_tiles,
    channel_rms_norm_silu,
    gate_residual,
    group_norm_silu,
)
from zeroblock.plan import planned as _plan  # noqa: E402
from zeroblock.testing import use_backend  # noqa: E402
from zeroblock.testing.cases import Case  # noqa: E402
from zeroblock.testing.parity import assert_parity  # noqa: E402

from ..plan.gpu_cases import planned_on_the_cpu, prefer  # noqa: E402

SMALL = {
    _row_tiles: {"PROGRAMS": 1, "FORWARD_STEPS": 4, "BACKWARD_PROGRAMS": 1, "BACKWARD_STEPS": 5},
    gate_residual: {"PROGRAMS": 1, "STEPS": 4, "ELEMENTS": 1024},
    channel_rms_norm_silu: {"PROGRAMS": 1, "TILE": 64, "STEPS": 4, "LEAST_PIXELS": 8},
    _group_tiles: {"TILE": 16, "MOST_PARTS": 2},
    group_norm_silu: {"PIECE_NUMBERS": 2},  # pieces combined in several rounds
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module, constants in SMALL.items():
        for name, value in constants.items():
            assert getattr(module, name) > value
            monkeypatch.setattr(module, name, value)
    forget_tiles()
    yield
    forget_tiles()


def forget_tiles() -> None:
    for choice in (_group_tiles.held, _group_tiles.split_tiles, _group_tiles.channel_block):
        choice.cache_clear()


def steps_of(launches: list) -> dict[str, tuple[int, int]]:
    """(steps of a program, programs of a sample) by kernel, of those whose programs take steps."""
    return {x.kernel.__name__: (x.arguments["steps"], x.grid[0]) for x in launches if "steps" in x.arguments}


SIZE = {"B": 2, "T": 45, "D": 200}  # forward 6 tiles of 8 rows, backward 12 of 4, of a gate 6 of 8: the last one is cut
TOKENS = (
    Case("layer_norm_modulate", "steps", {**SIZE, "affine": "both"}),
    Case("layer_norm_modulate", "steps-per-token", {**SIZE, "kind": "btd", "affine": "both"}),
    Case("rms_norm_modulate", "steps", {**SIZE, "affine": "weight"}),
    *(Case("gate_residual", f"steps-{gate}", {"size": tuple(SIZE.values()), "gate": gate}) for gate in ("d", "bd")),
    Case("gate_residual", "steps-btd", {"size": tuple(SIZE.values()), "gate": "btd"}),
    *(Case("gate_residual_layer_norm_modulate", f"steps-{gate}", {**SIZE, "gate": gate}) for gate in ("bd", "btd")),
)
PARTED = {"B": 2, "T": 11, "D": 700}  # 512 columns and 188 of 256, two rows a tile


@pytest.mark.parametrize("case", TOKENS, ids=str)
def test_programs_take_several_steps(case):
    with use_backend("triton"), _launch.recording() as launches:
        assert_parity(case, torch.float32)
    found = steps_of(launches)
    assert found["_backward"][0] > 1 and found["_backward"][1] > 1
    assert case.op == "gate_residual" or found["_forward"] == (4, 2)


@pytest.mark.parametrize(
    "case",
    (
        Case("layer_norm_modulate", "parts", {**PARTED, "affine": "both"}),
        Case("rms_norm_modulate", "parts", {**PARTED, "kind": "btd", "affine": "weight"}),
        Case("gate_residual_layer_norm_modulate", "parts", {**PARTED, "gate": "bd"}),
    ),
    ids=str,
)
def test_rows_in_two_parts(case):
    with use_backend("triton"), _launch.recording() as launches:
        assert_parity(case, torch.float32)
    forward = next(launch for launch in launches if launch.kernel.__name__ == "_forward")
    assert [forward.arguments[name] for name in ("ROWS", "BLOCK_D", "TAIL", "steps")] == [2, 512, 256, 4]


@pytest.mark.parametrize("layout", ("dense", "nhwc"))
def test_programs_take_several_tiles_of_pixels(layout):
    """91 pixels in tiles of 8, or of 4 channels-last, four to a program: the last tile is cut."""
    case = Case("channel_rms_norm_silu", "steps", {"N": 2, "C": 12, "S": (13, 7), "film": True})
    with use_backend("triton"), _launch.recording() as launches:
        assert_parity(case, torch.float32, layout)
    programs = (4, 3) if layout == "dense" else (4, 6)
    assert steps_of(launches) == {"_forward": programs, "_backward": programs}


@pytest.mark.parametrize("layout", ("dense", "nhwc", "nhwc pieces"))
def test_groups_that_are_split(layout, monkeypatch):
    """35 pixels in tiles of 16, of one channels-last or of 8 of half a group each, in two parts: the last tile is cut.
    The moments of a contiguous group are those of 140 numbers in a row."""
    if layout == "nhwc pieces":
        monkeypatch.setattr(_group_tiles, "TILE_CHANNELS", (2,))
    sizes = {"N": 2, "C": 12, "S": (7, 5), "film": True, "affine": "neither"}
    case = Case("group_norm_silu", "split", sizes, {"num_groups": 3})
    with planned_on_the_cpu() as patch, _plan.use("fixed"), _launch.recording() as launches:
        ran = prefer(patch, "triton split")
        assert_parity(case, torch.float32, layout.split()[0])
    assert {way for _, way in ran} == {"triton split"}
    steps = {"dense": 2, "nhwc": 18, "nhwc pieces": 3}[layout]
    moments = 5 if layout == "dense" else steps
    assert steps_of(launches) == {"_moments": (moments, 2), "_sums": (steps, 2), "_apply": (steps, 2)}
    applied = [x.arguments for x in launches if x.kernel.__name__ == "_apply"]
    of_forward, of_backward = (next(x for x in applied if ("y" in x) is forward) for forward in (True, False))
    assert of_forward["BLOCK"] < of_forward["pieces"] or layout == "dense"
    assert of_backward["SUBS"] == {"dense": 4, "nhwc": 1, "nhwc pieces": 2}[layout]
    assert of_backward["BLOCK"] < 2 * of_backward["SUBS"]
