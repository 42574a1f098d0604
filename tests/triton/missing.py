"""`python -m tests.triton.missing` succeeds where there is no Triton whose interpreter the tests can repair."""

import importlib.util
import sys


def missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from zeroblock.kernels import _triton

    return None if _triton.VERSION >= (3, 6) else f"triton {_triton.VERSION} has another interpreter than 3.6 and later"


if __name__ == "__main__":
    sys.exit(0 if missing() is not None else 1)
