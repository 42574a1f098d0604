"""Mistakes planted in residual_norm_modulate: the cases of `test_parity.py` must not pass with them."""

import pytest
import torch

from zeroblock.backends.reference import REFERENCE
from zeroblock.backends.residual_norm import Rows
from zeroblock.testing import use_backend
from zeroblock.testing.cases import CASES
from zeroblock.testing.parity import assert_parity

CASE = {case.variant: case for case in CASES if case.op == "residual_norm_modulate"}


def _of_operands(change):
    """Forward and backward with other operands: change(branch, norm, index)."""

    def forward(right, residual, branch, norm, index):
        return right(residual, *change(branch, norm, index))

    def backward(right, dx_new, dy, x, stats, branch, norm, index, *rest):
        return right(dx_new, dy, x, stats, *change(branch, norm, index), *rest)

    return forward, backward


def _forward(change):
    def forward(right, residual, branch, norm, index):
        return right(residual, *change(branch, norm, index))

    return forward, None


def _gradients(change):
    """change(gradients, branch, index)"""

    def backward(right, dx_new, dy, x, stats, branch, norm, index, *rest):
        return change(right(dx_new, dy, x, stats, branch, norm, index, *rest), branch, index)

    return None, backward


def _stats(change):
    def backward(right, dx_new, dy, x, stats, *rest):
        return right(dx_new, dy, x, change(stats), *rest)

    return None, backward


def _border(rows):
    """The last token of each sample (a frame) takes the row of the next one."""
    per_token = rows.rows[:, None].repeat(1, 4, 1)
    per_token[:, -1] = rows.rows.roll(-1, 0)
    return Rows(per_token, rows.table)


def _row_lost(grad, branch, index):
    """The last row that tokens chose, as one that is not flushed at the end of a chunk."""
    shift = grad.shift.clone()
    shift[:, -1] = 0
    return grad._replace(shift=shift)


def _without_slope(right, dx_new, dy, x, stats, branch, norm, *rest):
    """tanh of the gate, but not the slope of tanh in its gradient."""
    flat = branch._replace(gate=Rows(branch.gate.rows.tanh(), None), tanh=False)
    grads = right(dx_new, dy, x, stats, branch, norm, *rest)
    return grads._replace(gate=right(dx_new, dy, x, stats, flat, norm, *rest).gate)


PLANTED = {
    "index of sample 0": ("index", _of_operands(lambda b, n, i: (b, n, i[:1].expand_as(i)))),
    "index of the token before": ("index", _of_operands(lambda b, n, i: (b, n, i.roll(1, 1)))),
    "gradient of sample 0's index": (
        "index",
        (None, lambda right, *a: right(*a[:6], a[6][:1].expand_as(a[6]), *a[7:])),
    ),
    "row at a frame border": ("frames", _forward(lambda b, n, i: (b, n._replace(scale=_border(n.scale)), i))),
    "table of the scale left out": ("tables", _forward(lambda b, n, i: (b, n._replace(scale=Rows(n.scale.rows)), i))),
    "table of the gate left out": ("tables", _forward(lambda b, n, i: (b._replace(gate=Rows(b.gate.rows)), n, i))),
    "table's gradient once per sample": ("tables", _gradients(lambda g, b, i: g._replace(shift_table=g.shift[0]))),
    "table's gradient of the gate twice": (
        "per-token-tables",
        _gradients(lambda g, b, i: g._replace(gate_table=2 * g.gate_table)),
    ),
    "last row not flushed": ("index", _gradients(_row_lost)),
    "slope of tanh dropped": ("tanh-rms", (None, _without_slope)),
    "tanh dropped": ("tanh-rms", _of_operands(lambda b, n, i: (b._replace(tanh=False), n, i))),
    "branch weight's gradient of the branch itself": (
        "tanh-rms",
        _gradients(lambda g, b, i: g._replace(branch_weight=g.branch_weight * b.weight)),
    ),
    "branch norm left out of backward": ("tanh-rms", _stats(lambda s: s._replace(branch_rstd=None))),
    "gradient of x_new that reaches it directly": ("tables", (None, lambda right, dx_new, *a: right(None, *a))),
    "gradients of the two scales exchanged": ("index", _gradients(lambda g, b, i: g._replace(shift=g.scale))),
    "eps of the norm": ("affine-ungated", _forward(lambda b, n, i: (b, n._replace(eps=1e-1), i))),
    "bias not scaled": ("affine-ungated", _forward(lambda b, n, i: (b, n._replace(bias=n.bias * 2), i))),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistake_is_found(monkeypatch, mistake):
    variant, (forward, backward) = PLANTED[mistake]
    for name, planted in (("residual_norm_modulate", forward), ("residual_norm_modulate_bwd", backward)):
        if planted is not None:
            right = getattr(REFERENCE, name)
            monkeypatch.setattr(REFERENCE, name, lambda *a, r=right, p=planted: p(r, *a))
    with use_backend("reference"), pytest.raises(AssertionError, match="error|budget"):
        assert_parity(CASE[variant], torch.float32)


def test_nothing_planted_passes():
    with use_backend("reference"):
        for variant in {variant for variant, _ in PLANTED.values()}:
            assert_parity(CASE[variant], torch.float32)
