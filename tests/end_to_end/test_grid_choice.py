"""A grid that the planner chooses: all ranks take rank 0's, and compute what one device does."""

import copy

import pytest
import torch
import torch.distributed as dist

import autotp
from autotp.errors import RuntimeStateError
from tests.end_to_end.models import CLUSTER, Mlp, assert_near, gradients, loss_of
from tests.end_to_end.on_ranks import on_ranks


def batch():
    return {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}


def trained(model, inputs):
    loss = loss_of(model(**inputs))
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@on_ranks((2, 2))
def test_ranks_run_on_the_chosen_grid(grid):
    inputs = batch()
    for asked in (4, "auto"):
        torch.manual_seed(0)
        one = Mlp().train()
        chosen = autotp.plan(one, asked, inputs, cluster=CLUSTER)
        model = autotp.parallelize(copy.deepcopy(one), asked, inputs, cluster=CLUSTER)
        assert model.plan == chosen
        assert chosen.grid == autotp.grids(one, 4, inputs, cluster=CLUSTER).best
        assert_near(trained(model, inputs), trained(one, inputs))


@on_ranks((2, 2))
def test_a_plan_brings_its_grid(grid):
    inputs, one = batch(), Mlp().train()
    plan = autotp.plan(one, grid, inputs, cluster=CLUSTER)
    model = autotp.parallelize(copy.deepcopy(one), 4, inputs, cluster=CLUSTER, plan=plan)
    assert model.plan == plan and model.plan.grid.sizes == grid
    assert_near(trained(model, inputs), trained(one, inputs))


@on_ranks((2, 2))
def test_ranks_that_ask_for_different_grids_are_refused(grid):
    asked = grid if dist.get_rank() == 1 else "auto"
    with pytest.raises(RuntimeStateError, match="calls of autotp"):
        autotp.parallelize(Mlp().train(), asked, batch(), cluster=CLUSTER)
