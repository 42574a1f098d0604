"""The pages: their links lead somewhere, every public name has its place, every quoted message is one of ours, and the
site is built without a warning where the generator is installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zeroblock as zb
from zeroblock import convert

from ..support import ROOT

FOLDERS = ("", "docs", "docs/api", "benchmarks", "csrc", "examples", "kernels", "tests", "zeroblock")
PAGES = sorted({p for f in FOLDERS for p in (ROOT / f).glob("*.md")} | {*ROOT.glob("[a-z]*/**/README.md")})
PAGES = [p for p in PAGES if "build" not in p.relative_to(ROOT).parts]
IDS = [str(p.relative_to(ROOT)) for p in PAGES]


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.is_file(), target
        assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_no_page_names_a_machine(page):
    assert not re.search(r"/(?:home|tmp|root|Users|work|opt|mnt)/", page.read_text())


def test_every_page_is_in_the_menu():
    conf = (ROOT / "docs/conf.py").read_text()
    missing = [p for p in IDS if p != "README.md" and f'"{p.removesuffix(".md")}"' not in conf]
    assert missing == []


def test_every_public_name_has_its_place():
    text = "\n".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md"))
    places = re.findall(r"^(?:\.\. currentmodule:: (\S+)|\.\. auto(?:function|class):: (\S+))$", text, re.M)
    found, module = [], ""
    for new, name in places:
        module = new or module
        found += [f"{module}.{name}"] * bool(name)
    wanted = {f"zeroblock.{name}" for name in zb.__all__ if name != "nn"}
    wanted |= {f"zeroblock.nn.{name}" for name in zb.nn.__all__}
    wanted |= {f"zeroblock.convert.{name}" for name in convert.__all__ if not hasattr(zb, name)}
    wanted |= {"zeroblock.doctor.Diagnosis", "zeroblock.doctor.ParameterReport"}  # what zb.doctor returns
    assert sorted(found) == sorted(wanted)


def test_every_quoted_message_is_one_of_ours():
    files = [*(ROOT / "zeroblock").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    text = re.sub(r'"\n\s*f?"', "", "\n".join(p.read_text() for p in files)).replace('\\"', '"')
    text = re.sub(r"\{[^{}]*\}", "...", text)
    tables = (ROOT / "docs/troubleshooting.md").read_text().split("| message | what to do |\n")[1:]
    quoted = [m for table in tables for m in re.findall(r"^\| `([^`]+)` \|", table.split("\n\n")[0], re.M)]
    assert len(quoted) >= 10
    for message in quoted:
        assert all(part.strip() in text for part in re.split(r"\.\.\.|^\d+ ", message)), message


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for name in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-d", str(tmp_path / "trees"), "-c", "docs"]
    command = [sys.executable, "-m", "sphinx", *options, ".", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "README.html" in (tmp_path / "site/index.html").read_text()
    functions = (tmp_path / "site/docs/api/functions.html").read_text()
    assert "residual_norm_modulate" in functions and "The picture" not in functions
