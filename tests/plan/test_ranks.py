"""Plans under torch.distributed: nothing is measured with more than one rank, and `share_plans` makes ranks alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import zeroblock as zb
from zeroblock.plan import planned as _plan

from ..convert.ranks import run_on_two_ranks
from .cases import BIG, FakeTimer, chosen, double, never, x3, x4

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@needs_gloo
def test_ranks_with_different_choices_compute_alike_after_share_plans(tmp_path):
    run_on_two_ranks(Path(__file__).with_name("ranks_worker.py"), tmp_path)


@pytest.fixture
def op():
    with double() as planned:
        planned.rule = lambda x, work: "picky"
        yield planned


def test_nothing_is_measured_with_more_than_one_rank(op, monkeypatch, tmp_path):
    with _plan.use(timer=FakeTimer(fast=0.5), directory=tmp_path):
        assert chosen(op, x4) == "fast"
    monkeypatch.setattr(_plan, "_ranks", lambda: 2)
    with _plan.use(timer=never, directory=tmp_path):
        assert chosen(op, x4) == "fast", "stored"
        assert chosen(op, torch.ones(40)) == "picky", "the fixed rule"


def test_one_rank_measures(op, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    with _plan.use(timer=FakeTimer(fast=0.5)):
        assert chosen(op, x4) == "fast"


def test_share_plans_without_a_group_changes_nothing(op):
    with _plan.use(timer=FakeTimer(fast=0.5)):
        zb.share_plans()
        assert "first call will measure" in op.explain(x4, BIG).why and chosen(op, x4) == "fast"


def test_a_shared_choice_of_no_way_here_is_the_fixed_rules(op):
    """Machines differ in what they have; `picky` does not take an odd size."""
    with _plan.use(timer=never):
        what, _, who = op._situation(op.takers(x3, BIG), x3, BIG)
        _plan.adopt({_plan.SEPARATOR.join((what, who)): "picky"})
        assert chosen(op, x3) == "library"
        _plan.adopt({_plan.SEPARATOR.join((what, who)): "fast"})
        assert chosen(op, x3) == "fast", "adopted choices take the place of what was remembered"


def test_rank_0_shares_what_it_stored_for_its_own_place(op):
    from zeroblock.plan import share

    threads = torch.get_num_threads()
    with _plan.use(timer=FakeTimer(fast=0.5)):
        assert chosen(op, x4) == "fast"
        assert set(share._choices_here().values()) == {"fast"}
        torch.set_num_threads(threads + 1)
        try:
            assert not share._choices_here()
        finally:
            torch.set_num_threads(threads)
    with _plan.use("fixed", timer=never):
        assert not share._choices_here()
