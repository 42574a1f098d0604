"""openai/guided-diffusion's blocks accelerated: the same forward, gradients and training as the blocks themselves."""

import pytest
import torch

from zeroblock.testing import eager

from .convert_cases import Case, assert_drop_in

IMAGE, EMB = (2, 32, 6, 6), (2, 16)


def resblock(dropout=0.0, **options):
    checkpoint = options.get("use_checkpoint", False)
    return Case(
        lambda: eager.ResBlock(32, 16, dropout, **options),
        lambda: (torch.randn(2, 32, *[4] * options.get("dims", 2)), torch.randn(EMB)),
        {"guided-resblock": 1 + checkpoint},
        1,
        skipped_inference={"guided-resblock": 1},
    )


CASES = {
    "add": resblock(),
    "film": resblock(use_scale_shift_norm=True),
    "1x1": resblock(out_channels=64),
    "3x3": resblock(out_channels=64, use_conv=True),
    "up": resblock(up=True, use_scale_shift_norm=True),
    "down": resblock(down=True),
    "dropout": resblock(0.3, use_scale_shift_norm=True),
    "1-D": resblock(dims=1),
    "3-D": resblock(dims=3),
    "checkpoint": resblock(use_checkpoint=True),
}


@pytest.mark.parametrize("name", CASES)
def test_drop_in(name):
    assert_drop_in(CASES[name])
