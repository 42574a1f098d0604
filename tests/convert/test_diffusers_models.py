"""Whole models of diffusers, accelerated, against themselves: outputs, gradients, training, what is skipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.convert import proof as _proof
from zeroblock.convert.families import diffusers_adaln, known

from .model_cases import Case, check, evaluate, normal, rows, three_tests

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
CONDITIONED = {
    **UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}


def conditions(g):
    return {"timestep": torch.tensor([3, 7]), "encoder_hidden_states": normal(g, 2, 3, 12)}


class Controlled(nn.Module):
    """A U-Net and its ControlNet."""

    def __init__(self, **options):
        super().__init__()
        self.unet = diffusers.UNet2DConditionModel(
            **CONDITIONED, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options
        )
        self.control = diffusers.ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=(4, 8))

    def forward(self, sample, timestep, encoder_hidden_states, controlnet_cond, **options):
        down, mid = self.control(sample, timestep, encoder_hidden_states, controlnet_cond, return_dict=False, **options)
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        )


def _controlled_inputs(g):
    return {"sample": normal(g, 2, 4, 8, 8), "controlnet_cond": normal(g, 2, 3, 16, 16), **conditions(g)}


def _dit():
    return diffusers.DiTTransformer2DModel(2, 8, 4, num_layers=2, sample_size=4, num_embeds_ada_norm=10)


def _sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=4,
    )


def _flux():
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )


def flux_inputs(g):
    return {
        "hidden_states": normal(g, 2, 4, 4),
        "encoder_hidden_states": normal(g, 2, 3, 12),
        "pooled_projections": normal(g, 2, 10),
        "timestep": torch.tensor([0.1, 0.2]),
        "img_ids": torch.arange(12).view(4, 3),
        "txt_ids": torch.zeros(3, 3, dtype=torch.long),
    }


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=4,
            sample_size=8,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, z):
        return self.decoder(self.post_quant_conv(z))


def _grounded(g):
    boxes = {"boxes": normal(g, 2, 3, 4), "masks": torch.ones(2, 3), "positive_embeddings": normal(g, 2, 3, 12)}
    return {"sample": normal(g, 2, 4, 8, 8), **conditions(g), "cross_attention_kwargs": {"gligen": boxes}}


def _motion():
    return diffusers.UNetMotionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        num_attention_heads=2,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        motion_num_attention_heads=2,
        motion_max_seq_length=4,
    )


_CONV2 = (("*.conv2.weight", 0, 1),)
MODELS = {
    "unet": Case(
        lambda: diffusers.UNet2DModel(
            **UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
        ),
        lambda g: {"sample": normal(g, 2, 3, 8, 8), "timestep": torch.tensor([3, 7])},
        _CONV2,
        {"ResnetBlock2D": 8},
    ),
    "unet-controlnet": Case(
        Controlled,
        _controlled_inputs,
        _CONV2 + (("control.controlnet_*_block*weight", 0, 1), ("control.controlnet_cond_embedding.conv_out.*", 0, 1)),
        {"ResnetBlock2D": 12, "ZeroLayer": 6},
        {"ResnetBlock2D": 8, "ControlNetModel": 1},
    ),
    "dit": Case(
        _dit,
        lambda g: {
            "hidden_states": normal(g, 2, 4, 4, 4),
            "timestep": torch.tensor([1, 2]),
            "class_labels": torch.tensor([0, 9]),
        },
        rows("*.norm1.linear", 2, 5, of=6) + rows("proj_out_2")[:1],
        {"BasicTransformerBlock": 4, "DiTTransformer2DModel": 1},
    ),
    "sd3": Case(
        _sd3,
        lambda g: {
            "hidden_states": normal(g, 2, 4, 4, 4),
            "encoder_hidden_states": normal(g, 2, 3, 12),
            "pooled_projections": normal(g, 2, 10),
            "timestep": torch.tensor([1, 2]),
        },
        rows("*.norm1.linear", 2, 5, of=6) + rows("*.0.norm1_context.linear", 2, 5, of=6),
        {"JointTransformerBlock": 5},
    ),
    "flux": Case(
        _flux,
        flux_inputs,
        rows("*.norm1.linear", 2, 5, of=6)
        + rows("*.norm1_context.linear", 2, 5, of=6)
        + rows("*.norm.linear", 2, of=3),
        {"FluxTransformerBlock": 3, "FluxSingleTransformerBlock": 2},
    ),
    "gligen": Case(
        lambda: diffusers.UNet2DConditionModel(
            **CONDITIONED, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_type="gated"
        ),
        _grounded,
        (("*.alpha_*", 0, 1),),
        {"GatedSelfAttentionDense": 8},
    ),
    "motion": Case(
        _motion,  # its pipeline repeats the text for every frame
        lambda g: {"sample": normal(g, 2, 4, 3, 8, 8), **conditions(g), "encoder_hidden_states": normal(g, 6, 3, 12)},
        (("*.motion_modules.*.proj_out.weight", 0, 1),),
        {"AnimateDiffTransformer3D": 7},
    ),
    "vae-decoder": Case(Decoder, lambda g: {"z": normal(g, 2, 4, 4, 4)}, _CONV2, {"ResnetBlock2D": 6}),
}


test_gradients, test_inference, test_ten_steps = three_tests(MODELS, together=True, slow=True)


def test_one_wrong_gradient_is_found(monkeypatch):
    original = diffusers_adaln.modulated
    detached = lambda norm, x, shift, scale: original(norm, x, shift.detach(), scale)  # noqa: E731
    monkeypatch.setattr(_proof, "verdict", lambda block, family: _proof.Verdict(None))
    check(MODELS["dit"], "dense", evaluate, together=True)
    monkeypatch.setattr(diffusers_adaln, "modulated", detached)
    with pytest.raises(AssertionError, match="gradients: L2 error"):
        check(MODELS["dit"], "dense", evaluate, together=True)


def test_the_proof_of_a_model_copies_one_block():
    model = diffusers.DiTTransformer2DModel(2, 8, 4, num_layers=5, sample_size=4, num_embeds_ada_norm=10)
    family = known()["DiTTransformer2DModel"]()
    assert len(family.proof_target(model).transformer_blocks) == 1 and len(model.transformer_blocks) == 5
    assert len(zb.accelerate(model).branches) == 11
