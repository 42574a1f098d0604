"""Which versions of triton the kernels compile with, and what differs between them."""

from __future__ import annotations

import os

import triton
from triton.language import core

from ._torch import parsed

VERSION = parsed(triton.__version__)
OLDEST = (3, 3)  # that of torch 2.7

# Until 3.4 (torch 2.8) nothing turns a function of compile-time values into one that kernels call, but their own
# library's way.
if VERSION >= (3, 5):
    constexpr_function = triton.constexpr_function
else:

    def constexpr_function(function):
        if os.environ.get("TRITON_INTERPRET") == "1":
            return function

        @core.builtin
        def call(*args, _builder=None, _semantic=None):
            return core.constexpr(function(*(core._unwrap_if_constexpr(a) for a in args)))

        return call
