"""Zero by convention: the parameters that the published code of a family of models starts at zero, by the class that
holds them. Where such a parameter is not zero the model was trained, or its zero initialisation was forgotten or
overwritten, as by a loop that initialises every linear layer afterwards; which of the two only its owner knows."""

from __future__ import annotations

import fnmatch

from torch import nn

# Class: the parameters, relative to it, and whose code says so.
CONVENTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "DiTBlock": (("adaLN_modulation.1.*", "attn_norm.linear.*"), "facebookresearch/DiT, SWivid/F5-TTS"),
    "FinalLayer": (("linear.*", "adaLN_modulation.1.*"), "facebookresearch/DiT"),
    "DiT": (("norm_out.linear.*", "proj_out.*"), "SWivid/F5-TTS"),
    "ResBlock": (("out_layers.3.*", "adaLN_modulation.1.*"), "openai/guided-diffusion, LTH14/mar"),
    "AttentionBlock": (("proj_out.*",), "openai/guided-diffusion"),
    "SpatialTransformer": (("proj_out.*",), "CompVis/latent-diffusion"),
    "UNetModel": (("out.2.*",), "openai/guided-diffusion"),
    "ControlNet": (("zero_convs.*", "middle_block_out.*"), "lllyasviel/ControlNet"),
    "ControlNetModel": (
        ("controlnet_down_blocks.*", "controlnet_mid_block.*", "controlnet_cond_embedding.conv_out.*"),
        "huggingface/diffusers",
    ),
    "GatedSelfAttentionDense": (("alpha_attn", "alpha_dense"), "gligen/GLIGEN"),
    "FixupBasicBlock": (("conv2.weight",), "hongyi-zhang/Fixup"),
    "FixupBottleneck": (("conv3.weight",), "hongyi-zhang/Fixup"),
}


def expected_zero(model: nn.Module, zero: dict[str, bool]) -> dict[str, str]:
    """{parameter: "class, whose code"} of those that a fresh model of their family has at zero, and this one has not.

    zero: whether each parameter of the model is, by name. A class of one of these names without such parameters is
    another one.
    """
    found: dict[str, str] = {}
    for path, m in model.named_modules():
        paths, source = CONVENTIONS.get(type(m).__name__, ((), ""))
        for name, _ in m.named_parameters() if paths else ():
            whole = f"{path}.{name}" if path else name
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in paths) and not zero.get(whole, True):
                found[whole] = f"{type(m).__name__}, {source}"
    return found
