"""Drop-in modules: same constructors, parameter names and gradients as the blocks they stand for, zero branches
skipped."""

from ..blocks.layers import register_own_package
from .dit import Attention, DiTBlock, FinalLayer, Mlp
from .fixup import FixupBasicBlock, FixupBottleneck
from .resblock import GroupNorm32, ResBlock
from .residual import ResidualBranch, ReZero
from .video import CausalConv3d, ChannelRMSNorm, VideoResBlock
from .zero_layers import ZeroConv1d, ZeroConv2d, ZeroConv3d, ZeroLinear

__all__ = [
    "Attention",
    "CausalConv3d",
    "ChannelRMSNorm",
    "DiTBlock",
    "FinalLayer",
    "FixupBasicBlock",
    "FixupBottleneck",
    "GroupNorm32",
    "Mlp",
    "ReZero",
    "ResBlock",
    "ResidualBranch",
    "VideoResBlock",
    "ZeroConv1d",
    "ZeroConv2d",
    "ZeroConv3d",
    "ZeroLinear",
]

register_own_package(__name__)
