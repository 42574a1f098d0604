"""Every example runs to its end with --quick; those of torchrun on two ranks as well. Their own checks are asserts."""

import runpy
import subprocess
import sys

import pytest

from ..support import ROOT

EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if not path.name.startswith("_"))
NEED = {"lora_peft": "peft", "video_dit": "PIL", **dict.fromkeys(("finetune_unet", "serve", "decode_vae"), "diffusers")}


def needs(name):
    if name in NEED:
        pytest.importorskip(NEED[name])
        if NEED[name] != "PIL":
            pytest.importorskip("diffusers")


@pytest.fixture
def here(monkeypatch):
    """examples/ on the path, as when a script of it is started."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield
    sys.modules.pop("_example", None)


def test_each_has_a_title_that_its_readme_lists():
    readme = (ROOT / "examples/README.md").read_text()
    assert len(EXAMPLES) >= 8
    for path in EXAMPLES:
        assert f"[{path.name}]({path.name})" in readme, path.name
        text = path.read_text()
        assert text.startswith('"""') and "progress.close()" in text and "options(__doc__" in text, path.name


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem != "train_distributed"], ids=lambda p: p.stem)
@pytest.mark.slow
def test_runs(here, monkeypatch, capsys, tmp_path, path):
    needs(path.stem)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--quick"])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("engine", ("ddp", "fsdp2"))
@pytest.mark.slow
def test_runs_on_two_ranks(engine, tmp_path):
    path = ROOT / "examples/train_distributed.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    done = subprocess.run(
        [*command, "--quick", "--engine", engine], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"{engine}, 2 ranks: last loss" in done.stdout
