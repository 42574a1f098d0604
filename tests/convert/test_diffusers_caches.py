"""What diffusers keeps from step to step, of accelerated blocks: the same results as without accelerate."""

from __future__ import annotations

import copy

import pytest
import torch

import zeroblock as zb

from .model_cases import drawn, infer, prepared
from .test_diffusers_models import MODELS, diffusers


def _caches():
    return {
        "first-block": diffusers.FirstBlockCacheConfig(threshold=0.2),
        "mag": diffusers.MagCacheConfig(num_inference_steps=3, retention_ratio=0.3, mag_ratios=[1.0] * 3),
        "taylor": diffusers.TaylorSeerCacheConfig(),
        "skip": diffusers.LayerSkipConfig(indices=[0], fqn="transformer_blocks", skip_attention=True, skip_ff=True),
    }


@pytest.mark.parametrize("first", ["accelerate", "cache"])
@pytest.mark.parametrize("cache", ["first-block", "mag", "taylor", "skip"])
def test_caches_between_steps(cache, first):
    """They look up by a block's class which of its results are the hidden states."""
    plain = prepared(MODELS["flux"], "dense").eval()
    ours = copy.deepcopy(plain)
    if first == "accelerate":
        assert zb.accelerate(ours).branches
    for model in (plain, ours):
        if cache == "skip":
            from diffusers.hooks import apply_layer_skip

            apply_layer_skip(model, _caches()[cache])
        else:
            model.enable_cache(_caches()[cache])
    if first == "cache":
        zb.accelerate(ours)
    inputs = drawn(MODELS["flux"], 1)
    with plain.cache_context("cond"), ours.cache_context("cond"):
        for _ in range(3):
            torch.testing.assert_close(infer(ours, inputs), infer(plain, inputs), rtol=1e-4, atol=1e-5)
