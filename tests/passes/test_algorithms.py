"""Algorithms of collectives in a plan: which are chosen, what is printed, saved and checked."""

from dataclasses import replace

import pytest

import autotp
from autotp import schemes
from autotp.axis import run_ranks
from autotp.check import compare, prepare, take_step
from autotp.cost_model.cluster import Link, Rate, bandwidth_bound
from autotp.cost_model.levels import STAGES, nodes_of
from autotp.errors import LayoutError
from autotp.passes.emit.codegen import emit
from autotp.passes.emit.verify import verify
from autotp.plan import Plan
from tests.models import build

GRID = (2, 2)


def cluster(**by):
    """A link on which one algorithm of each kind is twice as fast as the plain one."""
    plain = bandwidth_bound(1e9, latency_s=1e-5, flops_per_s=1e9)
    rates = tuple(Rate(kind, 5e-6, 2e9, by=how) for kind, how in by.items())
    link = replace(plain.intra, rates=rates)
    return replace(plain, intra=link, inter=link)


def planned(scheme, grid=GRID, **by):
    model, inputs = build("nanogpt", double=True)
    pins = scheme(model.train(), grid, inputs)
    subject = prepare(model, (), inputs)
    return autotp.plan(model, grid, inputs, cluster=cluster(**by), pins=pins), subject


WAYS = [
    dict(all_gather="ring", all_reduce="scatter_gather", reduce_scatter="exchange"),
    dict(all_gather="exchange", all_reduce="scatter_exchange", reduce_scatter="all_reduce"),
    dict(all_reduce="scatter_ring"),
]


@pytest.mark.parametrize(
    ("scheme", "grid"),
    [(schemes.megatron_sp, (1, 2)), (schemes.fsdp, (2, 2)), (schemes.summa, (2, 2))],
    ids=lambda s: getattr(s, "__name__", str(s)),
)
@pytest.mark.parametrize("by", WAYS, ids=lambda by: " ".join(by.values()))
def test_what_is_faster_is_planned_sent_and_equal_to_one_device(scheme, grid, by):
    plan, subject = planned(scheme, grid, **by)
    started = {n for b in plan.buckets if b.forward == "none" for n in b.moves}
    for n, m in enumerate(plan.moves):
        ways = [(m.forward, m.by), (m.backward, m.back_by)]
        for kind, found in ways:
            size = plan.grid.sizes[plan.grid.axis(m.axis)]
            assert found == ("" if n in started or size == 1 else by.get(kind, ""))
    for kind, how in by.items():
        if any(kind in (m.forward, m.backward) for m in plan.moves if m.by or m.back_by):
            assert f"{kind} by {how}" in str(plan)
    report = compare(subject, plan)
    assert report.ok, report
    assert take_step(subject, plan).ranks[0].sent == {k: n for k, n in plan.sent().items() if n}
    assert plan.formula_total("bytes").subs(plan.formula_sizes()) == plan.comm_bytes


def nodes(members):
    """Nodes of so many ranks, with a slow wire between them."""
    plain = bandwidth_bound(1e11, latency_s=1e-7, flops_per_s=1e9)
    return replace(plain, ranks_per_node=members, inter=Link(1e-6, 1e9))


LEVELS = [
    (schemes.megatron_sp, (1, 6), 3, ("col", 3)),
    (schemes.fsdp, (4, 1), 2, ("row", 2)),
    (schemes.fsdp, (4, 2), 4, ("row", 2)),  # in each node two ranks of the axis, two apart
]


@pytest.mark.parametrize(("scheme", "grid", "members", "level"), LEVELS)
def test_two_levels_are_planned_sent_and_equal_to_one_device(scheme, grid, members, level):
    axis = level[0]
    model, inputs = build("nanogpt", double=True)
    inputs = {name: x.repeat(4, 1) for name, x in inputs.items()}
    subject = prepare(model.train(), (), inputs)
    plan = autotp.plan(
        model, grid, inputs, cluster=nodes(members), pins=scheme(model, grid, inputs)
    )
    assert plan.levels() == [level]
    started = {n for b in plan.buckets if b.forward == "none" for n in b.moves}
    for n, m in enumerate(plan.moves):
        if m.axis == axis and n not in started:
            ways = [(m.forward, m.by), (m.backward, m.back_by)]
            assert all(by == nodes_of(level[1]) for kind, by in ways if kind in STAGES)
    assert f"by {nodes_of(level[1])}" in str(plan) and "of it between nodes, by two levels" in str(
        plan
    )
    assert plan.formula_total("bytes").subs(plan.formula_sizes()) == plan.comm_bytes
    report = compare(subject, plan)
    assert report.ok, report
    run = take_step(subject, plan).ranks[0]
    assert run.sent == {k: n for k, n in plan.sent().items() if n}
    between = getattr(run.module, axis).sent_between
    assert {(k, axis): n for k, n in between.items()} == plan.sent_between()


def test_a_plan_without_measured_algorithms_names_none():
    plan, _ = planned(schemes.fsdp)
    assert not any(m.by or m.back_by for m in plan.moves)


def test_plans_keep_algorithms(tmp_path):
    plan, _ = planned(schemes.fsdp, **WAYS[1])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_an_algorithm_that_a_collective_lacks_is_refused():
    plan, subject = planned(schemes.megatron_sp, (1, 2), **WAYS[0])

    def one(rank, axes):
        coords = plan.grid.coords(rank)
        module = emit(subject.program, subject.network, plan, coords, axes)
        node = next(n for n in module.graph.nodes if n.kwargs.get("by") == "ring")
        node.kwargs = {**node.kwargs, "by": "scatter_ring"}
        verify(module, subject.network, subject.factors, plan.grid)

    wrong = "all_gather over 2 ranks cannot be made by 'scatter_ring'"
    with pytest.raises(LayoutError, match=wrong):
        run_ranks(plan.grid, one)
