"""The residual blocks of diffusers' video autoencoders, and those autoencoders, accelerated."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.testing import counters, reset_counters

from . import oracles_wan
from .model_cases import Case, accelerated, check, infer, normal, outputs, prepared

diffusers = pytest.importorskip("diffusers", minversion="0.35", reason="diffusers is not installed")
C = 8


def _class(module, name):
    if module == "wan":
        return getattr(oracles_wan, name)
    found = importlib.util.find_spec(f"diffusers.models.autoencoders.autoencoder_{module}")
    return found and getattr(importlib.import_module(found.name), name)


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


VIDEO, IMAGE = (2, C, 4, 3, 5), (2, 32, 5, 3)
# {name: (module, class, arguments, options, sizes of the inputs, kind of cache, family)}
BLOCKS = {
    "wan": ("kl_wan", "WanResidualBlock", (C, C), {}, {"x": VIDEO}, None, "WanResidualBlock"),
    "wan-wider-dropout": ("kl_wan", "WanResidualBlock", (C, 16, 0.3), {}, {"x": VIDEO}, None, "WanResidualBlock"),
    "wan-pieces": ("kl_wan", "WanResidualBlock", (C, 16), {}, {"x": (2, C, 6, 3, 4)}, "list", "WanResidualBlock"),
    "original-wan": ("wan", "ResidualBlock", (C, 16, 0.2), {}, {"x": VIDEO}, None, "ResidualBlock"),
    "original-wan-pieces": ("wan", "ResidualBlock", (C, C), {}, {"x": (2, C, 6, 3, 4)}, "list", "ResidualBlock"),
    "qwen": ("kl_qwenimage", "QwenImageResidualBlock", (C, 16), {}, {"x": (2, C, 1, 5, 4)}, None, "WanResidualBlock"),
    "qwen-2.1": (
        "kl_qwenimage21", "QwenImage21ResidualBlock", (C, 16, 0.2), {}, {"x": (2, C, 1, 5, 4)}, None,
        "QwenImage21ResidualBlock",
    ),
    "ltx-2-audio": (
        "kl_ltx2_audio", "LTX2AudioResnetBlock", (C, 16), {"temb_channels": 0, "norm_type": "pixel", "dropout": 0.2},
        {"x": (2, C, 5, 4)}, None, "LTX2AudioResnetBlock",
    ),
    "ltx-2-audio-group": (
        "kl_ltx2_audio", "LTX2AudioResnetBlock", (32, 32), {"temb_channels": 0, "causality_axis": None},
        {"x": IMAGE}, None, "LTX2AudioResnetBlock",
    ),
    "hunyuan-1.5": (
        "kl_hunyuanvideo15", "HunyuanVideo15ResnetBlock", (C, 16), {}, {"hidden_states": VIDEO}, None,
        "HunyuanVideo15ResnetBlock",
    ),
    "hunyuan-refiner": (
        "kl_hunyuanimage_refiner", "HunyuanImageRefinerResnetBlock", (C, C), {}, {"hidden_states": (2, C, 1, 3, 5)},
        None, "HunyuanVideo15ResnetBlock",
    ),
    "hunyuan": (
        "kl_hunyuan_video", "HunyuanVideoResnetBlockCausal3D", (C, 16, 0.1), {"groups": 4}, {"hidden_states": VIDEO},
        None, "HunyuanVideoResnetBlockCausal3D",
    ),
    "hunyuan-image": (
        "kl_hunyuanimage", "HunyuanImageResnetBlock", (32, 32), {}, {"x": IMAGE}, None, "HunyuanImageResnetBlock",
    ),
    "cosmos": ("kl_cosmos", "CosmosResnetBlock3d", (C, 16, 0.2), {}, {"hidden_states": VIDEO}, None,
               "CosmosResnetBlock3d"),
    "cosmos-clip": ("kl_cosmos", "CosmosResnetBlock3d", (C, C), {"num_groups": 2}, {"hidden_states": VIDEO}, None,
                    "CosmosResnetBlock3d"),
    "minimax-h3": ("kl_minimax_h3", "MiniMaxH3VideoResnetBlock3d", (C, 16, 4), {}, {"hidden_states": VIDEO}, None,
                   "MiniMaxH3VideoResnetBlock3d"),
    "ltx": ("kl_ltx", "LTXVideoResnetBlock3d", (C, 16), {}, {"inputs": VIDEO}, None, "LTXVideoResnetBlock3d"),
    "ltx-timestep": (
        "kl_ltx", "LTXVideoResnetBlock3d", (C, C), {"timestep_conditioning": True, "is_causal": False},
        {"inputs": VIDEO, "temb": (2, 4 * C, 1, 1, 1)}, None, "LTXVideoResnetBlock3d",
    ),
    "ltx-2": ("kl_ltx2", "LTX2VideoResnetBlock3d", (C, 16), {}, {"inputs": VIDEO}, None, "LTXVideoResnetBlock3d"),
    "ltx-2-reflect": (
        "kl_ltx2", "LTX2VideoResnetBlock3d", (C, C), {"spatial_padding_mode": "reflect"}, {"inputs": VIDEO}, None,
        "LTXVideoResnetBlock3d",
    ),
    "cogvideox": (
        "kl_cogvideox", "CogVideoXResnetBlock3D", (C, 16, 0.1, 6, 4), {}, {"inputs": VIDEO, "temb": (2, 6)}, None,
        "CogVideoXResnetBlock3D",
    ),
    "cogvideox-zq": (
        "kl_cogvideox", "CogVideoXResnetBlock3D", (C, C, 0.0, 0, 4), {"spatial_norm_dim": 4},
        {"inputs": VIDEO, "zq": (2, 4, 2, 2, 3)}, None, "CogVideoXResnetBlock3D",
    ),
    "cogvideox-pieces": (
        "kl_cogvideox", "CogVideoXResnetBlock3D", (C, 16, 0.0, 0, 4), {"conv_shortcut": True},
        {"x": (2, C, 6, 3, 4)}, "dict", "CogVideoXResnetBlock3D",
    ),
    "mochi": ("kl_mochi", "MochiResnetBlock3D", (32,), {}, {"inputs": (2, 32, 4, 3, 2)}, None, "MochiResnetBlock3D"),
    "easyanimate": (
        "kl_magvit", "EasyAnimateResidualBlock3D", (C, 16), {"norm_num_groups": 4}, {"x": (2, C, 6, 3, 4)}, "module",
        "EasyAnimateResidualBlock3D",
    ),
    "easyanimate-clip": (
        "kl_magvit", "EasyAnimateResidualBlock3D", (C, C),
        {"norm_num_groups": 4, "spatial_group_norm": False, "output_scale_factor": 2.0, "dropout": 0.2},
        {"x": (2, C, 6, 3, 4)}, "module", "EasyAnimateResidualBlock3D",
    ),
    "kvae": (
        "kl_kvae", "KVAEResnetBlock2D", (), {"in_channels": 32, "out_channels": 64, "temb_channels": 0}, {"x": IMAGE},
        None, "KVAEResnetBlock2D",
    ),
    "kvae-zq": (
        "kl_kvae", "KVAEResnetBlock2D", (), {"in_channels": 32, "temb_channels": 0, "zq_ch": 4},
        {"x": IMAGE, "zq": (2, 4, 3, 2)}, None, "KVAEResnetBlock2D",
    ),
}  # fmt: skip
# Without gradients the original's steps are taken one by one, or its last convolution is the original.
NOT_SKIPPED = (
    "wan-pieces",
    "original-wan-pieces",
    "qwen-2.1",
    "minimax-h3",
    "ltx-2-reflect",
    "cogvideox",
    "easyanimate",
)


def case(name):
    module, kind, args, options, sizes, cache, family = BLOCKS[name]
    block = _class(module, kind)
    if block is None:
        pytest.skip(f"this diffusers has no {kind}")
    build = lambda: block(*args, **options)  # noqa: E731
    inputs = lambda g: {k: normal(g, *size) for k, size in sizes.items()} | ({"temb": None} if "kvae" in name else {})  # noqa: E731
    tail = "conv2.conv_t" if "cosmos" in name else "residual.6" if "original" in name else "conv2.*"
    zeros = ((f"*{tail}weight" if tail.endswith("*") else f"*{tail}.weight", 0.0, 1.0),)
    skipped = {family: 0 if name.startswith(NOT_SKIPPED) else 1}
    return Case((lambda: Pieces(build(), cache)) if cache else build, inputs, zeros, {family: 0}, skipped)


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
        z = self.vae.encode(x).latent_dist.mode()
        y = self.vae.decode(z, return_dict=False)[0]
        return z, y


FOUR = (C, C, C, C)
ONE = (1, 1, 1, 1, 1)
MODELS = {
    "AutoencoderKLWan": (
        {"base_dim": C, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]},
        (1, 3, 5, 8, 8), "WanResidualBlock",
    ),
    "AutoencoderKLQwenImage": (
        {"base_dim": C, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]},
        (1, 3, 1, 8, 8), "WanResidualBlock",
    ),
    "AutoencoderKLLTX2Audio": (
        {"base_channels": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 4, "mel_bins": 8},
        (1, 2, 8, 8), "LTX2AudioResnetBlock",
    ),
    "AutoencoderKLHunyuanVideo15": (
        {"latent_channels": 4, "block_out_channels": (16, 16, 16, 16), "layers_per_block": 1,
         "spatial_compression_ratio": 8, "temporal_compression_ratio": 4},
        (1, 3, 5, 16, 16), "HunyuanVideo15ResnetBlock",
    ),
    "AutoencoderKLHunyuanVideo": (
        {"latent_channels": 4, "block_out_channels": FOUR, "layers_per_block": 1, "norm_num_groups": 2},
        (1, 3, 5, 16, 16), "HunyuanVideoResnetBlockCausal3D",
    ),
    "AutoencoderKLCogVideoX": (
        {"latent_channels": 4, "block_out_channels": FOUR, "layers_per_block": 1, "norm_num_groups": 2},
        (1, 3, 5, 16, 16), "CogVideoXResnetBlock3D",
    ),
    "AutoencoderKLMochi": (
        {"latent_channels": 4, "encoder_block_out_channels": (32, 32, 32, 32),
         "decoder_block_out_channels": (32, 32, 32, 32), "layers_per_block": ONE},
        (1, 3, 7, 16, 16), "MochiResnetBlock3D",
    ),
    "AutoencoderKLMagvit": (
        {"latent_channels": 4, "block_out_channels": FOUR, "layers_per_block": 1, "norm_num_groups": 2},
        (1, 3, 5, 16, 16), "EasyAnimateResidualBlock3D",
    ),
    "AutoencoderKLCosmos": (
        {"latent_channels": 4, "encoder_block_out_channels": FOUR, "decode_block_out_channels": FOUR,
         "attention_resolutions": (8,), "resolution": 64, "num_layers": 1},
        (1, 3, 9, 32, 32), "CosmosResnetBlock3d",
    ),
    "AutoencoderKLLTXVideo": (
        {"latent_channels": 8, "block_out_channels": FOUR, "decoder_block_out_channels": FOUR,
         "layers_per_block": ONE, "decoder_layers_per_block": ONE, "patch_size": 1},
        (1, 3, 9, 16, 16), "LTXVideoResnetBlock3d",
    ),
    "AutoencoderKLLTX2Video": (
        {"latent_channels": 8, "block_out_channels": FOUR, "decoder_block_out_channels": (16, 32, 64),
         "layers_per_block": ONE, "decoder_layers_per_block": (1, 1, 1, 1), "patch_size": 1},
        (1, 3, 9, 16, 16), "LTXVideoResnetBlock3d",
    ),
    "AutoencoderKLKVAE": (
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2),
         "sample_size": 32},
        (1, 3, 16, 16), "KVAEResnetBlock2D",
    ),
    "AutoencoderKLHunyuanImage": (
        {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 64),
         "layers_per_block": 1, "spatial_compression_ratio": 4, "sample_size": 16},
        (1, 3, 16, 16), "HunyuanImageResnetBlock",
    ),
}  # fmt: skip


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
