"""Triton kernels, imported as zeroblock.kernels."""

if __name__ == "kernels":
    raise ImportError(
        "this is zeroblock's source folder kernels/, not the package 'kernels': run from another directory, "
        "or with python -P"
    )
