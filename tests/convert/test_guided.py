"""The U-Net blocks of guided-diffusion, improved-diffusion, GLIDE, LDM and sgm, accelerated."""

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import assert_error_budget, counters, eager, reset_counters

from ..twins import assert_gradients
from . import oracles, oracles_glide
from .cases import Case, assert_drop_in, build, randomize_, run

EMB = (2, 16)


def resblock(kind=eager.ResBlock, dropout=0.0, dims=2, **options):
    checkpoint = options.get("use_checkpoint", False)
    return Case(
        lambda: kind(64, 16, dropout, dims=dims, **options),
        lambda: (torch.randn(2, 64, *[4] * dims), torch.randn(EMB)),
        {"ResBlock": 1 + checkpoint},
        1,
        skipped_inference={"ResBlock": 1},
    )


def attention(order):
    return Case(
        lambda: oracles.AttentionBlock(64, 4, order),
        lambda: (torch.randn(2, 64, 3, 4),),
        {"AttentionBlock": 2},
        1,
        skipped_inference={"AttentionBlock": 1},
    )


def encoded(block):
    """Attention to an encoder's tokens too."""
    return Case(
        block,
        lambda: (torch.randn(2, 64, 3, 4), torch.randn(2, 24, 5)),
        {"AttentionBlock": 1},
        1,
    )


def consistency(attention, **options):
    return Case(
        lambda: oracles_glide.ConsistencyAttentionBlock(64, 4, attention(), **options),
        lambda: (torch.randn(2, 64, *(3, 4, 2)[: options.get("dims", 2)]),),
        {"AttentionBlock": 1},
        1,
    )


CASES = {
    "add": resblock(),
    "film": resblock(use_scale_shift_norm=True),
    "1x1": resblock(out_channels=32),
    "3x3": resblock(out_channels=32, use_conv=True),
    "up": resblock(up=True, use_scale_shift_norm=True),
    "down": resblock(down=True),
    "dropout": resblock(dropout=0.3, use_scale_shift_norm=True),
    "1-D": resblock(dims=1),
    "3-D": resblock(dims=3, up=True),
    "checkpoint": resblock(use_checkpoint=True),
    "improved": resblock(oracles.ImprovedResBlock, use_scale_shift_norm=True),
    "glide": resblock(oracles_glide.GlideResBlock),
    "glide-film": resblock(oracles_glide.GlideResBlock, use_scale_shift_norm=True),
    "glide-up": resblock(oracles_glide.GlideResBlock, use_scale_shift_norm=True, up=True),
    "glide-1x1, dropout": resblock(oracles_glide.GlideResBlock, 0.3, out_channels=32),
    "sgm-kernel": resblock(oracles.SgmResBlock, kernel_size=5),
    "sgm-without-embedding": resblock(oracles.SgmResBlock, skip_t_emb=True),
    "sgm-time-stack": Case(
        lambda: oracles.SgmResBlock(64, 16, dims=3, kernel_size=[3, 1, 1], exchange_temb_dims=True),
        lambda: (torch.randn(2, 64, 3, 4, 4), torch.randn(2, 3, 16)),
        {"ResBlock": 1},
        1,
    ),
    "sgm-video": Case(
        lambda: oracles.VideoResBlock(64, 16, out_channels=32),
        lambda: (torch.randn(6, 64, 4, 4), torch.randn(6, 16), 3),
        {"ResBlock": 2},
        2,
    ),
    "attention-legacy": attention("legacy"),
    "attention-new": attention("new"),
    "attention-improved": attention("improved"),
    "attention-glide": Case(
        lambda: oracles_glide.GlideAttentionBlock(64, 4), lambda: (torch.randn(2, 64, 3, 4),), {"AttentionBlock": 1}, 1
    ),
    "attention-glide, encoder": encoded(lambda: oracles_glide.GlideAttentionBlock(64, 4, 24)),
    "attention-consistency": consistency(lambda: oracles.QKVAttentionLegacy(4)),
    "attention-consistency, 3-D": consistency(lambda: oracles_glide.EncodedAttentionNew(4), dims=3),
    "attention-consistency, encoder": encoded(
        lambda: oracles_glide.ConsistencyAttentionBlock(64, 4, oracles_glide.EncodedAttentionNew(4), 24)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_drop_in(name):
    assert_drop_in(CASES[name])


class Net(nn.Module):
    """ResBlock, attention and a zero output convolution, x and the result in fp32 around an fp16 trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.ModuleList([eager.ResBlock(64, 16, 0.0, use_scale_shift_norm=True), attention("new").make()])
        self.out = eager.zero_module(nn.Conv2d(64, 3, 3, padding=1))

    def forward(self, x, emb):
        res, attend = self.trunk
        h = x.to(res.in_layers[2].weight.dtype)
        return self.out(attend(res(h, emb)).to(x.dtype))


@pytest.mark.parametrize("randomize", [False, True])
def test_converted_to_fp16(randomize):
    """use_fp16: half convolutions, float32 norms and linears; the gradients as good as eager's."""
    case = Case(lambda: Net(), lambda: (torch.randn(2, 64, 4, 4), torch.randn(EMB)), {}, 3)
    ours, theirs, _ = build(case, randomize)
    half = [copy.deepcopy(m) for m in (ours, theirs)]
    for m in half:
        oracles.convert_module_to_f16(m.trunk)
    inputs = tuple(t.requires_grad_() for t in case.inputs())
    exact_ys, exact = run(copy.deepcopy(half[1]).double(), tuple(t.detach().double().requires_grad_() for t in inputs))
    reset_counters()
    ys, got = run(half[0], inputs)
    assert counters()["ResBlock"] == ((1, 0) if randomize else (0, 1))
    expected_ys, expected = run(half[1], inputs)
    assert_error_budget(ys[0].detach(), expected_ys[0].detach(), exact_ys[0].detach(), "y")
    assert_gradients((got, expected, exact))
    zeros = [n for n, g in expected.items() if not g.any()]
    assert bool(zeros) != randomize and not any(got[n].any() for n in zeros)


def test_output_convolution_is_found_and_skipped():
    net = Net()
    report = zb.accelerate(net)
    assert [b.path for b in report.branches if b.family == "ZeroLayer"] == ["out"]
    reset_counters()
    with torch.no_grad():
        net(torch.randn(2, 64, 4, 4), torch.randn(EMB))
    assert counters()["ZeroLayer"] == (0, 1)
    randomize_(net)
    reset_counters()
    net(torch.randn(2, 64, 4, 4), torch.randn(EMB))
    assert counters()["ZeroLayer"] == (1, 0)


@pytest.mark.parametrize("phase", ["zero", "dense"])
def test_flash_attention_stays_the_users_kernel(phase):
    """consistency_models' default: it is called as a whole, and never on the CPU's float32 of the proof."""
    torch.manual_seed(0)
    theirs = oracles_glide.ConsistencyAttentionBlock(64, 4).bfloat16()
    if phase == "dense":
        randomize_(theirs)
    ours = copy.deepcopy(theirs)
    report = zb.accelerate(ours, strict=True)
    assert [(b.path, b.family) for b in report.branches] == [("proj_out", "AttentionBlock")]
    x = torch.randn(2, 64, 3, 4).bfloat16()
    exact = copy.deepcopy(theirs).double()
    exact.attention.forward = lambda qkv: oracles_glide.attention_of(4, qkv)
    reset_counters()
    with torch.no_grad():
        assert_error_budget(ours(x), theirs(x), exact(x.double()))
    assert counters()["AttentionBlock"] == ((0, 1) if phase == "zero" else (1, 0))


def test_an_activation_that_glides_norm_holds_is_looked_at_at_every_call():
    torch.manual_seed(0)
    theirs = randomize_(oracles_glide.GlideResBlock(64, 16))
    ours = copy.deepcopy(theirs)
    zb.accelerate(ours)
    plain = zb.accelerate(guided := eager.ResBlock(64, 16, 0.0)).blocks
    x, emb = torch.randn(2, 64, 4, 4), torch.randn(EMB)
    for block in (ours, theirs):
        block.in_layers[0].swish = 0.0  # neither norm nor Identity activates
    assert torch.equal(ours(x, emb), theirs(x, emb))
    twin = copy.deepcopy(randomize_(guided))
    zb.restore(twin)
    for block in (guided, twin):
        block.in_layers[1] = nn.Identity()  # stands for SiLU behind a norm of GLIDE's alone
    assert plain == 1 and torch.equal(guided(x, emb), twin(x, emb))
