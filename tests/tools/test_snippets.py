"""Every block of Python in the pages runs, and what stands in blocks of shell is there: the commands of zeroblock, the
scripts, the modules, the targets of make. (The first README's have a test of their own, with what they print.)"""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock import cli
from zeroblock.convert import known
from zeroblock.testing import eager

from ..support import ROOT
from .test_docs import IDS, PAGES


class Attention(eager.Attention):
    def forward(self, h, mask=None):
        return super().forward(h if mask is None else h * mask)


class MyBlock(nn.Module):
    """The block that the pages describe."""

    def __init__(self, dim=16):
        super().__init__()
        self.dim = dim
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(dim, num_heads=2), nn.Linear(dim, dim)
        self.adaLN = nn.Linear(dim, 6 * dim)

    def forward(self, x, c, mask=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, mask=mask)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


WITH_PYTHON = [p for p in PAGES if blocks(p, "python") and p != ROOT / "README.md"]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_runs(page, capsys):
    try:
        for code in blocks(page, "python"):
            model = nn.ModuleList([eager.ResBlock(32, 16, 0.0), MyBlock()])
            names = {"zb": zb, "torch": torch, "model": model}
            exec(compile(code, str(page), "exec"), names)
            if "register_family" in code:  # the description is right: the block is one of those that are fused
                assert zb.accelerate(model).fused == 2
    finally:
        known().pop("MyBlock", None)
    assert "fused" in capsys.readouterr().out


def commands():
    lines = [
        (name, line)
        for name, page in zip(IDS, PAGES, strict=True)
        for b in blocks(page, "sh")
        for line in b.split("\n")
    ]
    words = ((name, shlex.split(line, comments=True)) for name, line in lines)
    return [(name, [w for w in found if not re.match(r"[A-Z_]+=", w)]) for name, found in words if found]


@pytest.mark.parametrize("page, words", commands(), ids=lambda x: x if isinstance(x, str) else "-".join(x)[:40])
def test_a_command_is_there(page, words):
    if words[:3] == ["python", "-m", "zeroblock"] or words[0] == "zeroblock":
        cli.parser().parse_args(words[words.index("zeroblock") + 1 :])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), page
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), page
    else:
        scripts = [w for w in words if w.endswith(".py") or w.startswith("tests/")]
        assert words[0] in ("pip", "python", "pytest", "torchrun") and all((ROOT / s).exists() for s in scripts), page
