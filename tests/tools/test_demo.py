"""The demo runs end to end, writes its picture, and its exit status tells whether the checks held."""

import importlib.util
import os
import subprocess
import sys
import types

import pytest

from zeroblock import cli
from zeroblock import nn as fused
from zeroblock.tools import demo

from ..support import HANG

MISSING = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
needs_extra = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install zeroblock[demo]")


@needs_extra
def test_demo_quick(tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, "-m", "zeroblock", "demo", "--quick", "--out", str(picture)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # spinning threads crawl when others share the cores
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all checks passed" in result.stdout and "FAILED" not in result.stdout
    for model in ("U-Net", "DiT"):
        assert f"{model}: loss curves agree" in result.stdout
    assert "exactly zero in steps 1, 2: blocks.0.attn blocks.0.mlp" in result.stdout

    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.05


class _SlightlyWrong(fused.DiTBlock):
    def forward(self, x, c):
        return x + 1.001 * (super().forward(x, c) - x)


@needs_extra
def test_demo_exit_status_when_a_block_is_wrong(tmp_path, monkeypatch, capsys):
    wrong = types.SimpleNamespace(ResBlock=fused.ResBlock, DiTBlock=_SlightlyWrong, FinalLayer=fused.FinalLayer)
    monkeypatch.setattr(demo, "fused", wrong)
    monkeypatch.setattr(demo, "CASES", [case for case in demo.CASES if case.name == "DiT"])
    assert cli.main(["demo", "--steps", "12", "--out", str(tmp_path / "picture.png")]) == 1
    printed = capsys.readouterr().out
    assert "FAILED DiT: loss curves agree" in printed
    assert "FAILED DiT: the weights give the same output" in printed


@pytest.mark.parametrize("module", ["matplotlib", "sklearn.datasets"])
def test_demo_names_the_extra_when_a_package_is_missing(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo", "--quick"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("zeroblock demo: ") and "pip install zeroblock[demo]" in printed


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_demo_refuses_bad_steps(steps, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--steps", steps])
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err
