"""Who runs the kernels: one module per backend, chosen by `select`."""
