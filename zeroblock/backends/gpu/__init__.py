"""The GPU's backend: every step planned between the library's kernels, Triton's and CUDA C++'s."""
