"""The kinds of blocks in other people's models, one file per origin."""

from __future__ import annotations

import functools
import importlib

from ..family import FAMILIES, Family

# In the order in which they are asked.
ORIGINS = (
    "compvis",
    "compvis_attention",
    "diffusers_adaln",
    "diffusers_attention",
    "diffusers_controlnet",
    "diffusers_flux",
    "diffusers_flux2",
    "diffusers_hunyuan",
    "diffusers_joint",
    "diffusers_cogview",
    "diffusers_mmdit",
    "diffusers_motion",
    "diffusers_resnet",
    "diffusers_streamed",
    "diffusers_transformer",
    "diffusers_wan",
    "diffusers_tables",
    "diffusers_ltx2",
    "diffusers_lumina",
    "diffusers_mochi",
    "diffusers_blocks",
    "diffusers_kandinsky",
    "diffusers_kandinsky6",
    "diffusers_later",
    "diffusers_latest",
    "diffusers_ungated",
    "diffusers_encoders",
    "diffusers_video",
    "dit",
    "edm",
    "edm2",
    "f5_tts",
    "fixup_rezero",
    "flux",
    "guided_diffusion",
    "hunyuan_dit",
    "hunyuan_video",
    "diffusers_frames",
    "ldm",
    "ltx",
    "lumina",
    "mar",
    "mdt",
    "peft_lora",
    "pixart",
    "timm_resnet",
    "timm_nfnet",
    "var",
    "wan",
    "wan_blocks",
    "zero_layers",
)


@functools.cache
def known() -> dict[str, type[Family]]:
    """{name: family}, registered ones too. The files are read at the first call: who never calls `accelerate` need not
    wait for them."""
    for origin in ORIGINS:
        importlib.import_module(f".{origin}", __name__)
    return FAMILIES
