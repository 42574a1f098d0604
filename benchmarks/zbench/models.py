"""Group models: models of diffusers as they are and accelerated; small, with random weights, branches zero or not."""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import zeroblock as zb

from .case import MODES, Case, Side, Work

try:
    import diffusers
except ImportError:  # the other groups do not need it
    diffusers = None

# What `build(quick)` gives: a model, what it is called with, and the function from (model, *inputs) to a tensor.
Built = tuple[nn.Module, tuple[Tensor, ...], Callable[..., Tensor]]


def _unet(quick: bool) -> Built:
    """A DDPM U-Net for 32 x 32 images."""
    width, size, batch = (8, 8, 1) if quick else (128, 32, 4)
    model = diffusers.UNet2DModel(
        sample_size=size,
        layers_per_block=1 if quick else 2,
        block_out_channels=(width, 2 * width),
        norm_num_groups=4 if quick else 32,
        attention_head_dim=width // 2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    step = torch.tensor(10)
    return model, (torch.randn(batch, 3, size, size),), lambda model, x: model(x, step, return_dict=False)[0]


class _Controlled(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.unet = diffusers.UNet2DConditionModel(**options)
        self.control = diffusers.ControlNetModel.from_unet(self.unet)


def _controlled(model: _Controlled, x: Tensor, context: Tensor, hint: Tensor) -> Tensor:
    step = torch.tensor(10)
    down, middle = model.control(x, step, context, hint, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return model.unet(x, step, context, **residuals, return_dict=False)[0]


def _controlnet(quick: bool) -> Built:
    """A text-conditioned latent U-Net and a fresh ControlNet of it."""
    width, size = (8, 8) if quick else (64, 32)
    model = _Controlled(
        sample_size=size,
        layers_per_block=1,
        block_out_channels=(width, 2 * width),
        cross_attention_dim=4 * width,
        norm_num_groups=4 if quick else 32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    # The default hint embedding halves its image three times.
    inputs = torch.randn(2, 4, size, size), torch.randn(2, 8, 4 * width), torch.randn(2, 3, 8 * size, 8 * size)
    return model, inputs, _controlled


def _dit(quick: bool) -> Built:
    """DiT-S/2 on 32 x 32 latents, half as deep."""
    heads, layers, size = (2, 1, 4) if quick else (6, 6, 32)
    model = diffusers.DiTTransformer2DModel(heads, 8 if quick else 64, 4, num_layers=layers, sample_size=size)
    for block in model.transformer_blocks:  # labels dropped at random would make the two sides different work
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    index = torch.tensor([10, 20])
    return model, (torch.randn(2, 4, size, size),), lambda model, x: model(x, index, index, return_dict=False)[0]


def _sd3(quick: bool) -> Built:
    """Stable Diffusion 3's transformer, four layers of 512."""
    heads, features, size = (2, 8, 4) if quick else (8, 64, 32)
    width = heads * features
    model = diffusers.SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2 if quick else 4,
        attention_head_dim=features,
        num_attention_heads=heads,
        joint_attention_dim=width,
        caption_projection_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=size,
    )
    index = torch.tensor([10, 20])
    inputs = torch.randn(2, 4, size, size), torch.randn(2, 16, width), torch.randn(2, width)
    return model, inputs, lambda model, *inputs: model(*inputs, index, return_dict=False)[0]


def _flux(quick: bool) -> Built:
    """Flux's transformer, two layers of two streams and four of one, 512 wide."""
    heads, features, tokens = (2, 16, 4) if quick else (8, 64, 256)
    width = heads * features
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1 if quick else 2,
        num_single_layers=1 if quick else 4,
        attention_head_dim=features,
        num_attention_heads=heads,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        axes_dims_rope=(features // 4, features // 4, features // 2),
    )
    step, images, texts = torch.tensor([0.1]), torch.zeros(tokens, 3), torch.zeros(16, 3)
    inputs = torch.randn(1, tokens, 16), torch.randn(1, 16, width), torch.randn(1, width)
    return model, inputs, lambda model, *inputs: model(*inputs, step, images, texts, return_dict=False)[0]


def _vae_decoder(quick: bool) -> Built:
    """The decoder of Stable Diffusion's autoencoder, narrower."""
    width, size = (8, 4) if quick else (64, 16)
    model = diffusers.AutoencoderKL(
        block_out_channels=(width, 2 * width),
        norm_num_groups=4 if quick else 32,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return model.decoder, (torch.randn(1, 4, size, size),), lambda model, z: model(z)


MODELS = {
    "unet": _unet,
    "controlnet": _controlnet,
    "dit": _dit,
    "sd3": _sd3,
    "flux": _flux,
    "vae_decoder": _vae_decoder,
}


class Zeroed(NamedTuple):
    """What makes the branches of a model zero: these of `parts` equal parts of the rows of some layers."""

    suffix: str  # of the layers' names
    indices: tuple[int, ...] = (0,)
    parts: int = 1


CONV2 = Zeroed(".conv2")
GATES, CONTEXT_GATES = Zeroed(".norm1.linear", (2, 5), 6), Zeroed(".norm1_context.linear", (2, 5), 6)
SINGLE_GATES = Zeroed(".norm.linear", (2,), 3)
ZERO = {
    "unet": (CONV2,),
    "controlnet": (),  # its zero convolutions are zero as built
    "dit": (GATES,),
    "sd3": (GATES, CONTEXT_GATES),
    "vae_decoder": (CONV2,),
    "flux": (GATES, CONTEXT_GATES, SINGLE_GATES),
}


def _fill(model: nn.Module, name: str, zero: bool) -> None:
    """No weight is zero; or, with `zero`, those of the branches' ends are."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not zero and not parameter.any():
                parameter.normal_(std=0.02)
        if not zero:
            return
        for zeroed in ZERO[name]:
            for layer in (m for path, m in model.named_modules() if path.endswith(zeroed.suffix)):
                if layer.weight.shape[0] % zeroed.parts:  # SD3's last context has no gates
                    continue
                for i in zeroed.indices:
                    layer.weight.chunk(zeroed.parts)[i].zero_()
                    layer.bias.chunk(zeroed.parts)[i].zero_()


def _build(name: str, quick: bool, zero: bool) -> Callable[[Case], Work]:
    def build(case: Case) -> Work:
        model, inputs, function = MODELS[name](quick)
        _fill(model, name, zero)
        model.train(case.mode == "training")
        own = copy.deepcopy(model)
        if not zb.accelerate(own).blocks:
            raise RuntimeError(f"no block of {name} was accelerated")
        with torch.no_grad():  # accelerate may skip whole branches from the second call on
            function(own, *inputs)
        for tensor in inputs:
            tensor.requires_grad_(case.mode == "training")
        used = _used(model, inputs, function) if case.mode == "training" else []
        sides = []
        for m in (model, own):
            parameters = dict(m.named_parameters())
            sides.append(Side(_Call(function, m), inputs, (*inputs, *(parameters[path] for path in used))))
        return Work(*sides)

    return build


class _Call:
    """function(model, *inputs) as a function of the inputs."""

    def __init__(self, function: Callable, model: nn.Module):
        self.function, self.model = function, model

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(self.model, *inputs)


def _used(model: nn.Module, inputs: tuple[Tensor, ...], function: Callable) -> list[str]:
    """The parameters that the result depends on."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    with torch.enable_grad():
        grads = torch.autograd.grad(function(model, *inputs).sum(), parameters, allow_unused=True)
    return [name for name, grad in zip(names, grads, strict=True) if grad is not None]


def cases(quick: bool, group: str = "models") -> Iterator[Case]:
    """Time (group "models") or bytes kept for backward (group "saved") of every model and state."""
    if diffusers is None:
        print("diffusers is not installed: no whole models")
        return
    for name in MODELS:
        for op, zero in ((name, False), (f"{name}_zero", True)):
            for mode in MODES if group == "models" else ("training",):
                yield Case(group, op, "", "", "fp32", mode, _build(name, quick, zero))
