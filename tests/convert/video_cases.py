"""Blocks and models of diffusers' autoencoders, small: how they are made, and what they are given."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from torch import nn

from . import oracles_wan


class Block(NamedTuple):
    make: Callable[[], nn.Module]
    given: dict[str, tuple[int, ...]]  # sizes of the inputs
    family: str
    cache: str | None  # what the frames are kept in, where the block is called with one piece of a clip after the other


OTHERS = ("resnet", "unets.unet_2d_blocks")


def _block(module: str, kind: str, *args: Any, given: dict, family: str = "", cache: str | None = None, **options: Any):
    def make() -> nn.Module:
        if module == "wan":
            return getattr(oracles_wan, kind)(*args, **options)
        name = f"diffusers.models.{module if module in OTHERS else f'autoencoders.autoencoder_{module}'}"
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"this diffusers has no {kind}")
        return getattr(importlib.import_module(name), kind)(*args, **options)

    return Block(make, given, family or kind, cache)


VIDEO, CLIP, IMAGE = (2, 8, 4, 3, 5), (2, 8, 6, 3, 4), (2, 32, 5, 3)

BLOCKS = {
    "wan": _block("kl_wan", "WanResidualBlock", 8, 8, given={"x": VIDEO}),
    "wan-wider-dropout": _block("kl_wan", "WanResidualBlock", 8, 16, 0.3, given={"x": VIDEO}),
    "wan-pieces": _block("kl_wan", "WanResidualBlock", 8, 16, given={"x": CLIP}, cache="list"),
    "original-wan": _block("wan", "ResidualBlock", 8, 16, 0.2, given={"x": VIDEO}),
    "original-wan-pieces": _block("wan", "ResidualBlock", 8, 8, given={"x": CLIP}, cache="list"),
    "qwen": _block(
        "kl_qwenimage", "QwenImageResidualBlock", 8, 16, given={"x": (2, 8, 1, 5, 4)}, family="WanResidualBlock"
    ),
    "qwen-2.1": _block("kl_qwenimage21", "QwenImage21ResidualBlock", 8, 16, 0.2, given={"x": (2, 8, 1, 5, 4)}),
    "ltx-2-audio": _block(
        "kl_ltx2_audio",
        "LTX2AudioResnetBlock",
        8,
        16,
        given={"x": (2, 8, 5, 4)},
        temb_channels=0,
        norm_type="pixel",
        dropout=0.2,
    ),
    "ltx-2-audio-group": _block(
        "kl_ltx2_audio", "LTX2AudioResnetBlock", 32, 32, given={"x": IMAGE}, temb_channels=0, causality_axis=None
    ),
    "hunyuan-1.5": _block("kl_hunyuanvideo15", "HunyuanVideo15ResnetBlock", 8, 16, given={"hidden_states": VIDEO}),
    "hunyuan-refiner": _block(
        "kl_hunyuanimage_refiner",
        "HunyuanImageRefinerResnetBlock",
        8,
        8,
        given={"hidden_states": (2, 8, 1, 3, 5)},
        family="HunyuanVideo15ResnetBlock",
    ),
    "hunyuan": _block(
        "kl_hunyuan_video", "HunyuanVideoResnetBlockCausal3D", 8, 16, 0.1, given={"hidden_states": VIDEO}, groups=4
    ),
    "hunyuan-image": _block("kl_hunyuanimage", "HunyuanImageResnetBlock", 32, 32, given={"x": IMAGE}),
    "cosmos": _block("kl_cosmos", "CosmosResnetBlock3d", 8, 16, 0.2, given={"hidden_states": VIDEO}),
    "cosmos-clip": _block("kl_cosmos", "CosmosResnetBlock3d", 8, 8, given={"hidden_states": VIDEO}, num_groups=2),
    "minimax-h3": _block("kl_minimax_h3", "MiniMaxH3VideoResnetBlock3d", 8, 16, 4, given={"hidden_states": VIDEO}),
    "ltx": _block("kl_ltx", "LTXVideoResnetBlock3d", 8, 16, given={"inputs": VIDEO}),
    "ltx-timestep": _block(
        "kl_ltx",
        "LTXVideoResnetBlock3d",
        8,
        8,
        given={"inputs": VIDEO, "temb": (2, 32, 1, 1, 1)},
        timestep_conditioning=True,
        is_causal=False,
    ),
    "ltx-2": _block(
        "kl_ltx2", "LTX2VideoResnetBlock3d", 8, 16, given={"inputs": VIDEO}, family="LTXVideoResnetBlock3d"
    ),
    "ltx-2-reflect": _block(
        "kl_ltx2",
        "LTX2VideoResnetBlock3d",
        8,
        8,
        given={"inputs": VIDEO},
        family="LTXVideoResnetBlock3d",
        spatial_padding_mode="reflect",
    ),
    "cogvideox": _block(
        "kl_cogvideox", "CogVideoXResnetBlock3D", 8, 16, 0.1, 6, 4, given={"inputs": VIDEO, "temb": (2, 6)}
    ),
    "cogvideox-zq": _block(
        "kl_cogvideox",
        "CogVideoXResnetBlock3D",
        8,
        8,
        0.0,
        0,
        4,
        given={"inputs": VIDEO, "zq": (2, 4, 2, 2, 3)},
        spatial_norm_dim=4,
    ),
    "cogvideox-pieces": _block(
        "kl_cogvideox", "CogVideoXResnetBlock3D", 8, 16, 0.0, 0, 4, given={"x": CLIP}, cache="dict", conv_shortcut=True
    ),
    "mochi": _block("kl_mochi", "MochiResnetBlock3D", 32, given={"inputs": (2, 32, 4, 3, 2)}),
    "easyanimate": _block(
        "kl_magvit", "EasyAnimateResidualBlock3D", 8, 16, given={"x": CLIP}, cache="module", norm_num_groups=4
    ),
    "easyanimate-clip": _block(
        "kl_magvit",
        "EasyAnimateResidualBlock3D",
        8,
        8,
        given={"x": CLIP},
        cache="module",
        norm_num_groups=4,
        spatial_group_norm=False,
        output_scale_factor=2.0,
        dropout=0.2,
    ),
    "dc": _block(
        "dc",
        "ResBlock",
        8,
        8,
        norm_type="rms_norm",
        act_fn="silu",
        given={"hidden_states": (2, 8, 5, 3)},
        family="DCResBlock",
    ),
    "kvae": _block(
        "kl_kvae", "KVAEResnetBlock2D", given={"x": IMAGE}, in_channels=32, out_channels=64, temb_channels=0
    ),
    "kvae-zq": _block(
        "kl_kvae", "KVAEResnetBlock2D", given={"x": IMAGE, "zq": (2, 4, 3, 2)}, in_channels=32, temb_channels=0, zq_ch=4
    ),
    "tiny": _block("unets.unet_2d_blocks", "AutoencoderTinyBlock", 8, 8, "relu", given={"x": (2, 8, 5, 3)}),
    "tiny-wider": _block("unets.unet_2d_blocks", "AutoencoderTinyBlock", 8, 16, "silu", given={"x": (2, 8, 5, 3)}),
    "temporal": _block(
        "resnet",
        "TemporalResnetBlock",
        32,
        64,
        given={"input_tensor": (2, 32, 3, 2, 3), "temb": (2, 3, 6)},
        temb_channels=6,
    ),
    "temporal-vae": _block(
        "resnet",
        "TemporalResnetBlock",
        32,
        given={"input_tensor": (2, 32, 3, 2, 3)},
        temb_channels=None,
    ),
}


FOUR, ONE = (8, 8, 8, 8), (1, 1, 1, 1, 1)
# {class: (options, size of the input, family of its blocks)}
MODELS = {
    "AutoencoderKLWan": (
        dict(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]),
        (1, 3, 5, 8, 8),
        "WanResidualBlock",
    ),
    "AutoencoderKLQwenImage": (
        dict(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]),
        (1, 3, 1, 8, 8),
        "WanResidualBlock",
    ),
    "AutoencoderKLLTX2Audio": (
        dict(base_channels=16, ch_mult=(1, 2), num_res_blocks=1, latent_channels=4, mel_bins=8),
        (1, 2, 8, 8),
        "LTX2AudioResnetBlock",
    ),
    "AutoencoderKLHunyuanVideo15": (
        dict(
            latent_channels=4,
            block_out_channels=(16, 16, 16, 16),
            layers_per_block=1,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
        ),
        (1, 3, 5, 16, 16),
        "HunyuanVideo15ResnetBlock",
    ),
    "AutoencoderKLHunyuanVideo": (
        dict(latent_channels=4, block_out_channels=FOUR, layers_per_block=1, norm_num_groups=2),
        (1, 3, 5, 16, 16),
        "HunyuanVideoResnetBlockCausal3D",
    ),
    "AutoencoderKLCogVideoX": (
        dict(latent_channels=4, block_out_channels=FOUR, layers_per_block=1, norm_num_groups=2),
        (1, 3, 5, 16, 16),
        "CogVideoXResnetBlock3D",
    ),
    "AutoencoderKLMochi": (
        dict(
            latent_channels=4,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=ONE,
        ),
        (1, 3, 7, 16, 16),
        "MochiResnetBlock3D",
    ),
    "AutoencoderKLMagvit": (
        dict(latent_channels=4, block_out_channels=FOUR, layers_per_block=1, norm_num_groups=2),
        (1, 3, 5, 16, 16),
        "EasyAnimateResidualBlock3D",
    ),
    "AutoencoderKLCosmos": (
        dict(
            latent_channels=4,
            encoder_block_out_channels=FOUR,
            decode_block_out_channels=FOUR,
            attention_resolutions=(8,),
            resolution=64,
            num_layers=1,
        ),
        (1, 3, 9, 32, 32),
        "CosmosResnetBlock3d",
    ),
    "AutoencoderKLLTXVideo": (
        dict(
            latent_channels=8,
            block_out_channels=FOUR,
            decoder_block_out_channels=FOUR,
            layers_per_block=ONE,
            decoder_layers_per_block=ONE,
            patch_size=1,
        ),
        (1, 3, 9, 16, 16),
        "LTXVideoResnetBlock3d",
    ),
    "AutoencoderKLLTX2Video": (
        dict(
            latent_channels=8,
            block_out_channels=FOUR,
            decoder_block_out_channels=(16, 32, 64),
            layers_per_block=ONE,
            decoder_layers_per_block=(1, 1, 1, 1),
            patch_size=1,
        ),
        (1, 3, 9, 16, 16),
        "LTXVideoResnetBlock3d",
    ),
    "AutoencoderDC": (
        dict(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
        ),
        (1, 3, 16, 16),
        "DCResBlock",
    ),
    "AutoencoderKLKVAE": (
        dict(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 2), sample_size=32),
        (1, 3, 16, 16),
        "KVAEResnetBlock2D",
    ),
    "AutoencoderKLHunyuanImage": (
        dict(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=16,
        ),
        (1, 3, 16, 16),
        "HunyuanImageResnetBlock",
    ),
}
