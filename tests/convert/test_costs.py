"""The table of what gated blocks cost (costs.py): every family is in it, and none costs more than it says."""

from __future__ import annotations

import pytest

from . import costs

pytest.importorskip("diffusers.models.transformers", reason="diffusers is not installed")

# What keeps more than 0.65 of its own: by what its attention makes and keeps, or by its example.
MORE = {
    **dict.fromkeys(("HunyuanVideo15TransformerBlock", "LuminaNextDiTBlock"), "a mask of all pairs of tokens"),
    **dict.fromkeys(
        ("CogView3PlusTransformerBlock", "CogView4TransformerBlock", "GlmImageTransformerBlock"), "layer norms"
    ),
    **dict.fromkeys(("CogVideoXBlock", "ConsisIDBlock"), "layer norms of q and k, and both streams once more as one"),
    "Cosmos3VLTextMoTDecoderLayer": "three tokens in its first stream, after which it goes",
    "ErnieImageSharedAdaLNBlock": "q, k and v, and tokens in another order",
    "PixArtBlock": "a feed-forward twice as wide as the tokens",
    **dict.fromkeys(("LDMTransformerBlock", "LTXBasicTransformerBlock"), "what its attention keeps"),
    **dict.fromkeys(("HunYuanDiTBlock", "HunyuanDiTBlock"), "the norm of both streams side by side, and attention's"),
    **dict.fromkeys(("IndividualTokenRefinerBlock", "MusubiTokenRefinerBlock"), "q, k and v in its own forward"),
    "I2VGenXLTransformerTemporalEncoder": "one norm alone",
    "MDTBlock": "four tokens, of which nothing is made again",
}
# Blocks whose attention and feed-forward run by their layers; elsewhere what those keep for themselves outweighs.
BY_LAYERS = ("DiTBlock", "F5DiTBlock", "AdaLNSelfAttn", "SD3SingleTransformerBlock")


def test_every_family_is_in_the_table():
    assert list(costs.table()) == sorted(costs.families()), "renew it: python -m tests.convert.costs"


def test_what_the_table_says():
    lines = costs.table()
    for name, line in lines.items():
        # A norm before each branch and a gate after it are one op, and one more at the end of each stream.
        assert line["saved"] and (float(line["saved"]) <= 0.65 or name in MORE), name
        assert float(line["saved"]) <= 0.9 and int(line["eager norms"]) == 0, name
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
