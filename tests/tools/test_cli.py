"""The command, through main() and as `python -m zeroblock`; test_packaging.py has the installed script."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import cli
from zeroblock.doctor import text
from zeroblock.doctor.examine import random_target_loss
from zeroblock.tools import bench

from ..support import HANG

FACTORIES = """
import torch
from torch import nn

def healthy():
    last = nn.Linear(16, 3)
    for p in last.parameters():
        nn.init.zeros_(p)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), last), torch.randn(4, 8)

def dead():
    model, batch = healthy()
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    return model, batch

def symmetric():
    model, batch = healthy()
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    return model, batch

def model_alone():
    return healthy()[0]

def fails():
    raise OSError("no such checkpoint")

def vector_loss():
    return *healthy(), lambda model, batch: model(batch).sum(1)

def detached_loss():
    return *healthy(), lambda model, batch: model(batch).sum().detach()

def number_loss():
    return *healthy(), lambda model, batch: 1.0

def wrong_batch():
    return healthy()[0], torch.randn(4, 9)

def nothing():
    return None

value = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("factories", None)


@pytest.mark.parametrize("factory, status", [("healthy", 0), ("dead", 1), ("symmetric", 1)])
def test_doctor_status_and_files(folder, capsys, factory, status):
    files = ["--json", "found.json", "--html", "found.html"]
    assert cli.main(["doctor", f"factories:{factory}", *files]) == status
    printed = capsys.readouterr()
    assert ("healthy" in printed.out.splitlines()[-1]) == (status == 0)
    assert "\033" not in printed.out and printed.err == ""  # neither colour nor a bar where no terminal is
    found = json.loads((folder / "found.json").read_text())
    assert found["healthy"] is (status == 0) and len(found["parameters"]) == 4
    assert {"name", "kind", "predicted", "measured", "waits_for", "ranks"} <= found["parameters"][0].keys()
    assert (folder / "found.html").read_text().startswith("<!doctype html>")
    assert cli.main(["doctor", "factories.py:" + factory, "--quiet"]) == status
    assert capsys.readouterr().out == ""


def test_json_alone(folder, capsys):
    assert cli.main(["doctor", "factories:dead", "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["healthy"] is False


def test_doctor_with_shapes(folder):
    assert cli.main(["doctor", "factories:model_alone", "--shape", "4,8", "--quiet"]) == 0
    assert (
        cli.main(["doctor", "factories:model_alone", "--shape", "4x8", "--quiet", "--steps", "2", "--lr", "0.1"]) == 0
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["factories:fails"], "factories:fails failed: OSError: no such checkpoint"),
        (["factories:missing"], "factories has no attribute 'missing'"),
        (["factories:value"], "must be a function, got int"),
        (["factories:nothing"], "must return (model, example_batch[, loss]), got (NoneType)"),
        (["no_such_module:x"], "cannot import no_such_module: ModuleNotFoundError"),
        (["nonsense"], "must be given as package.module:name"),
        (["factories:model_alone"], "returns a model alone: give the shapes of its inputs with --shape"),
        (["factories:vector_loss"], "loss must return a scalar, got shape [4]"),
        (["factories:number_loss"], "loss must return a scalar Tensor, got float"),
        (["factories:detached_loss"], "loss must depend on a parameter with requires_grad"),
        (["factories:wrong_batch"], "model and loss failed on the batch [4, 9]: RuntimeError: mat1 and mat2"),
        (["factories:healthy", "--json", "no/folder.json"], "no/folder.json: the folder does not exist"),
        (["factories:healthy", "--device", "nonsense"], "--device nonsense"),
    ],
)
def test_errors_are_one_clear_line(folder, capsys, arguments, message):
    assert cli.main(["doctor", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("zeroblock doctor: ") and message in printed.err
    assert "Traceback" not in printed.err and "doctor: doctor" not in printed.err


def test_a_batch_that_does_not_fit_into_memory():
    class Large(nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    with pytest.raises(RuntimeError, match=r"the batch \[2, 3\] does not fit into the device's memory: tried"):
        zb.doctor(Large(3, 3), torch.randn(2, 3))


def test_traceback_on_request(folder, capsys):
    assert cli.main(["doctor", "factories:fails", "--traceback"]) == 2
    assert 'raise OSError("no such checkpoint")' in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--steps", "0"], ["--lr", "-1"], ["--shape", "2,x"], ["--shape", "0,3"]])
def test_bad_options(option, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "a:b", *option])
    assert stop.value.code == 2 and option[0] in capsys.readouterr().err


def test_bad_arguments_of_the_function():
    model, batch = nn.Linear(3, 3), torch.randn(2, 3)
    for wrong, error in [({"steps": 0}, ValueError), ({"steps": 1.5}, ValueError), ({"lr": 0}, ValueError)]:
        with pytest.raises(error, match=f"^doctor: {next(iter(wrong))} must be"):
            zb.doctor(model, batch, **wrong)
    for arguments in [(model,), ("model", batch), (model, batch, "loss"), (lambda: 3, batch)]:
        with pytest.raises(TypeError, match="^doctor: "):
            zb.doctor(*arguments)
    with pytest.raises(ValueError, match="must have a parameter with requires_grad"):
        zb.doctor(nn.Linear(3, 3).requires_grad_(False), batch)


def test_color_only_on_a_terminal(monkeypatch):
    diagnosis = zb.doctor(nn.Linear(3, 3), torch.randn(2, 3), steps=1)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = types.SimpleNamespace(isatty=lambda: True)
    assert text.wants_color(terminal) and not text.wants_color(types.SimpleNamespace(isatty=lambda: False))
    assert "\033[1;32mhealthy" in text.render(diagnosis, color=True)
    assert "\033" not in text.render(diagnosis, color=False) and "\033" not in str(diagnosis)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not text.wants_color(terminal)


def test_progress_bar(capsys):
    bar = cli.Progress(terminal=True)
    zb.doctor(nn.Linear(3, 3), torch.randn(2, 3), steps=2, progress=bar)
    bar.close()
    printed = capsys.readouterr()
    assert "1/2" in printed.err and "2/2" in printed.err and "########################" in printed.err
    assert printed.err.endswith("\r\033[K") and printed.out == ""


def test_info(capsys, monkeypatch):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.strip() == zb.info()
    monkeypatch.setattr(cli, "families", lambda: {"DiTBlock": "adaLN", "ResBlock": "FiLM"})
    assert cli.main(["info", "DiTBlock"]) == 0 and capsys.readouterr().out == "adaLN\n"
    assert cli.main(["info", "all"]) == 0 and "ResBlock\nFiLM" in capsys.readouterr().out
    assert cli.main(["info", "coverage"]) == 0
    assert "DiTTransformer2DModel: blocks\n  blocks: BasicTransformerBlock" in capsys.readouterr().out
    assert cli.main(["info", "Other"]) == 2 and "known: DiTBlock, ResBlock" in capsys.readouterr().err


def test_bench(folder, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "accelerate", lambda model: "1 block accelerated")
    files = tmp_path / "found.json", tmp_path / "found.svg"
    command = ["bench", "factories:healthy", "--seconds", "0.05", "--no-compile"]
    assert cli.main([*command, "--json", str(files[0]), "--picture", str(files[1])]) == 0
    printed = capsys.readouterr().out
    assert "1 block accelerated" in printed and "equality: ok" in printed and "\nUse for inference " in printed
    for way in ("eager", "accelerate", "accelerate + freeze"):
        assert any(line.startswith(f"{way} ") and "x" in line for line in printed.splitlines()), way
    found = json.loads(files[0].read_text())
    assert found["equal"] and found["advice"] in printed and set(found["peak_bytes"]) == {"eager", "accelerate"}
    assert "<svg" in files[1].read_text()

    def wrong(model):
        model[0].forward = lambda x, layer=model[0]: 1.01 * nn.functional.linear(x, layer.weight, layer.bias)

    monkeypatch.setattr(bench, "accelerate", wrong)
    assert cli.main(command) == 1
    assert "equality: DIFFERENT" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_compiles(folder, capsys):
    assert cli.main(["bench", "factories:healthy", "--seconds", "0.05"]) == 0
    printed = capsys.readouterr().out
    for way in ("torch.compile", "accelerate + torch.compile"):
        assert any(line.startswith(f"{way} ") and "x" in line for line in printed.splitlines()), printed


def test_bench_measures_the_models_it_is_given():
    """Saved bytes and equality of eager's DiT and zeroblock's, which have the same parameters."""
    from zeroblock.testing import eager
    from zeroblock.tools import models

    before = models.DiT(eager, hidden_size=48, depth=1, num_heads=2)
    after = models.DiT(zb.nn, hidden_size=48, depth=1, num_heads=2)
    for p in before.parameters():
        nn.init.normal_(p, std=0.05)
    after.load_state_dict(before.state_dict())
    batch = (torch.randn(2, 1, 16, 16), torch.tensor([3, 500]), torch.tensor([1, 2]))
    found = bench.compare(before, after, batch, random_target_loss, 0.05, "")
    assert found.equal and not found.left_out
    for counted in (found.saved_bytes, found.peak_bytes):
        assert 0 < counted["accelerate"] < counted["eager"]
    assert [set(found.times[mode]) for mode in ("inference", "training")] == [
        {"eager", "accelerate", "accelerate + freeze"},
        {"eager", "accelerate"},
    ]
    assert all(time.ms > 0 for times in found.times.values() for time in times.values())
    with torch.no_grad():
        after.final_layer.linear.weight.mul_(1.05)
    assert not bench.compare(before, after, batch, random_target_loss, 0.05, "").equal


def test_what_bench_advises():
    Time = bench.Time
    fast, slow, noisy = Time(1.0, 2.0, 1.9, 2.1), Time(3.0, 0.7, 0.6, 0.8), Time(2.0, 1.01, 0.9, 1.1)
    times = {
        "inference": {"eager": Time(2.0, 1.0, 1.0, 1.0), "accelerate": fast, "torch.compile": slow},
        "training": {"eager": Time(2.0, 1.0, 1.0, 1.0), "accelerate": noisy},
    }
    found = bench.Comparison("", times, {"eager": 100, "accelerate": 40}, {}, {}, True, {})
    assert found.advice == (
        "Use for inference accelerate (2.00x eager), for training eager (nothing beats it). "
        "accelerate keeps 0.40x of eager's bytes for backward."
    )


def test_python_m(folder):
    command = [sys.executable, "-m", "zeroblock", "info"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0 and result.stdout.strip() == zb.info()
