"""The table of what gated blocks cost (costs.py): every family is in it, and none costs more than it says."""

from __future__ import annotations

import pytest

from . import costs

pytest.importorskip("diffusers.models.transformers", reason="diffusers is not installed")

# Blocks whose attention and feed-forward run by their layers; elsewhere what those keep for themselves outweighs.
BY_LAYERS = ("DiTBlock", "F5DiTBlock", "AdaLNSelfAttn", "SD3SingleTransformerBlock")
# Blocks without gates: what is merely added is kept as well.
UNGATED = ("HunYuanDiTBlock", "HunyuanDiTBlock", "LDMTransformerBlock")


def test_every_family_is_in_the_table():
    assert list(costs.table()) == sorted(costs.families()), "renew it: python -m tests.convert.costs"


def test_what_the_table_says():
    lines = costs.table()
    for name, line in lines.items():
        # A norm before each branch and a gate after it are one op, and one more at the end of each stream.
        assert float(line["saved"]) <= 1.0 or name in ("ErnieImageSharedAdaLNBlock", *UNGATED), name
        assert int(line["beside"]) < int(line["eager"]), name
        assert line["in a row"] == "" or int(line["in a row"]) <= int(line["inference"]), name
    for name in BY_LAYERS:
        assert float(lines[name]["saved"]) <= 0.65, name
    for name in ("DiTBlock", "F5DiTBlock", "AdaLNSelfAttn"):
        assert int(lines[name]["in a row"]) == 2, name
    for name in ("FluxTransformerBlock", "QwenImageTransformerBlock"):
        assert int(lines[name]["in a row"]) == 2 * int(lines[name]["results"]), name


@pytest.mark.parametrize(
    "name", ["DiTBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock", "WanTransformerBlock"]
)
def test_counted_again(name):
    assert costs.line(name) == costs.table()[name], "renew it: python -m tests.convert.costs"
