"""diffusers' transformer blocks that zeroblock knows by description: how each is built, small."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from zeroblock.convert.families import known

from .model_cases import Case

SIDE = 3


class Built(NamedTuple):
    """A block of diffusers' module `home`, in a folder of models where it is not among the transformers."""

    home: str
    block: str
    args: tuple = ()
    kwargs: dict[str, Any] = {}
    family: str | None = None  # where it is not the block's name

    def make(self) -> nn.Module:
        home = self.home if "." in self.home else f"models.transformers.{self.home}"
        module = pytest.importorskip(f"diffusers.{home}", reason="diffusers is not installed")
        return getattr(module, self.block)(*self.args, **self.kwargs)

    @property
    def name(self) -> str:
        return self.family or self.block

    def inputs(self, generator: torch.Generator) -> dict[str, Any]:
        """What the family's example passes and, for as many tokens, a value of each option."""
        torch.manual_seed(generator.initial_seed())
        family, block = known()[self.name](), self.make()
        names = list(inspect.signature(family.forward).parameters)[1:]
        return dict(zip(names, family.example(block, SIDE), strict=False))

    def case(self) -> Case:
        return Case(self.make, self.inputs, (), {})


def _both(home: str, prefix: str, *args: Any, **kwargs: Any) -> list[Built]:
    return [Built(home, f"{prefix}{kind}TransformerBlock", args, kwargs) for kind in ("", "Single")]


def _of(home: str, *blocks: str) -> Callable[..., list[Built]]:
    return lambda *args, **kwargs: [Built(home, block, args, kwargs) for block in blocks]


_FLUX = (16, 2, 8)
_HUNYUAN = (2, 8, 2.0)
_WAN = (24, 32, 2)
_COG = (16, 2, 8, 12)
_SANA = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 12}
_LUMINA = (16, 2, 2, 8, None, 1e-5)
_Z_IMAGE = (0, 16, 2, 2, 1e-5, True)
_LTX2 = {
    "dim": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_dim": 12,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 6,
    "audio_cross_attention_dim": 12,
}
_COSMOS = {"adaln_lora_dim": 4}
_KANDINSKY6 = (16, 12, 32, 8, 12, 12, 24, 6)

_ALL = [
    *_both("transformer_longcat_image", "LongCatImage", *_FLUX),
    *_both("transformer_bria", "Bria", *_FLUX),
    *_both("transformer_bria_fibo", "BriaFibo", *_FLUX),
    *_both("transformer_ovis_image", "OvisImage", *_FLUX),
    *_both("transformer_chroma", "Chroma", *_FLUX),
    *_both("transformer_flux2", "Flux2", *_FLUX),
    *_of("transformer_flux3", "Flux3ModeTransformerBlock", "Flux3SingleTransformerBlock")(*_FLUX),
    *_both("transformer_hunyuan_video", "HunyuanVideo", *_HUNYUAN),
    *_both("transformer_hunyuan_video", "HunyuanVideoTokenReplace", *_HUNYUAN),
    *_of("transformer_hunyuan_video", "HunyuanVideoIndividualTokenRefinerBlock")(2, 8),
    *_of("transformer_hunyuan_video15", "HunyuanVideo15TransformerBlock")(*_HUNYUAN),
    *_of("transformer_hunyuan_video15", "HunyuanVideo15IndividualTokenRefinerBlock")(2, 8),
    *_both("transformer_hunyuanimage", "HunyuanImage", *_HUNYUAN),
    *_of("transformer_hunyuanimage", "HunyuanImageIndividualTokenRefinerBlock")(2, 8),
    *_both("transformer_motif_video", "MotifVideo", *_HUNYUAN),
    *_of("transformer_motif_video", "MotifVideoSingleTransformerBlock")(*_HUNYUAN, enable_text_cross_attention=True),
    *_of("transformer_qwenimage", "QwenImageTransformerBlock")(*_FLUX),
    *_of("transformer_qwenimage", "QwenImageTransformerBlock")(*_FLUX, zero_cond_t=True),
    *_of("transformer_cogview3plus", "CogView3PlusTransformerBlock")(*_COG),
    *_of("transformer_cogview4", "CogView4TransformerBlock")(*_COG),
    *_of("transformer_glm_image", "GlmImageTransformerBlock")(*_COG),
    *_of("cogvideox_transformer_3d", "CogVideoXBlock")(*_COG),
    *_of("consisid_transformer_3d", "ConsisIDBlock")(*_COG),
    *_of("transformer_easyanimate", "EasyAnimateTransformerBlock")(*_COG),
    *_of("transformer_easyanimate", "EasyAnimateTransformerBlock")(*_COG, is_mmdit_block=False),
    *_of("transformer_joyimage", "JoyImageTransformerBlock")(*_FLUX),
    *_of("transformer_joyimage_edit_plus", "JoyImageEditPlusTransformerBlock")(*_FLUX),
    *_both("transformer_hidream_image", "HiDreamImage", *_FLUX, num_routed_experts=0),
    *_of("transformer_wan", "WanTransformerBlock")(*_WAN, cross_attn_norm=True),
    *_of("transformer_wan", "WanTransformerBlock")(*_WAN),
    *_of("transformer_skyreels_v2", "SkyReelsV2TransformerBlock")(*_WAN, cross_attn_norm=True),
    *_of("transformer_wan_vace", "WanVACETransformerBlock")(
        *_WAN, cross_attn_norm=True, apply_input_projection=True, apply_output_projection=True
    ),
    *_of("transformer_anyflow", "AnyFlowTransformerBlock")(*_WAN, cross_attn_norm=True),
    *_of("transformer_helios", "HeliosTransformerBlock")(*_WAN, cross_attn_norm=True, guidance_cross_attn=True),
    *_of("ace_step_transformer", "AceStepTransformerBlock")(16, 2, 1, 8, 32),
    *_of("transformer_ltx", "LTXVideoTransformerBlock")(*_COG),
    *_of("transformer_ltx2", "LTX2VideoTransformerBlock")(**_LTX2),
    *_of("transformer_ltx2", "LTX2VideoTransformerBlock")(
        **_LTX2, video_cross_attn_adaln=True, audio_cross_attn_adaln=True
    ),
    *_of("sana_transformer", "SanaTransformerBlock")(*_FLUX, **_SANA),
    *_of("transformer_sana_video", "SanaVideoTransformerBlock")(*_FLUX, **_SANA),
    *_of("transformer_allegro", "AllegroTransformerBlock")(24, 2, 12, cross_attention_dim=12),
    *_of("transformer_longcat_audio_dit", "AudioDiTBlock")(16, 12, 2, 8),
    *_of("transformer_longcat_audio_dit", "AudioDiTBlock")(16, 16, 2, 8, cross_attn_norm=True, adaln_type="local"),
    *_of("transformer_krea2", "Krea2TransformerBlock")(16, 32, 2, 1, 1e-5),
    *_of("transformer_lumina2", "Lumina2TransformerBlock")(*_LUMINA),
    Built("transformer_lumina2", "Lumina2TransformerBlock", _LUMINA, {"modulation": False}, "Lumina2RefinerBlock"),
    *_of("lumina_nextdit2d", "LuminaNextDiTBlock")(*_LUMINA, True, 12),
    *_of("transformer_z_image", "ZImageTransformerBlock")(*_Z_IMAGE),
    Built("transformer_z_image", "ZImageTransformerBlock", _Z_IMAGE, {"modulation": False}, "ZImageRefinerBlock"),
    *_of("transformer_ideogram4", "Ideogram4TransformerBlock")(16, 32, 2, 1e-5, 12),
    *_of("transformer_mochi", "MochiTransformerBlock")(*_COG),
    Built("transformer_mochi", "MochiTransformerBlock", _COG, {"context_pre_only": True}, "MochiLastBlock"),
    Built(
        "hunyuan_transformer_2d", "HunyuanDiTBlock", (16, 2, 12), {"activation_fn": "gelu-approximate", "skip": True}
    ),
    *_of("transformer_nucleusmoe_image", "NucleusMoEImageTransformerBlock")(*_FLUX, joint_attention_dim=12),
    *_of("transformer_sd3", "SD3SingleTransformerBlock")(*_FLUX),
    *_of("transformer_prx", "PRXBlock")(16, 2),
    *_of("transformer_cosmos", "CosmosTransformerBlock")(2, 8, 12, **_COSMOS),
    *_of("transformer_cosmos", "CosmosTransformerBlock")(2, 8, 12, **_COSMOS, before_proj=True, after_proj=True),
    *_of("transformer_cosmos", "CosmosTransformerBlock")(2, 8, 12, **_COSMOS, img_context=True),
    *_of("auraflow_transformer_2d", "AuraFlowSingleTransformerBlock", "AuraFlowJointTransformerBlock")(*_FLUX),
    *_of("transformer_kandinsky", "Kandinsky5TransformerEncoderBlock", "Kandinsky5TransformerDecoderBlock")(
        16, 12, 32, 8
    ),
    *_of("transformer_kandinsky6", "Kandinsky6TransformerEncoderBlock")(16, 12, 32, 8),
    *(
        Built("transformer_kandinsky6", "Kandinsky6FusedTransformerDecoderBlock", _KANDINSKY6, options)
        for options in ({}, {"cross_gates": True}, {"fix_modulation": True, "cross_gates": True})
    ),
    *_of("transformer_sana_wm_refiner", "SanaWMLTX2RefinerTransformerBlock")(**_LTX2),
    *_of("models.controlnets.controlnet_z_image", "ZImageControlTransformerBlock")(*_Z_IMAGE),
    *_of("models.controlnets.controlnet_z_image", "ZImageControlTransformerBlock")(*_Z_IMAGE, block_id=1),
    *_of("pipelines.ace_step.modeling_ace_step", "AceStepEncoderLayer")(16, 2, 1, 8, 32),
    *_of("models.condition_embedders.condition_embedder_anima", "AnimaTextConditionerBlock")(12, 16, 2),
    *_of("models.condition_embedders.condition_embedder_anima", "AnimaTextConditionerBlock")(
        12, 16, 2, use_self_attention=False, use_layer_norm=True
    ),
    *_of("transformer_bria_fibo2", "BriaFibo2PerceiverLayer")(24, 2, 12, 1e-5),
    *_of("models.unets.unet_i2vgen_xl", "I2VGenXLTransformerTemporalEncoder")(16, 2, 8, "gelu", ff_inner_dim=32),
    *_of("minimax_music3_rvq_depth_decoder", "MiniMaxMusic3DepthDecoderBlock")(16, 2, 32),
    *_of("models.autoencoders.autoencoder_kl_minimax_h3", "MiniMaxH3VideoTransformerBlock")(16, 2, 8),
    *_of("models.attention", "TemporalBasicTransformerBlock")(16, 16, 2, 8, 12),
    *_of("models.attention", "TemporalBasicTransformerBlock")(16, 16, 2, 8),
    *_of("models.attention", "SkipFFTransformerBlock")(16, 2, 8, 12, True, cross_attention_dim=16),
    Built(
        "transformer_2d_dreamlite",
        "BasicTransformerBlockDreamLite",
        (16, 2, 8),
        {"cross_attention_dim": 12, "use_self_attention": False},
        "PlainTransformerBlock",
    ),
    Built(
        "models.attention",
        "BasicTransformerBlock",
        (16, 2, 8),
        {"cross_attention_dim": 12, "double_self_attention": True},
        "PlainTransformerBlock",
    ),
    *_of("transformer_minimax_h3", "MiniMaxH3TransformerBlock")(16, 2, 8, 32, 12, 1e-5, 1e-5),
    *_of("transformer_minimax_h3", "MiniMaxH3TokenRefinerBlock")(16, 2, 8, 32, 1e-5, 1e-5),
    *_of("transformer_krea2", "Krea2TextFusionBlock")(16, 2, 1, 32, 1e-5),
    *_of("transformer_bria_fibo2", "BriaFibo2TransformerBlock")(24, 2, 1e-5),
    *_of("transformer_bria_fibo2", "BriaFibo2TransformerBlock")(24, 2, 1e-5, cross_attention_dim=12),
    *_of("transformer_qwenimage21", "QwenImage21TransformerBlock")(32, 2, 16),
    *_of("transformer_stable_audio3", "StableAudio3DiTBlock")(32, 12, dim_heads=16, local_add_cond_dim=5),
    *_of("transformer_minimax_music3", "MiniMaxMusic3TransformerBlock")(16, 2, 8, 32),
    *_of("transformer_omnigen", "OmniGenBlock")(16, 2, 1, 32, 1e-5),
    *_of("stable_audio_transformer", "StableAudioDiTBlock")(32, 2, 1, 16, cross_attention_dim=12),
    *_of("transformer_cosmos3", "Cosmos3VLTextMoTDecoderLayer")(16, 8, 2, 1, 32, False, 1e-5),
    *_of("transformer_ernie_image", "ErnieImageSharedAdaLNBlock")(16, 2, 32),
]
# By name, numbered where a class is built in several ways.
BLOCKS: dict[str, Built] = {}
for _built in _ALL:
    _number = sum(name.split()[0] == _built.name for name in BLOCKS)
    BLOCKS[f"{_built.name} {_number}" if _number else _built.name] = _built
