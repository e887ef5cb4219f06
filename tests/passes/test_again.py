"""What backward makes again: the choice against brute force, budgets, pins, and its text."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autotp
from autotp.check import prepare
from autotp.cost_model.cluster import bandwidth_bound
from autotp.errors import BudgetError, PinError
from autotp.grid import as_grid
from autotp.passes import again
from autotp.passes.again import AGAIN, KEEP, NONE, peak_bytes
from autotp.passes.planning import search_plan

CLUSTER = dataclasses.replace(
    bandwidth_bound(1e9, flops_per_s=1e9), memory_bandwidth_bytes_per_s=1e9
)


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1)
        return self.norm(x).square().mean()


INPUTS = (torch.randn(8, 12, 16),)


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    return prepare(Net().train(), INPUTS, {}, "exact")


def plan_of(subject, memory_bytes=math.inf, pins=None, grid=(2, 2)):
    cluster = dataclasses.replace(CLUSTER, memory_bytes=memory_bytes)
    found = subject.program, subject.network, subject.factors
    return search_plan(*found, as_grid(grid), cluster, pins).plan


def brute_force(copies, prices, names_of, limit):
    """Return the least seconds of what is made again, over all states of all roots."""
    states = again._states(copies, names_of, {})
    kept = {root: copies.bytes_of(saved) for root, saved in copies.saved.items()}
    base = sum(n for root, n in kept.items() if root not in states)
    best = math.inf
    for words in itertools.product(*states.values()):
        state = dict(zip(states, words, strict=True))
        repeated = [r for r, w in state.items() if w == AGAIN]
        there = all(
            state.get(read, KEEP) != NONE for r in repeated for read in copies.makers[r].reads
        )
        if there and base + peak_bytes(copies, state, kept) <= limit:
            makers = [copies.makers[r] for r in repeated]
            best = min(best, sum(prices.seconds(m, copies.moves) for m in makers))
    return best


def added_s(found, copies):
    """Return the seconds that decisions and moves took on."""
    old, new = (*copies.decisions, *copies.moves), (*found.decisions, *found.moves)
    return sum(n.seconds - o.seconds for n, o in zip(new, old, strict=True))


def test_the_choice_for_given_layouts_fits_and_is_near_the_best(subject, monkeypatch):
    asked = []
    choose = again.choose
    monkeypatch.setattr("autotp.passes.planning.choose", lambda *a: asked.append(a) or choose(*a))
    free = plan_of(subject)
    copies, prices, names_of, _ = asked[0]
    every = choose(copies, prices, names_of, again.Asked(0.0))
    sizes = [every.held_bytes, free.memory.activations]
    assert sizes[0] < sizes[1]
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        limit = int(sizes[0] + share * (sizes[1] - sizes[0]))
        found = choose(copies, prices, names_of, again.Asked(limit))
        least = brute_force(copies, prices, names_of, limit)
        assert found.held_bytes <= limit
        assert least <= (cost := added_s(found, copies)) * (1 + 1e-9)
        assert cost <= 2 * least + 1e-12, (share, cost, least)  # what is there for a time


def test_nothing_is_made_again_where_all_fits(subject):
    free = plan_of(subject)
    fits = plan_of(subject, free.memory_bytes)
    for plan in (free, fits):
        assert not any(d.again for d in plan) and not any(m.again for m in plan.moves)
    assert fits.decisions == free.decisions


def test_a_budget_that_only_making_again_can_meet_is_met(subject):
    kept = {"*": {"backward": "keep"}}
    with pytest.raises(BudgetError) as refused:
        plan_of(subject, 1, kept)
    limit = refused.value.needed_bytes - 1
    with pytest.raises(BudgetError):
        plan_of(subject, limit, kept)
    plan = plan_of(subject, limit)
    assert plan.memory_bytes <= limit and any(d.again for d in plan)
    assert plan.lower_bound_s <= plan_of(subject).step_time_s <= plan.step_time_s
    assert 0 < plan.gap < 1


def test_the_smallest_plan_that_is_named_can_be_had(subject):
    with pytest.raises(BudgetError) as refused:
        plan_of(subject, 1)
    least = refused.value.needed_bytes
    assert plan_of(subject, least).memory_bytes <= least


def test_a_plan_shows_and_keeps_what_is_made_again(subject, tmp_path):
    plan = plan_of(subject, pins={"gelu": {"backward": "again"}})
    assert [d.name for d in plan if d.again] == ["gelu"]
    lines = str(plan).splitlines()
    assert [line.split(":")[0].strip() for line in lines if line.endswith("again in backward")] == [
        "gelu"
    ]
    assert "  again    1 op made again in backward instead of kept" in lines
    assert "again in backward" in str(plan.explain("gelu"))
    plan.save(tmp_path / "plan")
    loaded = autotp.Plan.load(tmp_path / "plan")
    assert loaded == plan and loaded.hash == plan.hash
    assert plan != (free := plan_of(subject)) and plan.hash != free.hash
    assert plan.step_time_s > free.step_time_s


REFUSED = {
    "it is no cheap op": {"up": {"backward": "again"}},
    "a value is kept or made again": {
        "gelu": {"backward": "again"},
        "gel*": {"backward": "keep"},
    },
    "backward: 'never'": {"gelu": {"backward": "never"}},
    "matches no op and no parameter": {"relu": {"backward": "again"}},
}


@pytest.mark.parametrize(("said", "pins"), REFUSED.items())
def test_pins_that_backward_cannot_follow_are_refused(subject, said, pins):
    with pytest.raises(PinError, match=said):
        plan_of(subject, pins=pins)
