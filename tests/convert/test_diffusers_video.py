"""The residual blocks of diffusers' video autoencoders, and those autoencoders, accelerated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import counters, reset_counters

from .model_cases import Case, accelerated, check, infer, normal, outputs, prepared
from .video_cases import BLOCKS, MODELS, VIDEO

diffusers = pytest.importorskip("diffusers", minversion="0.35", reason="diffusers is not installed")
C = 8


class Pieces(nn.Module):
    """Calls a block with one piece of a clip after the other, of 1, 2 and 3 frames, as autoencoders that stream do."""

    def __init__(self, block, kind):
        super().__init__()
        self.block, self.kind = block, kind

    def forward(self, x):
        cache, ys = [None] * 4 if self.kind == "list" else None, []
        for m in self.modules():
            if hasattr(m, "prev_features"):
                m.prev_features = None
        for piece in x.split([1, 2, 3], 2):
            if self.kind == "list":
                ys.append(self.block(piece, cache, [1]))
            elif self.kind == "dict":
                y, cache = self.block(piece, conv_cache=cache)
                ys.append(y)
            else:
                ys.append(self.block(piece))
        kept = [t for t in (cache.values() if isinstance(cache, dict) else cache or ()) if t is not None]
        return torch.cat(ys, 2), *kept


# Without gradients the original's steps are taken one by one, or its last convolution is the original.
NOT_SKIPPED = (
    "dc",
    "wan-pieces",
    "original-wan-pieces",
    "qwen-2.1",
    "minimax-h3",
    "ltx-2-reflect",
    "cogvideox",
    "easyanimate",
)


def case(name):
    block = BLOCKS[name]
    none = {"temb": None} if "kvae" in name or name == "temporal-vae" else {}
    inputs = lambda g: {k: normal(g, *size) for k, size in block.given.items()} | none  # noqa: E731
    tail = (
        "norm."
        if name == "dc"
        else "conv2.conv_t."
        if "cosmos" in name
        else "residual.6."
        if "original" in name
        else "conv.4."
        if "tiny" in name
        else "conv2.*"
    )
    build = (lambda: Pieces(block.make(), block.cache)) if block.cache else block.make
    skipped = 0 if name.startswith(NOT_SKIPPED) else 1
    return Case(build, inputs, ((f"*{tail}weight", 0.0, 1.0),), {block.family: 0}, {block.family: skipped})


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients(name, phase):
    check(case(name), phase)


@pytest.mark.parametrize("phase", ["zero", "dense"])
@pytest.mark.parametrize("name", BLOCKS)
def test_inference(name, phase):
    check(case(name), phase, infer)


@pytest.mark.parametrize("name", BLOCKS)
def test_one_block_of_the_report_and_its_state(name):
    """Nothing of a block's own is called while it is dense, but the modules that its family says; restore undoes it."""
    plain = prepared(case(name), "dense")
    twin = copy.deepcopy(plain)
    report = zb.accelerate(twin, strict=True)
    assert report.blocks == 1 and not report.left_alone
    assert list(twin.state_dict()) == list(plain.state_dict())
    asked = [m for m in twin.modules() if hasattr(type(m), "_zeroblock")]
    for m in asked:
        family = type(m)._zeroblock.family
        family.eager = lambda *args, **kwargs: pytest.fail("the original ran")
    inputs = case(name).inputs(torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    ours = outputs(twin(**inputs))
    for m in asked:
        del type(m)._zeroblock.family.eager
    assert zb.restore(twin) == 1 and [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    torch.manual_seed(1)
    for y, expected in zip(ours, outputs(plain(**inputs)), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_zero_convolution_is_not_executed_in_training():
    block = prepared(case("wan"), "zero")
    zb.accelerate(block)
    reset_counters()
    block(torch.randn(VIDEO)).sum().backward()
    assert counters()["conv_residual"] == (1, 1)


@pytest.mark.parametrize(
    "name, change",
    {
        "wan": lambda b: setattr(b, "conv1", nn.Conv3d(C, C, 3, padding=1)),
        "hunyuan": lambda b: setattr(b.conv2, "pad_mode", "reflect"),
        "mochi": lambda b: setattr(b, "nonlinearity", nn.GELU()),
        "cosmos": lambda b: b.conv1.conv_s.register_forward_hook(lambda *a: None),
        "ltx": lambda b: setattr(b, "norm1", nn.Identity()),
        "easyanimate": lambda b: setattr(b.block.conv1, "padding_mode", "replicate"),
    }.items(),
)
def test_what_is_changed_later_goes_to_the_original(name, change):
    plain = prepared(case(name), "dense").eval()
    ours, _ = accelerated(plain)
    for model in (plain, ours):
        torch.manual_seed(0)
        change(model)
    inputs = case(name).inputs(torch.Generator().manual_seed(0))
    for y, expected in zip(outputs(ours(**inputs)), outputs(plain(**inputs)), strict=True):
        assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "mochi", "cogvideox-zq"])
def test_compiled_in_one_graph(name):
    block = prepared(case(name), "dense").eval()
    zb.accelerate(block, strict=True)
    inputs = case(name).inputs(torch.Generator().manual_seed(0))
    leaf = next(iter(inputs.values())).requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    ys = [outputs(m(**inputs))[0] for m in (block, compiled)]
    torch.testing.assert_close(*ys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaf)[0] for y in ys), rtol=1e-4, atol=1e-3)


# ---- whole autoencoders ---------------------------------------------------------------------------------------------


class RoundTrip(nn.Module):
    """decode(encode(x))"""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, x):
        encoded = self.vae.encode(x)
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        y = self.vae.decode(z, return_dict=False)[0]
        return z, y


@pytest.mark.parametrize("name", MODELS)
def test_an_autoencoder(name):
    """Encode and decode, outputs and gradients."""
    config, size, family = MODELS[name]
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"this diffusers has no {name}")
    made = Case(lambda: RoundTrip(kind(**config)), lambda g: {"x": normal(g, *size)}, (), {})
    check(made, "dense", together=True)
    report = zb.accelerate(made.build())
    assert family in {b.family for b in report.branches}
    assert not [b for b in report.left_alone if "esnetBlock" in b.block or "ResidualBlock" in b.block], report


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLHunyuanVideo", "AutoencoderKLCogVideoX"])
def test_tiles_and_slices(name):
    """Decoded in tiles, sample by sample, in inference."""
    config, size, _ = MODELS[name]
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"this diffusers has no {name}")
    torch.manual_seed(0)
    model = RoundTrip(kind(**config)).eval()
    model.vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
    model.vae.enable_slicing()
    ours, _ = accelerated(model)
    x = torch.randn(2, *size[1:3], 24, 24)
    with torch.no_grad():
        for y, expected in zip(ours(x), model(x), strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
