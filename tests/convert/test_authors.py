"""Blocks as the authors of Wan, HunyuanVideo, HunyuanDiT, LTX-Video, Lumina 2, Z-Image and LDM have them."""

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.convert import Reason
from zeroblock.testing import counters, reset_counters

from . import oracles_authors as authors
from . import oracles_compvis as compvis
from . import oracles_hunyuan as hunyuan
from . import oracles_lumina as lumina
from .cases import Case, assert_drop_in, randomize_
from .oracles_gated import HEADS, D
from .test_described import zero_rows

T, TEXT = 4, 3
WAN, WAN22, DOUBLE, SINGLE = "WanAttentionBlock", "Wan22AttentionBlock", "MMDoubleStreamBlock", "MMSingleStreamBlock"


def case(kind, *given, x=(2, T, D), branches=3, change=lambda block: block, skipped=None, **options):
    """`given`: sizes of random tensors, and what is passed as it is."""

    def inputs():
        return torch.randn(x), *(torch.randn(t) if isinstance(t, Size) else copy.deepcopy(t) for t in given)

    return Case(lambda: change(kind(**options)), inputs, skipped or {}, branches, equal=False)


class Size(tuple):
    pass


def of(*sizes):
    return Size(sizes)


def polar(tokens=T):
    return torch.polar(torch.ones(2, tokens, 4), torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(4)))


TW = 6
E, E22, C = of(2, 6, D), of(2, TW, 6, D), of(2, D)
CROSS = (torch.tensor([TW, TW]), None, None, of(2, TEXT, D), None)
ENDS = torch.tensor([0, 6, 7, 13, 14], dtype=torch.int32)
ANGLES = torch.randn(T, D // HEADS, generator=torch.Generator().manual_seed(5))
ANGLES = (ANGLES.cos(), ANGLES.sin())
LENGTHS = (ENDS, ENDS, 7, 7, ANGLES)
TRAINED = (None, torch.tensor([6, 7]), *LENGTHS)
MASK = torch.tensor([[True, True, True, False], [True] * 4])
DIT = (of(2, TEXT, D), None, 1, 1, ANGLES)
LTX = (None, None, of(2, TEXT, 12), None, of(2, 1, 6 * D))


def zero_table(block):
    with torch.no_grad():
        block.modulation[0, 2] = 0
    return block


CASES = {
    "wan": case(authors.WanAttentionBlock, E, *CROSS, x=(2, TW, D)),
    "wan, no norm before the text": case(authors.WanAttentionBlock, E, *CROSS, x=(2, TW, D), cross_attn_norm=False),
    "wan 2.2": case(authors.Wan22AttentionBlock, E22, *CROSS, x=(2, TW, D)),
    "wan, a trainer's": case(authors.TrainedWanBlock, E, *CROSS, x=(2, TW, D)),
    "wan 2.2, a trainer's": case(authors.TrainedWanBlock, E22, *CROSS, x=(2, TW, D), model_version="2.2"),
    "wan's head": case(authors.Head, C, branches=0),
    "wan 2.2's head": case(authors.Wan22Head, of(2, T, D), branches=0),
    "hunyuan video": case(hunyuan.MMDoubleStreamBlock, of(2, TEXT, D), C, *LENGTHS),
    "hunyuan video, zero": case(
        hunyuan.MMDoubleStreamBlock,
        of(2, TEXT, D),
        C,
        *LENGTHS,
        change=lambda block: zero_rows("txt_mod.linear", 5)(zero_rows("img_mod.linear", 5)(block)),
        skipped={DOUBLE: 2},
    ),
    "hunyuan video, a trainer's": case(hunyuan.TrainedDouble, of(2, TEXT, D), C, *TRAINED),
    "hunyuan video 1.5": case(hunyuan.Double15, of(2, TEXT, D), C, ANGLES, 0.5),
    "one stream": case(hunyuan.MMSingleStreamBlock, C, TEXT, *LENGTHS, x=(2, T + TEXT, D), branches=2),
    "one stream, zero": case(
        hunyuan.MMSingleStreamBlock,
        C,
        TEXT,
        *LENGTHS,
        x=(2, T + TEXT, D),
        branches=2,
        change=zero_rows("modulation.linear", 2, of=3),
        skipped={SINGLE: 1},
    ),
    "one stream, a trainer's": case(hunyuan.TrainedSingle, C, TEXT, *TRAINED, x=(2, T + TEXT, D), branches=2),
    "refiner": case(hunyuan.IndividualTokenRefinerBlock, C, MASK[:, None, None], branches=2),
    "refiner of 1.5": case(hunyuan.Refiner15, C, 0.5, branches=2),
    "hunyuan dit": case(hunyuan.HunYuanDiTBlock, C, *DIT),
    "hunyuan dit, skip": case(hunyuan.HunYuanDiTBlock, C, *DIT, of(2, T, D), skip=True),
    "ltx": case(authors.LTXBlock, *LTX),
    "ltx, of each token": case(authors.LTXBlock, *LTX[:-1], of(2, T, 6 * D)),
    "latent diffusion": case(authors.LDMBlock, of(2, TEXT, 12)),
    "latent diffusion, context first": case(authors.LDMBlock, of(2, TEXT, 12), disable_self_attn=True),
    "lumina": case(lumina.JointTransformerBlock, MASK, polar(), C, branches=2),
    "lumina, refiner": case(lumina.JointTransformerBlock, MASK, polar(), branches=2, modulation=False),
    "z-image": case(lumina.ZImageTransformerBlock, MASK, polar(), C, branches=2),
    "z-image, a trainer's": case(lumina.TrainedZImageBlock, polar(), C, None, branches=2),
    "pixels": case(compvis.AttnBlock, x=(2, 16, 3, 4), branches=1),
    "pixels, all in one": case(compvis.TogetherAttnBlock, x=(2, 16, 3, 4), branches=1),
    "pixels, zero": case(
        compvis.AttnBlock,
        x=(2, 16, 3, 4),
        branches=1,
        change=lambda block: (nn.init.zeros_(block.proj_out.weight), block)[1],
        skipped={"AttnBlock": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_drop_in(name):
    assert_drop_in(CASES[name])


# ---- dtypes of Wan ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "wan 2.2", "wan, a trainer's", "wan 2.2, a trainer's"])
def test_wan_under_autocast(name):
    """The authors' stream is float32 after the first gate, the trainer's stays as it was; rows are always float32."""
    plain = randomize_(CASES[name].make())
    ours = copy.deepcopy(plain)
    zb.accelerate(ours, strict=True)
    for dtype in (torch.float32, torch.bfloat16):
        x, e, *rest = CASES[name].inputs()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = plain(x.to(dtype), e, *rest)
            reset_counters()
            got = ours(x.to(dtype), e, *rest)
        assert got.dtype == expected.dtype == (dtype if "trainer" in name else torch.float32)
        torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2)
        # What is float32 later is not when the first block is given it: the original's.
        ran = dtype is torch.float32 or "trainer" in name
        assert any(family in counters() for family in (WAN, WAN22)) is ran


# ---- attention that does not run on a CPU ----------------------------------------------------------------------------


@pytest.fixture
def without_gpu(monkeypatch):
    def attention(q, k=None, v=None, mode="flash", attn_mask=None, batch_size=1, **lengths):
        raise AssertionError("on a GPU only")

    monkeypatch.setattr(authors.WanSelfAttention, "on_gpu", True)
    monkeypatch.setattr(hunyuan, "attention", attention)


@pytest.mark.parametrize("name", ["wan", "hunyuan video", "one stream", "refiner"])
def test_it_is_proved_with_a_stand_in(name, without_gpu):
    block = CASES[name].make()
    assert zb.accelerate(block, strict=True).fused == 1
    with pytest.raises(AssertionError, match="on a GPU only|^$"):
        block(*CASES[name].inputs())


def test_another_argument_of_attention_shows():
    """A stand-in counts what it is given, under each name."""

    class Shifted(authors.WanAttentionBlock):
        def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
            return super().forward(x, e, seq_lens + 1, grid_sizes, freqs, context, context_lens)

    (row,) = zb.coverage(Shifted()).left_alone
    assert row.kind is Reason.FORK

    class Louder(hunyuan.MMDoubleStreamBlock):
        def forward(self, img, txt, vec, cu_seqlens_q=None, cu_seqlens_kv=None, *rest):
            return super().forward(img, txt, vec, cu_seqlens_q, cu_seqlens_kv + 1, *rest)

    (row,) = zb.coverage(Louder()).left_alone
    assert row.kind is not Reason.UNTRIED


# ---- what is no block of theirs --------------------------------------------------------------------------------------


def test_reasons_tell_what_can_be_done():
    for block, kind, said in (
        (authors.LTXBlock("single_scale"), Reason.VARIANT, "adaptive_norm is single_scale"),
        (authors.TrainedWanBlock("3.0"), Reason.VARIANT, "model_version is 3.0"),
    ):
        (row,) = zb.coverage(block).left_alone
        assert row.kind is kind and said in row.reason


def test_arguments_in_another_order_are_another_block():
    """A block whose calls would all go to the original is not said to be fused."""

    class MMDoubleStreamBlock(hunyuan.MMDoubleStreamBlock):
        def forward(self, img, txt, vec, freqs_cis=None, cu_seqlens_q=None, *rest):
            return super().forward(img, txt, vec, cu_seqlens_q, *rest, freqs_cis)

    (row,) = zb.coverage(MMDoubleStreamBlock()).left_alone
    assert row.kind in (Reason.NAMESAKE, Reason.UNTRIED)


def test_a_sequence_on_several_devices_is_the_originals():
    plain = randomize_(hunyuan.MMDoubleStreamBlock())
    ours = copy.deepcopy(plain)
    zb.accelerate(ours, strict=True)
    plain.hybrid_seq_parallel_attn = ours.hybrid_seq_parallel_attn = object()
    args = CASES["hunyuan video"].inputs()
    reset_counters()
    for a, b in zip(ours(*args), plain(*args), strict=True):
        assert torch.equal(a, b)
    assert DOUBLE not in counters()


def test_a_skipped_layer_of_ltx_is_the_originals():
    plain = randomize_(authors.LTXBlock())
    ours = copy.deepcopy(plain)
    zb.accelerate(ours, strict=True)
    args, mask = CASES["ltx"].inputs(), torch.tensor([1.0, 0.0])
    assert torch.equal(ours(*args, skip_layer_mask=mask), plain(*args, skip_layer_mask=mask))
    torch.testing.assert_close(ours(*args), plain(*args), rtol=1e-4, atol=1e-4)
