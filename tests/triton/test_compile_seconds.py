"""The committed table of what compiling takes: every kernel has its seconds, few more than half of one. Nothing is
timed here."""

import csv

import pytest

pytest.importorskip("triton")

from . import compile_seconds, static  # noqa: E402

# What takes longer, and why: a product of tiles is unrolled to thousands of instructions, in full fp32 to as many
# multiplications of each thread; smaller tiles would read operands more often. Row norms in two parts have 24 to 40
# numbers of each of several tensors in a thread.
PRODUCTS = ("conv_residual-", "group_norm_silu_conv_residual-", "linear_gate_residual-")
ROW_NORMS = (
    "layer_norm_modulate-",
    "rms_norm_modulate-",
    "gate_residual_layer_norm_modulate-",
    "residual_norm_modulate",
)
GROUP_NORMS = ("group_norm_silu-", "group_norm_silu_bwd-")


def most(case: str) -> float:
    limits = {GROUP_NORMS: 2.0, PRODUCTS: 1.0, ROW_NORMS: 0.75}
    return next((seconds for cases, seconds in limits.items() if case.startswith(cases)), 0.5)


def test_every_kernel_has_its_seconds():
    with static.TABLE.open(newline="") as file:
        compiled = {(row["case"], row["kernel"]) for row in csv.DictReader(file) if row["target"] == "sm_90"}
    assert set(compile_seconds.read()) == compiled, "run python -m tests.triton.compile_seconds"


def test_few_kernels_take_more_than_half_a_second():
    taken = compile_seconds.read()
    slow = {key: every for key, every in taken.items() if not every or max(every) > most(key[0])}
    assert not slow
    every = [one for kernel in taken.values() for one in kernel]
    assert sum(every) / len(every) < 0.4
