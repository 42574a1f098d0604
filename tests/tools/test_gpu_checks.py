"""What a run on a GPU judges and times."""

import pytest

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


def test_without_diffusers_its_models_are_left_out_with_a_reason(monkeypatch):
    from gpurun import Setting, models
    from gpurun.worker import outcome
    from zbench import whole

    own = {name: build for name, build in whole.MODELS.items() if name in ("adm_unet", "dit_s2")}
    monkeypatch.setattr(whole, "diffusers", None)
    monkeypatch.setattr(whole, "MODELS", own)
    units = models.units(Setting("cpu", True))
    assert len(units) == 3 * len(own) + 1
    row = outcome(units["diffusers"], lambda: None)
    assert row["status"] == "skipped" and row["error"].startswith("diffusers is not installed")
