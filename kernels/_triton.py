"""Which versions of triton the kernels compile with."""

from __future__ import annotations

import triton

from ._torch import parsed

VERSION = parsed(triton.__version__)
OLDEST = (3, 3)  # that of torch 2.7
