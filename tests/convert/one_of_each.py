"""A block of every family that is proved."""

from __future__ import annotations

import pytest
from torch import nn

from zeroblock.testing import eager

from . import (
    diffusers_blocks,
    oracles_authors,
    oracles_compvis,
    oracles_edm,
    oracles_flux,
    oracles_gated,
    oracles_glide,
    oracles_hunyuan,
    oracles_lumina,
    oracles_tokens,
    oracles_wan,
)


def diffusers_block(module, kind, *args, **options):
    def make():
        package = pytest.importorskip(f"diffusers.models.{module}", reason="diffusers is not installed")
        return getattr(package, kind)(*args, **options)

    return make


def autoencoder_block(module, kind, *args, **options):
    return diffusers_block(f"autoencoders.autoencoder_{module}", kind, *args, **options)


def ada_norm_zero(**options):
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(16, 2, 8, norm_type="ada_norm_zero", num_embeds_ada_norm=4, **options)


def sana_wm():
    home = pytest.importorskip("diffusers.models.transformers.transformer_sana_wm", reason="diffusers is not installed")
    attention, options = home.BidirectionalGDNUCPESinglePathLiteLA, {"linear_head_dim": 16, "cam_attn_compress": 1}
    options |= {"ffn_type": "GLUMBConvTemp", "use_chunk_plucker_post_attn": True}
    return home.SanaVideoMSCamCtrlBlock(32, 2, attention, **options)


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
    "AttentionBlock": lambda: oracles_glide.GlideAttentionBlock(32, 2, 24),
    "UNetBlock": lambda: oracles_edm.UNetBlock(16, 16, 16, num_heads=2),
    "MPConv": lambda: oracles_edm.MPConv(8, 8, 3, 3),
    "DiTBlock": lambda: eager.DiTBlock(16, 2),
    "FinalLayer": lambda: eager.FinalLayer(16, 1, 4),
    "PixArtBlock": lambda: oracles_tokens.PixArtBlock(24, 2),
    "T2IFinalLayer": lambda: oracles_tokens.T2IFinalLayer(24, 6),
    "ResnetBlock": lambda: oracles_compvis.ResnetBlock(16, 24, 12),
    "ResnetBlockDDPM": lambda: oracles_compvis.ResnetBlockDDPM(nn.SiLU(), 16, 24, 12),
    "DoubleStreamBlock": oracles_flux.DoubleStreamBlock,
    "SingleStreamBlock": oracles_flux.SingleStreamBlock,
    "LastLayer": oracles_flux.LastLayer,
    "AdaLNSelfAttn": oracles_gated.AdaLNSelfAttn,
    "F5DiTBlock": oracles_gated.DiTBlock,
    "MDTBlock": oracles_gated.MDTBlock,
    "MARResBlock": oracles_gated.ResBlock,
    "WanAttentionBlock": oracles_authors.WanAttentionBlock,
    "Wan22AttentionBlock": oracles_authors.Wan22AttentionBlock,
    "WanHead": oracles_authors.Head,
    "Wan22Head": oracles_authors.Wan22Head,
    "MMDoubleStreamBlock": oracles_hunyuan.MMDoubleStreamBlock,
    "MMSingleStreamBlock": oracles_hunyuan.MMSingleStreamBlock,
    "MusubiMMDoubleStreamBlock": oracles_hunyuan.TrainedDouble,
    "MusubiMMSingleStreamBlock": oracles_hunyuan.TrainedSingle,
    "MusubiMM15DoubleStreamBlock": oracles_hunyuan.Double15,
    "IndividualTokenRefinerBlock": oracles_hunyuan.IndividualTokenRefinerBlock,
    "MusubiTokenRefinerBlock": oracles_hunyuan.Refiner15,
    "HunYuanDiTBlock": oracles_hunyuan.HunYuanDiTBlock,
    "LTXBasicTransformerBlock": oracles_authors.LTXBlock,
    "LDMTransformerBlock": oracles_authors.LDMBlock,
    "LuminaJointTransformerBlock": oracles_lumina.JointTransformerBlock,
    "LuminaJointRefinerBlock": lambda: oracles_lumina.JointTransformerBlock(modulation=False),
    "OriginalZImageTransformerBlock": oracles_lumina.ZImageTransformerBlock,
    "OriginalZImageRefinerBlock": lambda: oracles_lumina.ZImageTransformerBlock(modulation=False),
    "MusubiZImageTransformerBlock": oracles_lumina.TrainedZImageBlock,
    "MusubiZImageRefinerBlock": lambda: oracles_lumina.TrainedZImageBlock(modulation=False),
    "AttnBlock": oracles_compvis.AttnBlock,
    "FixupBlock": lambda: eager.FixupBasicBlock(8, 8),
    "RZTXEncoderLayer": lambda: oracles_tokens.RZTXEncoderLayer(16, 2, 32, 0.0),
    "ZeroLayer": lambda: eager.zero_module(nn.Linear(8, 8)),
    "ResnetBlock2D": diffusers_block("resnet", "ResnetBlock2D", in_channels=16, groups=4, temb_channels=16),
    "ResnetBlockCondNorm2D": diffusers_block(
        "resnet", "ResnetBlockCondNorm2D", in_channels=16, groups=4, temb_channels=16, time_embedding_norm="ada_group"
    ),
    "SpatialNormResnetBlock2D": diffusers_block(
        "resnet", "ResnetBlockCondNorm2D", in_channels=32, temb_channels=4, time_embedding_norm="spatial"
    ),
    "ResidualBlock": lambda: oracles_wan.ResidualBlock(8, 16),
    "QwenImage21ResidualBlock": autoencoder_block("kl_qwenimage21", "QwenImage21ResidualBlock", 8, 16),
    "LTX2AudioResnetBlock": autoencoder_block("kl_ltx2_audio", "LTX2AudioResnetBlock", 8, 16, norm_type="pixel"),
    "DCResBlock": autoencoder_block("dc", "ResBlock", 8, 8, norm_type="rms_norm", act_fn="silu"),
    "AutoencoderTinyBlock": diffusers_block("unets.unet_2d_blocks", "AutoencoderTinyBlock", 8, 8, "relu"),
    "TemporalResnetBlock": diffusers_block("resnet", "TemporalResnetBlock", 32, temb_channels=8),
    "WanResidualBlock": autoencoder_block("kl_wan", "WanResidualBlock", 8, 16),
    "CogVideoXResnetBlock3D": autoencoder_block(
        "kl_cogvideox", "CogVideoXResnetBlock3D", 8, 8, 0.0, 0, 4, spatial_norm_dim=4
    ),
    "MochiResnetBlock3D": autoencoder_block("kl_mochi", "MochiResnetBlock3D", 32),
    "EasyAnimateResidualBlock3D": autoencoder_block(
        "kl_magvit", "EasyAnimateResidualBlock3D", 8, 16, norm_num_groups=4
    ),
    "KVAEResnetBlock2D": autoencoder_block("kl_kvae", "KVAEResnetBlock2D", in_channels=32, temb_channels=0, zq_ch=4),
    "HunyuanVideo15ResnetBlock": autoencoder_block("kl_hunyuanvideo15", "HunyuanVideo15ResnetBlock", 8, 16),
    "HunyuanVideoResnetBlockCausal3D": autoencoder_block(
        "kl_hunyuan_video", "HunyuanVideoResnetBlockCausal3D", 8, 16, groups=4
    ),
    "HunyuanImageResnetBlock": autoencoder_block("kl_hunyuanimage", "HunyuanImageResnetBlock", 32, 32),
    "CosmosResnetBlock3d": autoencoder_block("kl_cosmos", "CosmosResnetBlock3d", 8, 16),
    "LTXVideoResnetBlock3d": autoencoder_block("kl_ltx", "LTXVideoResnetBlock3d", 8, 8, timestep_conditioning=True),
    "MiniMaxH3VideoResnetBlock3d": autoencoder_block("kl_minimax_h3", "MiniMaxH3VideoResnetBlock3d", 8, 16, 4),
    "PlainTransformerBlock": diffusers_block("attention", "BasicTransformerBlock", 16, 2, 8, cross_attention_dim=12),
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
    "SanaVideoMSCamCtrlBlock": sana_wm,
    "SanaWMFinalLayer": diffusers_block("transformers.transformer_sana_wm", "T2IFinalLayer", 16, (1, 2, 2), 4),
    "WanAnimate2TransformerBlock": diffusers_block(
        "transformers.transformer_wan_animate_2", "WanAnimate2TransformerBlock", 16, 32, 2, True
    ),
    "Kandinsky6SRTransformerBlock": diffusers_block(
        "transformers.transformer_kandinsky6_sr", "Kandinsky6SRTransformerBlock", 16, 12, 32, 8
    ),
    "LTX2VideoVaeNABlock": diffusers_block(
        "autoencoders.ltx2_diffusion_decoder", "LTX2VideoVaeNABlock", 16, (3, 3, 3), 8
    ),
    "LTX2VideoVaeDiffusionNABlock": diffusers_block(
        "autoencoders.ltx2_diffusion_decoder", "LTX2VideoVaeDiffusionNABlock", 16, (3, 3, 3), 12, 8
    ),
    "ZImageFinalLayer": diffusers_block("transformers.transformer_z_image", "FinalLayer", 16, 4),
}
BLOCKS |= {name: built.make for name, built in diffusers_blocks.BLOCKS.items() if name == built.name}
