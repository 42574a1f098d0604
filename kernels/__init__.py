"""Triton kernels, imported as zeroblock.kernels. One file per op; nothing here registers ops or imports zeroblock.
README.md says what is where, how the kernels are proved without a GPU, and how to add one.

A file holds the @triton.jit kernels of an op and the launchers that allocate results and pick a configuration.
Launchers start kernels through `_launch.launch(kernel, grid, num_warps=, num_stages=, **arguments)` alone, so that

  * `_launch.recording()` collects every launch (kernel, grid, arguments, options) instead of, or while, running it: the
    tests that compile ahead of time compile exactly what is shipped, and a captured sequence can be run again on
    changed memory;
  * `Launch.source()` is that launch as the JIT compiler would specialise it, a triton.compiler.ASTSource: tensors are
    16-byte aligned pointers, an int of 1 and None are constants, other ints divisible by 16 say so.

Every kernel file exports

  COMPILE_CASES: dict[str, Callable[[], object]]   name ("layer_norm_modulate-1152-bf16") -> calls the launcher on
                                                   tensors of device "meta"; to be called inside `recording(run=False)`

whose cases together contain every shipped configuration. A case whose name ends in "-unaligned" has sizes that do not
allow 16-byte accesses; in all others the large tensors must move in them. Rules of all kernels: fp32 arithmetic, int64
offsets, no float atomics.
"""

if __name__ == "kernels":
    raise ImportError(
        "this is zeroblock's source folder kernels/, not the package 'kernels': run from another directory, "
        "or with python -P"
    )
