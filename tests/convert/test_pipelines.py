"""A pipeline in place of a model: every model among its components, under the component's name."""

from __future__ import annotations

import pytest
import torch

import zeroblock as zb

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")


def _pipeline():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, sample_size=16)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        num_embeds_ada_norm=10,
        norm_num_groups=2,
    )
    pipeline = diffusers.DiTPipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=diffusers.DDIMScheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _image(pipeline):
    generator = torch.Generator().manual_seed(1)
    return torch.from_numpy(
        pipeline([3], generator=generator, num_inference_steps=2, output_type="np", guidance_scale=1.0).images
    )


def test_every_model_of_a_pipeline():
    pipeline = _pipeline()
    modules = [m for c in pipeline.components.values() if isinstance(c, torch.nn.Module) for m in c.modules()]
    expected, kinds = _image(pipeline), [type(m) for m in modules]
    planned = zb.coverage(pipeline)
    assert [type(m) for m in modules] == kinds
    report = zb.accelerate(pipeline)
    assert {b.path.partition(".")[0] for b in report.branches} == {"transformer", "vae"}
    assert [b.path for b in planned.branches] == [b.path for b in report.branches]
    torch.testing.assert_close(_image(pipeline), expected, rtol=1e-4, atol=1e-5)
    assert zb.restore(pipeline) == report.blocks > 0 and [type(m) for m in modules] == kinds


def test_what_has_no_models():
    pipeline = _pipeline()
    pipeline.transformer = torch.compile(pipeline.transformer)
    with pytest.raises(RuntimeError, match="transformer is compiled"):
        zb.accelerate(pipeline)
    with pytest.raises(TypeError, match="a pipeline with modules among its components, got DDIMScheduler"):
        zb.accelerate(diffusers.DDIMScheduler())
