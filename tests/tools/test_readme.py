"""The first README's examples run and print what it says, its numbers are the stored ones, its links lead somewhere."""

import re
import subprocess
import sys

import pytest

from ..support import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# (code, what it prints in part, or nothing)
EXAMPLES = re.findall(r"```python\n((?:(?!```).)*)```(?:\n\n```text\n(.*?)```)?", README, re.S)


def test_there_are_examples():
    assert len(EXAMPLES) >= 4 and sum(bool(text) for _, text in EXAMPLES) >= 2


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target
