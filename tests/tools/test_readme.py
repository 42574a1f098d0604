"""The first README's examples run and print what it says, and its numbers are the stored ones."""

import re
import subprocess
import sys

import pytest

from ..support import ROOT

README = (ROOT / "README.md").read_text()
# (code, what it prints in part, or nothing)
EXAMPLES = re.findall(r"```python\n((?:(?!```).)*)```(?:\n\n```text\n(.*?)```)?", README, re.S)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3 and sum(bool(text) for _, text in EXAMPLES) >= 2


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_prints_what_it_says(number, tmp_path):
    code, text = EXAMPLES[number]
    if "diffusers" in code:
        pytest.importorskip("diffusers")
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    places = [printed.index(line.rstrip()) for line in text.splitlines() if line]
    assert places == sorted(places)


def test_its_numbers_are_the_stored_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from zbench import front

    table = README.split("<!-- python benchmarks/plot.py --front -->\n")[1].split("\n\n")[0]
    assert table == front.table()
    assert front.PICTURE.exists()


@pytest.mark.parametrize(
    "row, models",
    (
        ("a U-Net on a CPU", ("unet", "adm_unet", "unet2d")),
        ("a transformer on a CPU", ("dit", "sd3", "flux", "dit_s2", "dit_s2_diffusers")),
    ),
)
def test_what_to_expect_is_the_range_of_the_stored_results(monkeypatch, row, models):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from zbench import front, store

    rows = [r for r in store.read_all(front.MACHINE, ("models", "whole", "saved")) if r["op"] in models]
    times = [r["ratio"] for r in rows if r["unit"] == "us" and (r["threads"], r["allocator"]) == ("2", "pinned")]
    saved = [r["zeroblock"] / r["eager"] for r in rows if r["unit"] == "bytes"]
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {row} |"))
    said = [float(number) for number in re.findall(r"\d\.\d\d", line)]
    assert said == pytest.approx([min(times), max(times), min(saved), max(saved)], abs=0.006)


def test_what_tiny_tensors_cost_is_the_stored_result(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from zbench import front, store

    rows = store.read_all(front.MACHINE, ("overhead",))
    for words, ids in (
        ("a DiT block of 4 tokens", ("dit_block", "4x")),
        ("a ResBlock of 4x4 pixels", ("resblock", "x4x4")),
    ):
        lost = [1 / r["ratio"] for r in rows if r["op"] == ids[0] and ids[1] in r["shape"]]
        (said,) = re.findall(rf"{words}[a-z ]* (\d\.\d) times", README)
        assert float(said) == pytest.approx(max(lost), abs=0.05), words


def test_it_is_short():
    assert len(README.splitlines()) <= 125
