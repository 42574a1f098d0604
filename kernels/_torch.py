"""Which versions of torch the package runs on, and what differs between them: nobody else asks for the version.

From 2.7 on everything in Python and Triton runs; from 2.10 on the native extension too, whose one file is built against
the stable ABI of 2.10 (TORCH_TARGET_VERSION in setup.py).
"""

from __future__ import annotations

import re
import threading

import torch


def parsed(version: str) -> tuple[int, ...]:
    """(2, 10) of "2.10.0a0+cu130"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


VERSION = parsed(torch.__version__)
OLDEST, OLDEST_NATIVE = (2, 7), (2, 10)

if VERSION < OLDEST:
    raise ImportError(
        f"zeroblock needs torch {OLDEST[0]}.{OLDEST[1]} or newer, and this is torch {torch.__version__}: "
        f'pip install "torch>={OLDEST[0]}.{OLDEST[1]}"'
    )

# What ops promise of strides: a compiler keeps those of the arguments. Until 2.7 only those of the traced example.
STRIDES_TAG = torch.Tag.needs_exact_strides if VERSION >= (2, 8) else torch.Tag.needs_fixed_stride_order

# Whether torch.compiler.is_exporting tells an export from a compilation; traced by 2.11 or older it is always true.
TELLS_EXPORTS = VERSION >= (2, 13)

# Whether it can be asked which hooks for saved tensors are set, and what a node of the autograd graph keeps.
TELLS_SAVED = VERSION >= (2, 11)

# aten._fused_rms_norm came with 2.8.
HAS_FUSED_RMS_NORM = VERSION >= (2, 8)


# Until 2.8 two switches say whether fp32 operands are rounded to tf32; from 2.9 on each operator has a name for it, and
# reading a switch where a name was set is an error.
if VERSION >= (2, 9):

    def conv_precision() -> str:
        """How convolutions of fp32 run on a GPU: "tf32", or anything else for full precision."""
        return torch.backends.cudnn.conv.fp32_precision

    def matmul_precision() -> str:
        """The same of matrix products."""
        return torch.backends.cuda.matmul.fp32_precision

else:

    def conv_precision() -> str:
        return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"

    def matmul_precision() -> str:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def capturing(device: torch.device) -> bool:
    """Whether calls on this device go into a CUDA graph. torch asks the current device's stream, whichever that is."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """The current stream of a device as a number; elsewhere calls of one thread follow each other."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else threading.get_ident()
