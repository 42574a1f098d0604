"""residual_norm_modulate's kernels alone: every kind of operand against fp64, mistakes planted into their sources, what
an index out of range does, and the price of partial sums."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
pytest.importorskip("ml_dtypes")

from . import traffic  # noqa: E402

traffic.install()

from zeroblock.backends import residual_norm as operands  # noqa: E402
from zeroblock.backends.reference import REFERENCE  # noqa: E402
from zeroblock.kernels import _modulation, residual_norm_modulate, residual_norm_modulate_bwd  # noqa: E402
from zeroblock.kernels._launch import recording  # noqa: E402
from zeroblock.testing import assert_error_budget, poison_empty  # noqa: E402

from ..support import ROOT  # noqa: E402
from .test_planted import mutant  # noqa: E402

B, T, D, K = 2, 21, 67, 4
KINDS = ("all", "sample", "token", "indexed")
NEEDED = operands.Needed(*[True] * 11)


def build(kind: str, rms: bool, D: int = D, dtype: torch.dtype = torch.float32, seed: int = 0):
    """(dx_new, dy, residual, branch, norm, index): everything given, each operand a view of a packed tensor."""
    generator = torch.Generator().manual_seed(seed)

    def new(*size: int, mean: float = 0.0, of: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(size, generator=generator) + mean).to(of)

    def rows() -> operands.Rows:
        size = {"all": (), "sample": (B,), "token": (B, T), "indexed": (B, K)}[kind]
        return operands.Rows(new(*size, 3 * D)[..., D : 2 * D], new(D))

    x = [new(B, T, D, of=dtype) for _ in range(4)]
    bias = None if rms else new(D)
    branch = operands.Branch(x[1], rows(), True, True, new(D, mean=1.0), 1e-6, dtype)
    norm = operands.Norm(rms, new(D, mean=1.0), bias, rows(), rows(), 1e-6, dtype)
    index = (
        torch.randint(0, K - 1, (B, T), generator=generator).int() if kind == "indexed" else None
    )  # one has no token
    return x[2], x[3], x[0], branch, norm, index


def wide(part):
    """fp64 of a tensor or of the named tuples of operands."""
    if isinstance(part, Tensor):
        return part.double() if part.is_floating_point() else part
    if isinstance(part, tuple):
        found = tuple(wide(v) for v in part)
        return type(part)(*found) if hasattr(part, "_fields") else found
    return torch.float64 if isinstance(part, torch.dtype) else part


def of_kernels(branch, norm):
    def rows(v):
        return _modulation.Rows(*v)

    return (
        None if branch is None else _modulation.Branch(*branch._replace(gate=rows(branch.gate))),
        None if norm is None else _modulation.Norm(*norm._replace(shift=rows(norm.shift), scale=rows(norm.scale))),
    )


def judge(call, forward=residual_norm_modulate, backward=residual_norm_modulate_bwd, factor: float = 4.0) -> None:
    """Both passes against fp64, accesses out of bounds, races, and the same bits again. y and the gradients are those
    of x_new as it is stored."""
    dx_new, dy, residual, branch, norm, index = call
    parts, dtype = of_kernels(branch, norm), residual.dtype
    with poison_empty(), traffic.record() as recorded:
        x_new, y, *stats = forward.forward(residual, *parts, index)
        arguments = (dx_new, dy, x_new, *stats, *parts, index, dtype, NEEDED)
        got = backward.backward(*arguments)
    assert not recorded.problems, recorded.problems[0]
    added = REFERENCE.residual_norm_modulate(residual, branch, None, index)
    exact = REFERENCE.residual_norm_modulate(*wide((residual, branch)), None, index)
    assert_error_budget(x_new, added.x_new, exact.x_new, "x_new")
    normed = REFERENCE.residual_norm_modulate(x_new, None, norm, index)
    exact_normed = REFERENCE.residual_norm_modulate(x_new.double(), None, wide(norm), index)
    assert_error_budget(y, normed.y, exact_normed.y, "y", factor=factor)
    moments = exact_normed.stats._replace(branch_rstd=exact.stats.branch_rstd)
    eager = REFERENCE.residual_norm_modulate_bwd(
        dx_new, dy, x_new, operands.Stats(*stats), branch, norm, index, dtype, NEEDED
    )
    exact = REFERENCE.residual_norm_modulate_bwd(
        *wide((dx_new, dy, x_new)), moments, *wide((branch, norm)), index, torch.float64, NEEDED
    )
    for name, mine, theirs, best in zip(NEEDED._fields, got, eager, exact, strict=True):
        assert (mine is None) == (best is None), name
        if mine is not None:
            assert_error_budget(mine, theirs, best, name, factor=factor)
    for mine, again in zip(got, backward.backward(*arguments), strict=True):
        assert mine is None or torch.equal(mine, again)


@pytest.mark.parametrize("rms", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_operand(kind, rms):
    judge(build(kind, rms))


@pytest.mark.parametrize("kind", ("sample", "indexed"))
def test_fp32_operands_of_bf16_rows(kind):
    judge(build(kind, False, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", ("sample", "indexed"))
def test_rows_in_two_parts(kind):
    judge(build(kind, True, D=700))


def test_long_rows_take_two_passes():
    """The norm's, then the branch's, where registers are too few for both."""
    call = build("sample", False, D=4112)
    with recording() as launches:
        judge(call)
    assert [launch.kernel.__name__ for launch in launches].count("_backward") == 4  # backward ran twice


@pytest.mark.parametrize("i", range(11))
def test_a_gradient_alone_is_the_same(i):
    dx_new, dy, residual, branch, norm, index = build("indexed", False)
    parts = of_kernels(branch, norm)
    x_new, _, *stats = residual_norm_modulate.forward(residual, *parts, index)
    back, rest = residual_norm_modulate_bwd.backward, (dx_new, dy, x_new, *stats, *parts, index, residual.dtype)
    every, alone = back(*rest, NEEDED), back(*rest, [j == i for j in range(11)])
    assert torch.equal(every[i], alone[i])


MISTAKES = {
    "row of sample 0": ("forward", "shared_row(shift, shift_table, b,", "shared_row(shift, shift_table, 0,", "sample"),
    "row at a chunk's border": ("backward", "chunk * steps + step", "chunk + step", "indexed"),
    "index of sample 0": ("forward", "index_of(index, b, t,", "index_of(index, 0, t,", "indexed"),
    "forward without tanh": ("forward", "d, mask, GATE), TANH)", "d, mask, GATE), False)", "sample"),
    "dropped branch weight": ("forward", "h *= vector(branch_weight", "_ = vector(branch_weight", "all"),
    "y of x_new as computed": ("forward", "(x.to(tl.float32) + h).to(x_new.dtype.element_ty)", "x + h", "bf16"),
    "dropped tanh'": ("backward", "product *= 1.0 - z * z", "product *= 1.0", "token"),
    "norm of the branch not differentiated": (
        "backward",
        "v = row_norm_grad((v,), (h,),",
        "v = row_norm_grad((v,), (0 * h,),",
        "all",
    ),
    "dropped branch weight in backward": (
        "backward",
        "v *= cached_row(branch_weight",
        "_ = cached_row(branch_weight",
        "all",
    ),
    "gate of the wrong sample": (
        "backward",
        "shared_row(gate, gate_table, b,",
        "shared_row(gate, gate_table, 0,",
        "sample",
    ),
    "sum not carried over": ("backward", "sum_uxhat += u", "sum_uxhat = u", "indexed"),
    "sum of two rows": ("backward", "tl.where(ends, 0.0, total)", "total", "indexed"),
    "slot without its row": ("backward", "slot += current", "slot += 0", "indexed"),
    "tokens not in order": ("backward", "tl.load(order + row)", "tl.minimum(t, T - 1)", "indexed"),
    "index of sample 0 in backward": ("backward", "index_of(index, b, t,", "index_of(index, 0, t,", "indexed"),
    "dx_new forgotten": ("backward", "dx += tl.load(dx_new", "_ = tl.load(dx_new", "all"),
    "table counted once per token": (
        "sums",
        "_stored(dshift, all_dshift, dy,",
        "_stored(dshift, all_dshift, dy * 21,",
        "all",
    ),
    "scale's bias term": ("sums", ".to(tl.float32) * dy", ".to(tl.float32) * 0", "sample"),
    "tanh' of a sample's gate": ("sums", "grad *= 1.0 - z * z", "grad *= 1.0", "sample"),
    "gain without its table": ("sums", "if table is not None:", "if False:", "sample"),
    "rows without tokens": ("sums", "tl.where(end > begin, ", "tl.maximum(1, ", "indexed"),
    "branch weight without the gate": ("sums", "z * vhhat", "vhhat", "sample"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_caught(name, tmp_path, monkeypatch):
    where, old, new, kind = MISTAKES[name]
    forward, backward = residual_norm_modulate, residual_norm_modulate_bwd
    module = importlib.import_module(residual_norm_modulate_bwd.__package__ + ".residual_norm_modulate_sums")
    if where == "forward":
        forward = mutant(forward, tmp_path, old, new)
    elif where == "backward":
        backward = mutant(backward, tmp_path, old, new)
    else:
        monkeypatch.setattr(backward, "finish", mutant(module, tmp_path, old, new).finish)
    call = build("all" if kind == "bf16" else kind, False)
    if kind == "bf16":  # whose rounding shows in an fp32 y
        *rest, norm, index = build("all", False, dtype=torch.bfloat16)
        call = (*rest, norm._replace(dtype=torch.float32), index)
    with pytest.raises(AssertionError):
        judge(call, forward, backward)


def test_an_index_out_of_range_takes_the_nearest_row():
    """Nothing outside is read or written, forward and backward."""
    dx_new, dy, residual, branch, norm, index = build("indexed", False)
    far = index.clone()
    far[0, 3], far[1, 20] = -7, K + 1000
    near, parts = far.clamp(0, K - 1), of_kernels(branch, norm)

    def run(index):
        with poison_empty(), traffic.record() as recorded:
            x_new, y, *stats = residual_norm_modulate.forward(residual, *parts, index)
            grads = residual_norm_modulate_bwd.backward(
                dx_new, dy, x_new, *stats, *parts, index, residual.dtype, NEEDED
            )
        assert not recorded.problems, recorded.problems[0]
        return x_new, y, *grads

    for a, b in zip(run(far), run(near), strict=True):
        assert torch.equal(a, b)


DEBUG = """
import torch
from tests.triton import test_residual_norm as t
_, _, residual, branch, norm, index = t.build("indexed", False)
index[0, 3] = t.K
t.residual_norm_modulate.forward(residual, *t.of_kernels(branch, norm), index)
"""


def test_debug_mode_stops_at_an_index_out_of_range():
    env = os.environ | {"ZEROBLOCK_DEBUG": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", DEBUG]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert done.returncode and "index out of range" in done.stderr, done.stderr


@pytest.mark.parametrize("kind", ("sample", "indexed"))
@pytest.mark.parametrize(("T", "D"), [(27280, 3072), (32760, 1536), (1_000_000, 128)])
def test_partial_sums_are_a_few_percent(kind, T, D):
    """Written and read once, beside six tensors of 16 bits: at most 3 %, and 65 indexed rows do not change that."""

    def new(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, stat = new(1, T, D), new(1, T, dtype=torch.float32)
    size, index = ((1, D), None) if kind == "sample" else ((1, 65, D), new(1, T, dtype=torch.int32))
    v = _modulation.Rows(new(*size, dtype=torch.float32), new(D, dtype=torch.float32))
    branch = _modulation.Branch(x, v, False, False, None, 1e-6, x.dtype)
    norm = _modulation.Norm(False, None, None, v, v, 1e-6, x.dtype)
    with recording(run=False) as launches:
        residual_norm_modulate_bwd.backward(x, x, x, stat, stat, None, branch, norm, index, x.dtype, NEEDED)
    parts = [t for name, t in launches[0].arguments.items() if name.startswith("part_") and t is not None]
    assert len(parts) == 3 and launches[0].grid[0] >= 256
    assert 2 * sum(t.nbytes for t in parts) <= 0.03 * 6 * x.nbytes
