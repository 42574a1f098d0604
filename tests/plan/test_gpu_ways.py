"""Every way of the planned GPU steps against eager in fp64: the library's and the CUDA kernels (in the emulator) in an
ordinary process, Triton's in an interpreting one; and that what a plan may choose is compiled ahead of time."""

import contextlib
import functools

import pytest
import torch

import zeroblock as zb
from zeroblock._dtypes import KERNELS
from zeroblock.backends import available as _backends
from zeroblock.backends.base import GroupNorm
from zeroblock.backends.gpu import gemms as _gpu_gemms
from zeroblock.backends.gpu.norms_gates import PER_THREAD
from zeroblock.plan import planned as _plan
from zeroblock.steps.flag import NEVER
from zeroblock.steps.linear import LinearGateCall
from zeroblock.testing.cases import CASES, Case
from zeroblock.testing.parity import assert_parity

from ..cuda.simt import emulated
from .gpu_cases import always_flagged, planned_on_the_cpu, prefer

pytestmark = pytest.mark.interpreted
INTERPRETS = _backends.interprets()
TRITON = _backends.triton()
NORMS = (
    "group_norm_silu-film",
    "layer_norm_modulate-chunks",
    "rms_norm_modulate-affine-prime",
    "gate_residual-one",
    "gate_residual_layer_norm_modulate-gate-bd",
)
CHANNELS = "channel_rms_norm_silu-film-prime"
ROWS = "residual_norm_modulate-index", "residual_norm_modulate-affine-ungated"
CONVS = (
    "conv_residual-3x3",
    "conv_residual-1x1-no-bias",
    "group_norm_silu_conv_residual-film",
    "group_norm_silu_conv_residual-1x1-bare",
)
# Channels by eight, as the CUDA convolution takes them.
POINTS = (
    Case("conv_residual", "point", {"N": 2, "C": 16, "S": (9, 7), "K": 1, "out": 8, "padding": 0}, {"padding": 0}),
    Case(
        "group_norm_silu_conv_residual",
        "point",
        {"N": 2, "C": 16, "S": (9, 7), "K": 1, "out": 8, "padding": 0},
        {"padding": 0, "num_groups": 4},
    ),
)
LINEARS = (
    *[str(c) for c in CASES if c.op == "linear_gate_residual" and not c.large][:2],
    next(str(c) for c in CASES if c.op == "layer_norm_modulate_linear"),
)
BY_NAME = {str(case): case for case in (*CASES, *POINTS)}
# way: the cases that it takes; the rest of a case's steps are the library's.
WAYS: dict[str, tuple[str, ...]] = {"library": (*NORMS, CHANNELS, *ROWS, *CONVS, *LINEARS)}
if INTERPRETS:
    WAYS["triton"] = (*NORMS, CHANNELS, *ROWS)
    WAYS["triton split"] = (NORMS[0], "group_norm_silu-film-prime")  # 143 pixels: a tile is cut
    WAYS["triton folded"] = CONVS[3:]
    WAYS["library in one pass"] = CONVS[:1] + CONVS[2:3]
    # 3x3 only with the smallest tiles: tests/triton/test_gemm_kernels.py has them with all.
    WAYS |= {f"triton {config}": (CONVS[1], CONVS[3], *LINEARS) for config in _gpu_gemms.CONFIGS}
    WAYS |= {config: (*CONVS, *LINEARS) for config in ("triton 64x64x64", "triton 64x64x32")}
    WAYS |= {f"triton x{n}": NORMS[1:] if n == 16 else (*NORMS[1:3], NORMS[4]) for n in (8, 16, 32)}
else:
    WAYS |= {
        "cuda": (*NORMS, CHANNELS, *ROWS, "conv_residual-3x3-no-bias", CONVS[0], CONVS[2], *map(str, POINTS)),
        "cuda fused": (CONVS[2], str(POINTS[1])),
    }


def _dtypes(way: str, case) -> list[tuple[torch.dtype, str]]:
    nhwc = "nhwc" if "conv" in case.op or "nhwc" in case.layouts else "dense"
    both = [(torch.float32, nhwc), (torch.bfloat16, nhwc)]
    if way.count("x") == 2:  # a GEMM's configuration is for one width of elements
        return both[:1] if way.endswith("x32") else both[1:]
    return both[1:] if way.startswith("cuda") and "conv" in case.op else both


PARAMETERS = [
    pytest.param(way, name, dtype, layout, id=f"{way.replace(' ', '_')}-{name}-{str(dtype)[6:]}")
    for way, names in WAYS.items()
    for name in names
    for dtype, layout in _dtypes(way, BY_NAME[name])
]


@pytest.mark.parametrize(("way", "name", "dtype", "layout"), PARAMETERS)
def test_every_way_is_right(way, name, dtype, layout):
    case = BY_NAME[name]
    with contextlib.ExitStack() as stack:
        if way.startswith("cuda"):  # on a GPU too: these are CPU tensors
            if emulated.missing() is not None:
                pytest.skip(str(emulated.missing()))
            stack.enter_context(emulated.emulated())
        patch = stack.enter_context(planned_on_the_cpu())
        ran = prefer(patch, way)
        stack.enter_context(_plan.use("fixed"))
        assert_parity(case, dtype, layout)
    assert any(found == way or found.startswith(way + " ") for _, found in ran), ran


@pytest.mark.skipif(INTERPRETS, reason="the stand-in for a GPU is the emulator, which runs in an ordinary process")
@pytest.mark.parametrize("op", ("conv_residual", "group_norm_silu_conv_residual"))
def test_a_zero_weight_stops_the_cuda_kernels(op):
    """Through the public call: residual + bias bit by bit, also where the input is not finite."""
    if emulated.missing() is not None:
        pytest.skip(str(emulated.missing()))
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g).bfloat16().to(memory_format=torch.channels_last)  # noqa: E731
    x, residual, bias = draw(1, 16, 6, 5), draw(1, 8, 6, 5), torch.randn(8, generator=g).bfloat16()
    x[0, 1] = float("nan")
    norm = (4, None, None) if op != "conv_residual" else ()
    for way in ("cuda", "cuda fused") if norm else ("cuda",):
        with emulated.emulated(), planned_on_the_cpu() as patch, _plan.use("fixed"):
            ran = prefer(patch, way)
            always_flagged(patch)
            y = getattr(zb, op)(x, *norm, torch.zeros(8, 16, 3, 3, dtype=torch.bfloat16), bias, residual)
        assert (f"flagged {op}", way) in ran
        zb.testing.assert_bitwise_equal(y, (residual.float() + bias.float()[:, None, None]).bfloat16(), way)


# ---- ahead of time --------------------------------------------------------------------------------------------------


def _gemm_takes(config: str, dtype: torch.dtype) -> bool:
    h = torch.empty(2, 8, 8, dtype=dtype, device="meta")
    return "no configuration" not in str(TRITON.why_not_own("linear_gate_residual", h, h[0], None, None, None, config))


def _facts(launch) -> tuple:
    """What a GEMM-shaped launch compiles to, as far as a plan can change it."""
    a = launch.arguments
    sizes = tuple(a[k] for k in ("BM", "BN", "BK"))
    operand = a["x"] if "x" in a else a["h"]
    return (
        launch.kernel.__name__,
        sizes,
        operand.dtype,
        a.get("KH"),
        a["workspace"] is not None,
        "fold" in a and (a["fold"] is not None),
        *sorted(launch.options.items()),
    )


@pytest.mark.skipif(TRITON is None or INTERPRETS, reason="needs triton, not interpreting")
def test_what_a_plan_may_choose_is_compiled_ahead_of_time():
    from zeroblock.kernels import _launch, conv_residual, group_norm_silu_conv_residual, linear_gate_residual

    kernels = ("_conv_residual", "_conv_wgrad", "_linear_gate_residual")

    def recorded(calls) -> set[tuple]:
        with _launch.recording(run=False) as launches:
            for call in calls:
                call()
        return {_facts(launch) for launch in launches if launch.kernel.__name__ in kernels}

    modules = (conv_residual, group_norm_silu_conv_residual, linear_gate_residual)
    compiled = recorded(case for module in modules for case in module.COMPILE_CASES.values())
    new = lambda *size, dtype: torch.empty(size, dtype=dtype, device="meta")  # noqa: E731

    def calls(config, dtype):
        for channels, side in ((320, 64), (1280, 8)):  # tiles enough, and so few that the reduction is split
            for kernel in (1, 3):
                x, w = new(2, channels, side, side, dtype=dtype), new(channels, channels, kernel, kernel, dtype=dtype)
                yield lambda x=x, w=w, p=[kernel // 2] * 2: TRITON.own_conv(x, w, None, None, p, None, config)
                yield lambda x=x, w=w, p=[kernel // 2] * 2: TRITON.own_conv_dgrad(x, w, p, None, config)
                if config in _gpu_gemms.WGRADS:
                    yield lambda x=x, w=w, p=[kernel // 2] * 2: TRITON.own_conv_wgrad(x, x, w, p, config)
            h, w = new(2, side * side, channels, dtype=dtype), new(640, channels, dtype=dtype)
            call = LinearGateCall(TRITON, h, w, None, None, None, None, NEVER, False)
            yield lambda call=call: TRITON.own_linear_gate(call, None, config)
        if config in _gpu_gemms.FOLDS:
            x, w = new(2, 320, 64, 64, dtype=dtype), new(192, 320, 1, 1, dtype=dtype)
            norm = GroupNorm(32, None, None, 1e-5, None, None, None, 0.0)
            yield lambda: TRITON.folded_norm_conv(x, norm, w, None, None, [0, 0], None, config)

    for config in _gpu_gemms.CONFIGS:
        for dtype in KERNELS:
            if _gemm_takes(config, dtype):
                missing = recorded(calls(config, dtype)) - compiled
                assert not missing, (config, dtype, missing)


def _tile(launch) -> tuple:
    a = launch.arguments
    return (
        launch.kernel.__module__,
        launch.kernel.__name__,
        a["ROWS"],
        a.get("BLOCK_D", a.get("COLS")),
        *sorted(launch.options.items()),
    )


@pytest.mark.skipif(TRITON is None or INTERPRETS, reason="needs triton, not interpreting")
def test_tiles_of_norms_and_gates_are_compiled_ahead_of_time():
    """Every number per thread, at rows of the lengths that the kernels' cases have."""
    from zeroblock.kernels import _launch, gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate

    def recorded(calls) -> set[tuple]:
        with _launch.recording(run=False) as launches:
            for call in calls:
                call()
        return {_tile(launch) for launch in launches if launch.kernel.__name__ in ("_forward", "_backward")}

    modules = (gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate)
    compiled = recorded(case for module in modules for case in module.COMPILE_CASES.values())
    from zeroblock.backends.triton import why_not_tile

    for D in (128, 384, 1152, 3072, 6144):
        x, row = (torch.empty(*size, D, dtype=torch.bfloat16, device="meta") for size in ((2, 64), (2,)))
        stat = torch.empty(2, 64, device="meta")
        arguments = {
            "layer_norm_modulate": (x, row, row, None, None, 1e-6, False),
            "layer_norm_modulate_bwd": (x, x, stat, stat, row, row, None, None, False),
            "gate_residual": (x, row, x),
            "gate_residual_bwd": (x, row, x, True, True),
            "gate_residual_layer_norm_modulate": (x, row, x, row, row, 1e-6),
            "gate_residual_layer_norm_modulate_bwd": (x, x, x, stat, stat, row, x, row, row),
        }
        for op, (own, *others) in PER_THREAD.items():
            run = functools.partial(getattr(TRITON, op), *arguments[op])
            assert recorded([run]) == recorded([functools.partial(run, per_thread=own)])
            for per_thread in others if why_not_tile(op, x) is None else ():
                found = recorded([functools.partial(run, per_thread=per_thread)])
                assert found <= compiled and found != recorded([run]), (op, D, per_thread)
