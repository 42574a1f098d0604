"""Group whole: models end to end, a small ADM U-Net and DiT-S/2. Ours with eager blocks against zeroblock's, and those
of diffusers as they are against `zb.accelerate`. No weight is zero.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import zeroblock as zb
from zeroblock.testing import eager
from zeroblock.tools import models

from .case import MODES, Case, Work, module_work

try:
    import diffusers
except ImportError:
    diffusers = None

SIDES = ("eager", "zeroblock")
FROZEN = "_frozen"  # ends the `op` of cases whose model is frozen for inference


class Fixed(nn.Module):
    """A model as a function of its images alone."""

    def __init__(self, model: nn.Module, *conditions: Tensor, **options):
        super().__init__()
        self.model, self.conditions, self.options = model, conditions, options

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x, *self.conditions, **self.options)
        return y if isinstance(y, Tensor) else y[0]


def _conditions(batch: int) -> tuple[Tensor, Tensor]:
    """Timesteps and class labels."""
    return torch.arange(10, 10 + batch), torch.arange(batch)


def _adm_unet(quick: bool, own: bool) -> tuple[nn.Module, Tensor]:
    """Three levels of 64, 128 and 192 channels on 64 x 64 images, attention at 16 x 16."""
    width, mult, size, batch = (32, (1, 2), 8, 1) if quick else (64, (1, 2, 3), 64, 2)
    model = models.UNet(zb.nn if own else eager, in_channels=3, model_channels=width, channel_mult=mult)
    return Fixed(model, *_conditions(batch)), torch.randn(batch, 3, size, size)


def _unet2d(quick: bool, own: bool) -> tuple[nn.Module, Tensor]:
    """diffusers' U-Net of the same widths and sizes."""
    widths, size, batch = ((32, 64), 8, 1) if quick else ((64, 128, 192), 64, 2)
    plain = len(widths) - 1
    model = diffusers.UNet2DModel(
        sample_size=size,
        layers_per_block=1,
        block_out_channels=widths,
        attention_head_dim=widths[-1] // 4,
        down_block_types=(*("DownBlock2D",) * plain, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *("UpBlock2D",) * plain),
    )
    return _diffusers(model, own, torch.tensor(10)), torch.randn(batch, 3, size, size)


def _dit_s2(quick: bool, own: bool) -> tuple[nn.Module, Tensor]:
    """12 blocks of 384 on the 256 patches of 32 x 32 latents."""
    heads, depth, size, batch = (2, 1, 4, 1) if quick else (6, 12, 32, 2)
    model = models.DiT(
        zb.nn if own else eager,
        image_size=size,
        in_channels=4,
        hidden_size=64 * heads,
        depth=depth,
        num_heads=heads,
        num_classes=1000,
    )
    return Fixed(model, *_conditions(batch)), torch.randn(batch, 4, size, size)


def _dit_s2_diffusers(quick: bool, own: bool) -> tuple[nn.Module, Tensor]:
    """The same as diffusers has it."""
    heads, depth, size, batch = (2, 1, 4, 1) if quick else (6, 12, 32, 2)
    model = diffusers.DiTTransformer2DModel(heads, 64, 4, num_layers=depth, sample_size=size)
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # labels dropped at random would make the two sides different work
    return _diffusers(model, own, *_conditions(batch)), torch.randn(batch, 4, size, size)


def _diffusers(model: nn.Module, own: bool, *conditions: Tensor) -> Fixed:
    if own and not zb.accelerate(model).blocks:
        raise RuntimeError("no block was accelerated")
    return Fixed(model, *conditions, return_dict=False)


MODELS = {"adm_unet": _adm_unet, "dit_s2": _dit_s2}
if diffusers is not None:
    MODELS |= {"unet2d": _unet2d, "dit_s2_diffusers": _dit_s2_diffusers}


def build(op: str, side: str, mode: str, quick: bool) -> tuple[nn.Module, Tensor]:
    """One side's model and images; both sides have the same weights, none of them zero throughout.

    op: a key of MODELS, or one with FROZEN behind it. side: one of SIDES.
    """
    torch.manual_seed(0)
    model, x = MODELS[op.removesuffix(FROZEN)](quick, side == "zeroblock")
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # the same values on every device
                parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(std=0.02, generator=generator))
    model.train(mode == "training")
    if op.endswith(FROZEN) and side == "zeroblock":
        zb.freeze(model)
    return model, x


def _work(quick: bool) -> Callable[[Case], Work]:
    def both(case: Case) -> Work:
        (plain, x), (own, _) = (build(case.op, side, case.mode, quick) for side in SIDES)
        return module_work(plain, own, (x,), case.mode)

    return both


def cases(quick: bool, group: str = "whole") -> Iterator[Case]:
    """Groups "whole" and "peak": every model, in inference also frozen; "saved": in training alone."""
    if diffusers is None:
        print("diffusers is not installed: only the models of zeroblock")
    shape = "quick" if quick else ""
    for op in MODELS:
        for mode in ("training",) if group == "saved" else MODES:
            yield Case(group, op, shape, "", "fp32", mode, _work(quick))
        if group != "saved":
            yield Case(group, op + FROZEN, shape, "", "fp32", "inference", _work(quick))
