"""The page, in a headless Chromium: what its scripts make of it, and that something is drawn where it belongs."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import eager

from ..support import HANG

pytestmark = [pytest.mark.slow, pytest.mark.one_worker]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def run(page, *options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", *options, page]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stderr
    return result


def dom(path, view=""):
    """(document after its scripts ran, its console)."""
    result = run(f"file://{path}{view}", "--dump-dom", "--enable-logging=stderr", "--v=0")
    return result.stdout, "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)


def rows(document):
    """The table's body as lists of cell texts."""
    body = re.search(r"<tbody>(.*?)</tbody>", document, re.S).group(1)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in re.findall(r"<tr.*?>(.*?)</tr>", body, re.S)]
    return [[html.unescape(cell) for cell in row] for row in cells]


@pytest.fixture(scope="module")
def diagnosis():
    torch.manual_seed(0)
    dead = nn.Sequential(eager.zero_module(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), eager.ReZero(nn.Linear(8, 8)), dead, eager.zero_module(nn.Linear(8, 3)))
    model.add_module("</script><b>", nn.Linear(3, 3))  # a name that would end the page's data
    return zb.doctor(model, (torch.randn(16, 8),), steps=3)


@pytest.fixture(scope="module")
def page(diagnosis, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(diagnosis.to_html(), encoding="utf-8")
    return path


def test_page_is_self_contained(diagnosis, page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", text)
    assert links == [] and "@import" not in text and "fetch(" not in text
    urls = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert urls == {"http://www.w3.org/2000/svg"}  # a namespace, not an address that is loaded
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S).group(1))
    assert [p["name"] for p in data["parameters"]] == [p.name for p in diagnosis.parameters]
    assert data["healthy"] is False and any("</script><b>" in p["name"] for p in data["parameters"])


@needs_chromium
def test_page_renders_without_errors(diagnosis, page):
    document, console = dom(page)
    assert console == ""
    table = rows(document)
    assert [row[0] for row in table] == [p.name for p in diagnosis.parameters]
    for row, p in zip(table, diagnosis.parameters, strict=True):
        assert row[2] == p.kind and row[4] == ("never" if p.proved else str(p.predicted))
        assert row[5] == ("not seen" if p.measured is None else str(p.measured))
    assert len(re.findall(r"<circle ", document)) == len(diagnosis.parameters)
    assert "never move" in document and "parameters are dead or symmetric" in document
    assert "Peebles &amp; Xie 2023" in document


@needs_chromium
def test_table_sorts_and_filters(diagnosis, page):
    document, console = dom(page, "#sort=5")
    assert console == "" and 'aria-sort="ascending"' in document
    measured = [row[5] for row in rows(document)]
    numbers = [int(m) for m in measured if m != "not seen"]
    assert numbers == sorted(numbers) and len(set(numbers)) > 1
    assert measured[len(numbers) :] == ["not seen"] * (len(measured) - len(numbers))
    unsorted = [row[5] for row in rows(dom(page)[0])]
    assert unsorted != measured and sorted(unsorted) == sorted(measured)

    document, _ = dom(page, "#filter=2.0.W")
    assert [row[0] for row in rows(document)] == ["2.0.weight"]
    assert f"1 of {len(diagnosis.parameters)}" in document
    document, _ = dom(page, "#kind=dead")
    assert {row[0] for row in rows(document)} == {p.name for p in diagnosis.of_kind("dead")}


@needs_chromium
def test_broken_page_is_noticed(page, tmp_path):
    """The checks above can fail: a script error reaches the console, and the table stays empty."""
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text(encoding="utf-8").replace("timeline();", "timelime();", 1), encoding="utf-8")
    document, console = dom(broken)
    assert "timelime is not defined" in console
    assert rows(document) == []


@needs_chromium
def test_screenshot(page, tmp_path):
    imread = pytest.importorskip("matplotlib.image", reason="needs matplotlib to read the picture").imread
    picture = tmp_path / "page.png"
    run(f"file://{page}", f"--screenshot={picture}", "--window-size=1200,1400", "--hide-scrollbars")
    pixels = torch.from_numpy((imread(picture)[..., :3] * 255).round()).int()
    assert pixels.shape == (1400, 1200, 3)
    background = pixels[2, 2]

    def ink(top, bottom):
        return (pixels[top:bottom] != background).any(-1).float().mean().item()

    assert ink(0, 120) > 0.005 and ink(120, 400) > 0.01 and ink(400, 1000) > 0.01
    # Red dots of the dead parameters in the timeline, green ones of the tails and gates.
    red = (pixels - torch.tensor([0xC0, 0x34, 0x2B])).abs().sum(-1) < 12
    green = (pixels - torch.tensor([0x1A, 0x7F, 0x4B])).abs().sum(-1) < 12
    assert red.sum() > 150 and green.sum() > 100
