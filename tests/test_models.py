"""Every family of models, all ranks in one process, equal to the original; random plans too."""

import functools

import pytest

from autotp.check import compare, prepare
from autotp.cost_model.cluster import bandwidth_bound
from autotp.grid import as_grid
from autotp.passes.planning import search_plan
from tests.models import MODELS, build
from tests.random_plans import random_plan

GRIDS = ((2, 2), (1, 4), (2, 3))
SLOW_CHIPS = bandwidth_bound(1e9, flops_per_s=1e9)  # splitting pays even for models this small


@functools.lru_cache(maxsize=1)  # a module's tests follow one another
def subject(name, train, double):
    model, inputs = build(name, double=double)
    return prepare(model.train(train), (), inputs)


def best_plan(subject, grid):
    program, network, factors = subject.program, subject.network, subject.factors
    return search_plan(program, network, factors, grid, SLOW_CHIPS).plan


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
def test_the_best_plan_computes_what_the_model_computes(name, train):
    captured = subject(name, train, double=False)
    for grid in GRIDS:
        plan = best_plan(captured, as_grid(grid))
        report = compare(captured, plan)
        assert report.ok and report.largest < 1e-5, report
        assert plan.collectives(), "nothing was split"
        assert plan.unruled == ()


@pytest.mark.parametrize("name", MODELS)
def test_random_plans_compute_what_the_model_computes(name):
    captured = subject(name, True, double=True)
    for seed, grid in enumerate((*GRIDS, (3, 1))):
        report = compare(captured, random_plan(captured, as_grid(grid), seed))
        assert report.ok, report


def test_three_axes():
    captured = subject("nanogpt", True, double=True)
    for plan in (
        best_plan(captured, as_grid((2, 1, 3))),
        random_plan(captured, as_grid((2,) * 3), 0),
    ):
        assert compare(captured, plan).ok
