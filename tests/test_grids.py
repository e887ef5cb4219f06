"""The choice of a grid: every grid is planned, and the fastest that fits is taken."""

import os
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

import autotp
from autotp import cli
from autotp.cost_model.cluster import Link, bandwidth_bound
from autotp.errors import BudgetError, GridError
from autotp.grid import as_grid
from autotp.grid_table import CLOSE, GridPrice, Grids
from autotp.passes import workers
from autotp.passes.grids import factorisations
from autotp.passes.workers import in_parallel
from tests.models import ResidualMLP

CHIPS = bandwidth_bound(1e9, flops_per_s=1e10)
SLOW = replace(CHIPS, ranks_per_node=4, inter=Link(0.0, 5e7))
"""Nodes of four ranks, with a twentieth of the bandwidth between them."""


def mlp(batch=64, width=32):
    with torch.device("meta"):
        model = ResidualMLP(width, 4 * width)
        return model, {"x": torch.randn(batch, width), "y": torch.randn(batch, width)}


def test_every_factorisation_in_every_order():
    sizes = [grid.sizes for grid in factorisations(12)]
    two = [(2, 6), (3, 4), (4, 3), (6, 2)]
    assert sizes == [(12,), *two, (2, 2, 3), (2, 3, 2), (3, 2, 2)]
    assert [grid.sizes for grid in factorisations(1)] == [(1,)]
    assert len(factorisations(1024)) == 46


@pytest.mark.parametrize("cluster", [CHIPS, SLOW])
def test_the_choice_is_the_least_of_all_plans(cluster):
    model, inputs = mlp()
    found = autotp.grids(model, 8, inputs, cluster=cluster)
    plans = {g: autotp.plan(model, g, inputs, cluster=cluster) for g in factorisations(8)}
    assert {row.grid: row.step_time_s for row in found} == {
        grid: plan.step_time_s for grid, plan in plans.items()
    }
    chosen = autotp.plan(model, 8, inputs, cluster=cluster)
    assert chosen == plans[found.best]
    least_s = min(plan.step_time_s for plan in plans.values())
    assert chosen.step_time_s <= least_s * (1 + CLOSE)
    assert all(
        len(chosen.grid.sizes) <= len(grid.sizes)
        for grid, plan in plans.items()
        if plan.step_time_s <= least_s * (1 + CLOSE)
    )
    for row in found:
        assert (row.comm_bytes, row.memory_bytes) == (
            plans[row.grid].comm_bytes,
            plans[row.grid].memory_bytes,
        )


def test_where_calls_have_latency_the_order_is_that_of_whole_searches():
    """Parameters share calls: with a call for each, grids that repeat them would look slow."""
    late = replace(CHIPS.intra, latency_s=2e-4, call_s=5e-4)
    cluster = replace(CHIPS, intra=late, inter=late)
    model, inputs = mlp(batch=512, width=64)
    found = autotp.grids(model, 8, inputs, cluster=cluster)
    plans = {g: autotp.plan(model, g, inputs, cluster=cluster) for g in factorisations(8)}
    for row in found:
        plan = plans[row.grid]
        assert row.lower_bound_s <= plan.step_time_s * (1 + 1e-9)
        assert plan.step_time_s * (1 - 1e-9) <= row.step_time_s <= plan.step_time_s * 1.1
    times = [plans[row.grid].step_time_s for row in found]
    assert times == sorted(times)
    least_s = min(plan.step_time_s for plan in plans.values())
    assert plans[found.best].step_time_s <= least_s * 1.01


@pytest.mark.parametrize("per_node", [2, 4])
def test_the_chatty_axis_runs_inside_a_node(per_node):
    cluster = replace(SLOW, ranks_per_node=per_node)
    model, inputs = mlp(batch=512, width=64)
    plan = autotp.plan(model, 8, inputs, cluster=cluster)
    sent = dict.fromkeys(plan.grid.names, Fraction(0))
    for (_, axis), size in plan.sent().items():
        sent[axis] += size
    place = {n: cluster.place(plan.grid.sizes, k) for k, n in enumerate(plan.grid.names)}
    assert set(place.values()) == {"inside", "between"} and all(sent.values())
    assert place[max(sent, key=sent.__getitem__)] == "inside"


def test_places_of_axes():
    cluster = replace(SLOW, ranks_per_node=8)
    assert [cluster.place((4, 2, 4), axis) for axis in range(3)] == ["between", "inside", "inside"]
    assert [cluster.place((2, 16), axis) for axis in range(2)] == ["between", "across"]
    for sizes in ((4, 2, 4), (2, 16), (16, 4)):
        for axis in range(len(sizes)):
            link = cluster.link(sizes, axis)
            assert (cluster.place(sizes, axis) == "inside") == (link is cluster.intra)
            assert (cluster.place(sizes, axis) == "between") == (link is cluster.inter)


def test_grids_that_do_not_fit_come_last_and_none_that_fits_is_refused():
    model, inputs = mlp(batch=64)
    rows = autotp.grids(model, 8, inputs, cluster=CHIPS)
    least = min(row.memory_bytes for row in rows)
    tight = autotp.grids(model, 8, inputs, cluster=replace(CHIPS, memory_bytes=1.05 * least))
    assert tight[0].fits and tight[0].memory_bytes <= 1.05 * least
    with pytest.raises(BudgetError, match="no grid of 8 ranks has a plan that fits 1 kB per rank"):
        autotp.grids(model, 8, inputs, cluster=replace(CHIPS, memory_bytes=1e3))


def test_ties_go_to_the_fewest_bytes_then_the_fewest_axes():
    def price(sizes, time_s, sent=0):
        return GridPrice(as_grid(sizes), (), step_time_s=time_s, comm_bytes=Fraction(sent))

    rows = [price((2, 4), 1.0), price((8,), 1.0 + 1e-13), price((4, 2), 0.5), price((2, 2, 2), 1.0)]
    less = price((2, 2, 2), 1.0, -1)
    found = sorted([*rows, less, price((1, 8), float("inf"))], key=GridPrice.rank_key)
    assert [row.grid.sizes for row in found] == [
        (4, 2),
        (2, 2, 2),
        (8,),
        (2, 4),
        (2, 2, 2),
        (1, 8),
    ]


def test_processes_find_what_one_finds(monkeypatch):
    model, inputs = mlp()
    one = autotp.grids(model, 8, inputs, cluster=SLOW)
    monkeypatch.setattr(workers, "PARALLEL_FROM", 2)
    assert autotp.grids(model, 8, inputs, cluster=SLOW) == one


def test_work_is_shared_out_and_errors_are_raised_here():
    here = os.getpid()

    def work(n):
        if n == 13 and os.getpid() != here:
            os._exit(1)
        return n * n

    assert in_parallel(work, range(40)) == [n * n for n in range(40)]
    with pytest.raises(ZeroDivisionError):
        in_parallel(lambda n: 1 // n, range(9))


def test_a_number_that_only_one_grid_has_is_that_grid():
    model, inputs = mlp()
    pins = {"up.0": {"col": "o"}}
    plan = autotp.plan(model, 2, inputs, cluster=CHIPS, pins=pins)
    assert plan == autotp.plan(model, (2,), inputs, cluster=CHIPS, pins=pins)


def test_check_chooses_too():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    report = autotp.check(model, 4, (torch.randn(8, 8),), cluster=CHIPS)
    assert report.ok
    with pytest.raises(GridError):
        autotp.check(model, 0, (torch.randn(8, 8),))


def test_the_table_says_what_each_axis_splits():
    model, inputs = mlp(batch=512, width=64)
    found = autotp.grids(model, 8, inputs, cluster=SLOW)
    text = str(found)
    assert text.splitlines()[0].startswith(
        "grids of 8 ranks for one training step on bandwidth_bound, per rank, the fastest first"
    )
    assert text.splitlines()[2].split() == ["grid", "time", "sent", "memory", "found", "axes"]
    assert str(found[0].grid) == text.splitlines()[3].split()[0]


def test_of_grids_as_fast_that_of_fewest_axes_is_chosen():
    def price(sizes, step_time_s):
        grid = as_grid(sizes)
        return GridPrice(grid, ("inside",) * len(sizes), ((),) * len(sizes), step_time_s)

    two, one, three = price((2, 4), 1.0), price((8,), 1.004), price((2, 2, 2), 0.9999)
    found = Grids("x", True, (three, two, one))
    assert found.best == one.grid and "chosen is 8" in str(found)
    slower = Grids("x", True, (three, two, price((8,), 1.006)))
    assert slower.best == two.grid
    alone = Grids("x", True, (two, price((8,), 1.006)))
    assert alone.best == two.grid and "chosen" not in str(alone)


def test_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(cli, "build", lambda *_, **__: mlp(batch=64))
    monkeypatch.setattr(cli, "ZOO", {"mlp": None})
    assert cli.main(["grids", "mlp", "--ranks", "4", "--cluster", "dgx_h100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[3:]} == {"4", "2x2"}
