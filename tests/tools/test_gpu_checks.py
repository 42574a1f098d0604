"""What a run on a GPU judges and times."""

from functools import partial

import pytest
import torch

from zeroblock.backends.cuda import CUDA

from ..cuda.simt import emulated

pytestmark = [pytest.mark.one_worker, pytest.mark.usefixtures("benchmark_path")]


def test_every_op_is_judged_and_timed():
    from gpurun import checks, graphs, sanitized
    from zbench import headlines

    from zeroblock.testing.cases import OPS

    cases = [case for case, _ in checks.firsts()]
    assert {case.op for case in cases} == set(OPS) == {check.case.op for check in sanitized.watched("cuda").values()}
    assert {check.case.op for check in checks.large("cuda", False)} >= {op for op in OPS if "linear" not in op}
    norms = [case for group in (cases, checks.LARGE) for case in group if case.options.get("per_frame")]
    assert len(norms) == 2
    replayed = [name for name, _ in graphs.graphs("cuda", False)]
    for case in cases:
        for backend in ("triton", "cuda", graphs.PLANNED):
            assert any(name.startswith(f"graph/{backend}/{case}/") for name in replayed), case
    timed = [case.op for case in headlines.cases(False)]
    for name in ("group_norm_silu_film", "group_norm_silu_per_frame", "channel_rms_norm_silu", "layer_norm_modulate"):
        assert timed.count(name) == 4, name
    assert {"gate_residual", "residual_norm_modulate_index", "residual_norm_modulate_tanh", "resblock"} <= set(timed)


# Most blocks of a cluster, and launches, on a GPU with clusters: forward and backward, whose last launch is for the
# parameters. Between two passes of the backward there is one more.
PATHS = {"cluster": [(True, 1), (True, 2)], "two-passes": [(False, 2), (False, 4)]}


@pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
@pytest.mark.parametrize("variant", PATHS)
def test_group_norms_that_no_block_holds_are_judged_and_replayed(variant):
    """In fp32 and bf16, in both layouts: which launches the CUDA kernels take is asked of the emulator, none runs."""
    from gpurun import checks, graphs

    case = next(case for case in checks.LARGE if case.op == "group_norm_silu" and case.variant == variant)
    assert f"graph/cuda/{case}/dense/bfloat16" in dict(graphs.graphs("cuda", False))
    judged = {(check.layout, check.dtype) for check in checks.large("cuda", False) if check.case is case}
    assert judged == {(layout, t) for layout in ("dense", "nhwc") for t in (torch.float32, torch.bfloat16)}
    (N, C, S), groups = (case.sizes[name] for name in "NCS"), case.options["num_groups"]
    v, stat = torch.empty(C), torch.empty(N, groups)
    for layout, dtype in judged:
        form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        x = torch.empty(N, C, *S, dtype=dtype).to(memory_format=form)
        forward = partial(CUDA.group_norm_silu, x, groups, v, v, 1e-5, None, None, True)
        backward = partial(CUDA.group_norm_silu_bwd, x, x, stat, stat, v, v, None, None, groups, True)
        with emulated.emulated(), emulated.gpu(*emulated.GPUS["sm_90"]):
            launches = [emulated.recorded(call) for call in (forward, backward)]
        found = [(max(cluster for _, _, cluster in each) > 1, len(each)) for each in launches]
        assert found == PATHS[variant], (layout, dtype, launches)


def test_without_diffusers_its_models_are_left_out_with_a_reason(monkeypatch):
    from gpurun import Setting, models
    from gpurun.worker import outcome
    from zbench import whole

    own = {name: build for name, build in whole.MODELS.items() if name in ("adm_unet", "dit_s2")}
    monkeypatch.setattr(whole, "diffusers", None)
    monkeypatch.setattr(whole, "MODELS", own)
    units = models.units(Setting("cpu", True))
    assert len(units) == 3 * len(own) + 1
    row = outcome(units["diffusers"])
    assert row["status"] == "skipped" and row["error"].startswith("diffusers is not installed")
