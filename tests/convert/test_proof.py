"""The proof of accelerate(): forks of every family's block that differ in one respect alone are left alone; arguments
that were not proved go to the original."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeroblock as zb
from zeroblock.convert import Reason
from zeroblock.convert.families.whole_skip import InferenceSkip
from zeroblock.convert.family import FAMILIES
from zeroblock.testing import eager

from . import oracles, oracles_edm, oracles_tokens
from .cases import randomize_

# ---- a block of every family ----------------------------------------------------------------------------------------


def diffusers_block(module, kind, *args, **options):
    def make():
        package = pytest.importorskip(f"diffusers.models.{module}", reason="diffusers is not installed")
        return getattr(package, kind)(*args, **options)

    return make


def ada_norm_zero(**options):
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(16, 2, 8, norm_type="ada_norm_zero", num_embeds_ada_norm=4, **options)


def dit_model():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.DiTTransformer2DModel(2, 8, 4, num_layers=1, sample_size=4, num_embeds_ada_norm=10)


def timm_nfnet():
    nfnet = pytest.importorskip("timm.models.nfnet", reason="timm is not installed")
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    options = {"conv_layer": layers.ScaledStdConv2d, "act_layer": nn.SiLU}
    return nfnet.NormFreeBlock(16, 16, alpha=0.2, skipinit=True, reg=False, **options)


def torchvision_block():
    resnet = pytest.importorskip("torchvision.models.resnet", reason="torchvision is not installed")
    return resnet.BasicBlock(16, 16)


def lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    net = nn.Sequential(nn.Linear(8, 8))
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), net)[0]


def animate_diff():
    unet = pytest.importorskip("diffusers.models.unets.unet_motion_model", reason="diffusers is not installed")
    return unet.AnimateDiffTransformer3D(2, 8, 16, norm_num_groups=4, cross_attention_dim=None)


BLOCKS = {
    "ResBlock": lambda: eager.ResBlock(32, 16, 0.0, use_scale_shift_norm=True),
    "AttentionBlock": lambda: oracles.GlideAttentionBlock(32, 2, 24),
    "UNetBlock": lambda: oracles_edm.UNetBlock(16, 16, 16, num_heads=2),
    "MPConv": lambda: oracles_edm.MPConv(8, 8, 3, 3),
    "DiTBlock": lambda: eager.DiTBlock(16, 2),
    "FinalLayer": lambda: eager.FinalLayer(16, 1, 4),
    "PixArtBlock": lambda: oracles_tokens.PixArtBlock(24, 2),
    "T2IFinalLayer": lambda: oracles_tokens.T2IFinalLayer(24, 6),
    "FixupBlock": lambda: eager.FixupBasicBlock(8, 8),
    "RZTXEncoderLayer": lambda: oracles_tokens.RZTXEncoderLayer(16, 2, 32, 0.0),
    "ZeroLayer": lambda: eager.zero_module(nn.Linear(8, 8)),
    "ResnetBlock2D": diffusers_block("resnet", "ResnetBlock2D", in_channels=16, groups=4, temb_channels=16),
    "ResnetBlockCondNorm2D": diffusers_block(
        "resnet", "ResnetBlockCondNorm2D", in_channels=16, groups=4, temb_channels=16, time_embedding_norm="ada_group"
    ),
    "BasicTransformerBlock": diffusers_block(
        "attention", "BasicTransformerBlock", 16, 2, 8, norm_type="ada_norm_single", cross_attention_dim=12
    ),
    "DiTTransformer2DModel": dit_model,
    "JointTransformerBlock": diffusers_block("attention", "JointTransformerBlock", 16, 2, 8),
    "FluxTransformerBlock": diffusers_block("transformers.transformer_flux", "FluxTransformerBlock", 16, 2, 8),
    "FluxSingleTransformerBlock": diffusers_block(
        "transformers.transformer_flux", "FluxSingleTransformerBlock", 16, 2, 8
    ),
    "AdaLayerNormZero": diffusers_block("normalization", "AdaLayerNormZero", 16),
    "AdaLayerNormZeroSingle": diffusers_block("normalization", "AdaLayerNormZeroSingle", 16),
    "SD35AdaLayerNormZeroX": diffusers_block("normalization", "SD35AdaLayerNormZeroX", 16),
    "AdaLayerNormContinuous": diffusers_block("normalization", "AdaLayerNormContinuous", 16, 12),
    "TemporalConvLayer": diffusers_block("resnet", "TemporalConvLayer", 16, 16, norm_num_groups=4),
    "AnimateDiffTransformer3D": animate_diff,
    "GatedSelfAttentionDense": diffusers_block("attention", "GatedSelfAttentionDense", 16, 12, 2, 8),
    "ResNetBlock": torchvision_block,
    "NormFreeBlock": timm_nfnet,
    "LoRA": lora,
}


def test_every_family_that_is_proved_is_here():
    assert set(BLOCKS) == {name for name, family in FAMILIES.items() if not issubclass(family, InferenceSkip)}


# ---- forks ----------------------------------------------------------------------------------------------------------


def scaled(result):
    """The same, its first floating tensor a little larger."""
    if isinstance(result, torch.Tensor):
        return result * 1.05 if result.is_floating_point() else result
    if isinstance(result, tuple):
        return (*result[:-1], scaled(result[-1]))
    result["sample"] = scaled(result["sample"])
    return result


def is_large(args):
    """17 of something, twice or four times as many, or the square."""
    return any(n % 17 == 0 for t in args if isinstance(t, torch.Tensor) and t.dim() > 1 for n in t.shape)


FORKS = {
    "in eval mode": lambda self, result, args: result if self.training else scaled(result),
    "in training mode": lambda self, result, args: scaled(result) if self.training else result,
    "beyond a window": lambda self, result, args: scaled(result) if is_large(args) else result,
    "returns more": lambda self, result, args: (result, None),
    "draws in eval mode": lambda self, result, args: (None if self.training else torch.rand(1), result)[1],
}


def forked(block, change):
    """Gives the block a class of the same name whose method returns something else."""
    family = next(f for name, f in FAMILIES.items() if f().knows(block))
    kind, entry = type(block), family().entry(type(block))
    original = getattr(kind, entry)

    def method(self, *args, **kwargs):
        return change(self, original(self, *args, **kwargs), args)

    method.__wrapped__ = original  # the same signature
    members = {entry: method, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    block.__class__ = type(kind.__name__, (kind,), members)
    return block


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_every_family_is_proved(name):
    torch.manual_seed(0)
    report = zb.accelerate(BLOCKS[name]())
    assert report.blocks and not [b for b in report.left_alone if b.path == ""], report


@pytest.mark.parametrize("change", FORKS)
@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("ZeroLayer", "MPConv")])
def test_a_fork_is_left_alone(name, change):
    torch.manual_seed(0)
    block = BLOCKS[name]()
    if name == "DiTTransformer2DModel" and change == "beyond a window":
        pytest.skip("its size is fixed")
    block = forked(block, FORKS[change])
    kind = type(block)
    report = zb.accelerate(block)
    (row,) = [b for b in report.left_alone if b.path == ""]
    assert type(block) is kind
    assert row.kind is (Reason.RANDOM if change == "draws in eval mode" else Reason.FORK), row


@pytest.mark.parametrize("change", ["in eval mode", "beyond a window"])
def test_a_fork_that_is_known_by_an_argument(change):
    """Of EDM2's layers nothing but a gain of zero is taken."""
    torch.manual_seed(0)
    theirs = forked(BLOCKS["MPConv"](), lambda self, result, args: FORKS[change](self, result + 1, args)).eval()
    ours = copy.deepcopy(theirs)
    zb.accelerate(ours)
    x, gain = torch.randn(2, 8, 34, 4), torch.zeros([])
    with torch.no_grad():
        zb.testing.assert_bitwise_equal(ours(x, gain), theirs(x, gain))


class OneForAll(eager.DiTBlock):
    """A condition of one sample is not for all of them, but for the first."""

    def forward(self, x, c):
        if len(c) < len(x):
            c = F.pad(c, (0, 0, 0, len(x) - len(c)))
        return super().forward(x, c)


OneForAll.__name__ = "DiTBlock"


def test_fork_in_how_it_broadcasts_is_left_alone():
    report = zb.accelerate(OneForAll(16, 2))
    assert [b.kind for b in report.left_alone] == [Reason.FORK]


class WindowAttention(eager.Attention):
    """Of timm's name and attributes, within windows of 16 tokens."""

    def __init__(self, *args):
        super().__init__(*args)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        B, T, D = x.shape
        if T <= 16:
            return super().forward(x)
        whole = F.pad(x, (0, 0, 0, -T % 16)).unflatten(1, (-1, 16)).flatten(0, 1)
        return super().forward(whole).unflatten(0, (B, -1)).flatten(1, 2)[:, :T]


WindowAttention.__name__ = "Attention"


def test_attention_within_windows_is_left_alone():
    torch.manual_seed(0)
    block = eager.DiTBlock(16, 2)
    block.attn = WindowAttention(16, 2)
    assert [b.kind for b in zb.accelerate(nn.ModuleList([eager.DiTBlock(16, 2), block])).left_alone] == [Reason.FORK]


def test_neither_mode_of_the_block_matters():
    zb.convert.proof._proved.clear()
    zb.accelerate(eager.DiTBlock(16, 2).eval())
    before = len(zb.convert.proof._proved)
    block = eager.DiTBlock(16, 2).train()
    zb.accelerate(block)
    assert before == len(zb.convert.proof._proved) == 1 and block.training and block.mlp.training


# ---- optional arguments ---------------------------------------------------------------------------------------------


class Masked(eager.DiTBlock):
    """An argument that the family does not know."""

    def forward(self, x, c, mask=None):
        y = super().forward(x, c)
        return y if mask is None else y * mask[..., None]


class OtherMask(oracles_tokens.PixArtBlock):
    """An argument of the family's name with another meaning."""

    def forward(self, x, y, t, mask=None):
        if mask is not None and isinstance(mask, torch.Tensor):
            y = y * mask.float().mean(-1).view(-1, 1, 1)
        return super().forward(x, y, t)


class Swapped(eager.DiTBlock):
    """The family's names in other places."""

    def forward(self, c, x):
        return super().forward(c, x)


for kind in (Masked, Swapped):
    kind.__name__ = "DiTBlock"


def pair(make):
    torch.manual_seed(0)
    theirs = randomize_(make())
    ours = copy.deepcopy(theirs)
    assert zb.accelerate(ours).blocks
    return ours, theirs


def calls(monkeypatch, ours):
    """Counts the family's forwards of it."""
    seen = []
    family = type(ours)._zeroblock.family
    forward = family.forward
    monkeypatch.setattr(type(family), "forward", lambda self, *a, **k: (seen.append(1), forward(*a, **k))[1])
    return seen


def test_optional_argument_of_a_fork():
    ours, theirs = pair(lambda: Masked(16, 2))
    x, c, mask = torch.randn(2, 5, 16), torch.randn(2, 16), torch.rand(2, 5)
    assert torch.equal(ours(x, c, mask), theirs(x, c, mask))
    assert torch.equal(ours(x, c, mask=mask), theirs(x, c, mask=mask))
    torch.testing.assert_close(ours(x, c), theirs(x, c))


def test_names_in_other_places():
    ours, theirs = pair(lambda: Swapped(16, 2))
    x, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    torch.testing.assert_close(ours(x, c), theirs(x, c))
    torch.testing.assert_close(ours(c=x, x=c), theirs(c=x, x=c))


@pytest.mark.parametrize("given", ["positionally", "by keyword"])
def test_known_argument_with_another_meaning(given):
    """The rest of the block is accelerated."""
    ours, theirs = pair(lambda: OtherMask(24, 2))
    x, y, t, mask = torch.randn(2, 5, 24), torch.randn(2, 3, 24), torch.randn(2, 144), torch.rand(2, 1, 3) < 0.5
    args, kwargs = ((mask,), {}) if given == "positionally" else ((), {"mask": mask})
    assert torch.equal(ours(x, y, t, *args, **kwargs), theirs(x, y, t, *args, **kwargs))
    torch.testing.assert_close(ours(x, y, t), theirs(x, y, t))
    torch.testing.assert_close(ours(x, y, t, mask=None), theirs(x, y, t, mask=None))


# {family: its optional arguments that are taken}; what stays out goes to the original, as does a control of the rest.
TAKEN = {
    "PixArtBlock": {"mask"},
    "RZTXEncoderLayer": {"src_mask", "src_key_padding_mask"},
    "AttentionBlock": {"encoder_out"},
    "BasicTransformerBlock": {"attention_mask", "encoder_attention_mask", "cross_attention_kwargs"},
    "JointTransformerBlock": {"joint_attention_kwargs"},
    "FluxTransformerBlock": {"image_rotary_emb", "joint_attention_kwargs"},
    "FluxSingleTransformerBlock": {"image_rotary_emb", "joint_attention_kwargs"},
}


@pytest.mark.parametrize("name", TAKEN)
def test_optional_arguments_of_the_known_blocks_are_proved(name):
    torch.manual_seed(0)
    block = BLOCKS[name]()
    family = FAMILIES[name]()
    verdict = zb.convert.proof.verdict(block, family)
    assert set(family.options(block)) == TAKEN[name] <= verdict.options


@pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="diffusers is not installed")
def test_what_was_not_proved_runs_the_original():
    torch.manual_seed(0)
    block = BLOCKS["BasicTransformerBlock"]()
    zb.accelerate(block)
    known = type(block)._zeroblock
    seen = []
    known.family.eager = lambda *a, **k: pytest.fail("the family was called")
    x, context, t = torch.randn(2, 4, 16), torch.randn(2, 3, 12), torch.randn(2, 96)
    del known.family.eager
    original = copy.deepcopy(block)
    zb.restore(original)
    extra = {"added_cond_kwargs": {"unknown": x}}
    y = block(x, None, context, None, t, **extra)
    assert torch.equal(y, original(x, None, context, None, t, **extra)) and not seen
