"""Convolutions of so few products that their choice is not looked up: the library's way, as every rule has it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

import zeroblock as zb
from zeroblock.backends.base import GroupNorm
from zeroblock.backends.select import select
from zeroblock.plan.mode import allow_reduced
from zeroblock.steps import packed
from zeroblock.steps.conv import CONV, FEW_PRODUCTS, ConvCall, unit_geometry
from zeroblock.steps.conv_bwd import CONV_BWD, ConvGradsCall
from zeroblock.steps.norm_conv import NORM_CONV, NORM_CONV_BWD, NormConvCall, NormConvGradsCall

NORM = GroupNorm(1, None, None, 1e-5, None, None, None, 0.0)


def calls_of_few_products():
    """(h, weight, padding), most of them just below the limit: square and long images, many and few channels."""
    rng = random.Random(3)
    sizes = [*itertools.product((8, 32, 48, 64, 128), (32, 64), (1, 3), (2, 3)), (32, 32, 3, 2), (29, 33, 3, 2)]
    for cin, cout, kernel, dims in sizes:
        weight = torch.empty(cout, cin, *(kernel,) * dims)
        pixels = FEW_PRODUCTS // weight.numel()
        for batch in (1, 2):
            side = max(1, round((pixels / batch) ** (1 / dims)))
            space = [side] * dims if rng.random() < 0.5 else [1] * (dims - 1) + [max(1, pixels // batch)]
            h = torch.empty(batch, cin, *space)
            if 0 < h.numel() * weight.numel() <= FEW_PRODUCTS * cin:
                yield h, weight, (kernel // 2,) * dims


@pytest.mark.parametrize("reduced", [False, True])
def test_every_rule_leaves_them_to_the_library(reduced):
    backend, seen = select("conv_residual", torch.zeros(1)), 0
    for h, weight, padding in calls_of_few_products():
        dy, moments, geometry = h.new_empty(1), h.new_empty(1), unit_geometry(padding)
        for step, call in (
            (CONV, ConvCall(backend, h, weight, None, None, geometry)),
            (NORM_CONV, NormConvCall(backend, h, NORM, weight, None, None, geometry)),
            (CONV_BWD, ConvGradsCall(backend, dy, h, weight, False, padding, (True, True, False))),
            (
                NORM_CONV_BWD,
                NormConvGradsCall(backend, dy, h, moments, moments, NORM, weight, False, padding, (True, True, False)),
            ),
        ):
            assert call.is_tiny()
            with allow_reduced(reduced):
                assert step._fixed(call) is step.library, (step.name, h.shape, weight.shape)
        seen += 1
    assert seen > 40


def test_the_limit_is_where_it_was_looked_for():
    weight, h = torch.empty(32, 32, 3, 3), torch.empty(1, 32, 4, 7)
    assert ConvCall(select("conv_residual", h), h, weight, None, None, unit_geometry((1, 1))).is_tiny()
    h = torch.empty(1, 32, 4, 8)
    assert not ConvCall(select("conv_residual", h), h, weight, None, None, unit_geometry((1, 1))).is_tiny()


def test_a_frozen_weight_is_looked_up():
    model, h = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)).eval(), torch.empty(1, 32, 4, 4)
    zb.accelerate(model)
    call = ConvCall(select("conv_residual", h), h, model[0].weight, None, None, unit_geometry((1, 1)))
    zb.freeze(model)
    assert packed.is_frozen(model[0].weight) and not call.is_tiny()
    zb.unfreeze(model)
    assert call.is_tiny()
