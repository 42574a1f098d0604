"""The kinds of blocks in other people's models, one file per origin. Importing this registers them, in this order."""

from ..family import FAMILIES as FAMILIES

# isort: split
# isort: off
from . import (  # noqa: F401
    compvis,
    diffusers_adaln,
    diffusers_attention,
    diffusers_controlnet,
    diffusers_frames,
    diffusers_mmdit,
    diffusers_motion,
    diffusers_resnet,
    diffusers_streamed,
    diffusers_transformer,
    diffusers_video,
    dit,
    edm,
    edm2,
    f5_tts,
    fixup_rezero,
    flux,
    guided_diffusion,
    ldm,
    mar,
    mdt,
    peft_lora,
    pixart,
    timm_resnet,
    timm_nfnet,
    var,
    wan,
    zero_layers,
)
