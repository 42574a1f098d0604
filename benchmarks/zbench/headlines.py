"""The cases that say most about a GPU, the most important first, at sizes that keep one busy."""

from collections.abc import Iterator

from .blocks import dit_case, resblock_case
from .case import QUICK_IMAGES, QUICK_TOKENS, Case, shape_text
from .ops import IMAGE_OPS, TOKEN_OPS, VIDEO_OPS, op_case

# A batch of Stable Diffusion's widest map, of DiT-XL at 512 px, of its blocks at 256 px; then as in inference of one.
# Videos: frames of an autoencoder near its pixels, and deeper.
IMAGES = ((16, 320, 64, 64), (2, 640, 32, 32))
TOKENS = ((32, 1024, 1152), (2, 4096, 3072))
BLOCKS = ((32, 256, 1152), (2, 1024, 1152))
VIDEOS = ((1, 96, 4, 240, 416), (1, 512, 4, 60, 104))
QUICK_VIDEOS = ((1, 32, 2, 4, 4),)
ROWS = (
    "layer_norm_modulate",
    "gate_residual_layer_norm_modulate",
    "gate_residual",
    "residual_norm_modulate_index",
    "residual_norm_modulate_tanh",
)


def cases(quick: bool) -> Iterator[Case]:
    """bf16, images channels-last: a training step, then inference; the large sizes of all, then the others."""
    sizes = (QUICK_IMAGES, QUICK_TOKENS, QUICK_TOKENS, QUICK_VIDEOS) if quick else (IMAGES, TOKENS, BLOCKS, VIDEOS)
    for image, rows, block, video in zip(*sizes, strict=True):
        for mode in ("training", "inference"):
            yield op_case("group_norm_silu_film", IMAGE_OPS["group_norm_silu_film"], image, "nhwc", "bf16", mode)
            for name in ROWS:
                yield op_case(name, TOKEN_OPS[name], rows, "", "bf16", mode)
            for group in ("dense", "zero"):
                zero = group == "zero"
                build = resblock_case(image, image[1], zero)
                yield Case(group, "resblock", shape_text(image), "nhwc", "bf16", mode, build)
                yield Case(group, "dit_block", shape_text(block), "", "bf16", mode, dit_case(block, zero))
            yield op_case("group_norm_silu", IMAGE_OPS["group_norm_silu"], image, "nchw", "bf16", mode)
            for name, op in VIDEO_OPS.items():
                yield op_case(name, op, video, "", "bf16", mode)
