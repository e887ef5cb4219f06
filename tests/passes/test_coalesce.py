"""Which moves of parameters share a call, what that is said to save, and what is printed."""

from dataclasses import replace

import pytest
import torch

import autotp
from autotp import schemes
from autotp.api import as_grid
from autotp.axis import run_ranks
from autotp.check import compare, prepare
from autotp.cost_model.cluster import bandwidth_bound, gloo_loopback
from autotp.errors import LayoutError
from autotp.passes.emit.codegen import emit
from autotp.passes.emit.verify import verify
from autotp.passes.moves import Moves
from autotp.plan import Plan
from autotp.together import begin_replicate, invariant_to_replicate_together
from tests.models import build
from tests.random_plans import Plans


def planned(cluster, grid=(4, 1), scheme=schemes.data_parallel, name="nanogpt"):
    model, inputs = build(name)
    pins = scheme(model.train(), grid, inputs)
    return autotp.plan(model, grid, inputs, cluster=cluster, pins=pins)


def latency(seconds):
    return bandwidth_bound(1e9, latency_s=seconds, flops_per_s=1e12)


def test_small_gradients_share_one_call():
    plan = planned("gloo_loopback")
    (bucket,) = plan.buckets
    assert (bucket.axis, bucket.backward, len(bucket.moves), bool(bucket.begins)) == (
        "row",
        "all_reduce",
        24,
        True,
    )
    assert "24 parameters, " in str(plan) and "awaited when backward ends" in str(plan)


def test_calls_are_shared_for_their_latency_alone():
    free, slow = planned(latency(0.0)), planned(latency(1e-3))
    assert all(len(b.moves) == 1 for b in free.buckets)
    assert free.sent() == slow.sent() and len(slow.buckets) == 1


def test_buckets_are_bounded_and_filled_as_backward_goes():
    plan = planned(latency(1e-6))
    sizes = [b.size_bytes for b in plan.buckets]
    limit = 3 * 4 * 1e-6 * 1e9  # three times the latency of one of six steps, each of a quarter
    assert len(sizes) > 2
    for bucket in plan.buckets:
        assert bucket.size_bytes <= limit or len(bucket.moves) == 1
    members = [n for b in plan.buckets for n in b.moves]
    assert members == sorted(members)
    first, second, *_ = plan.buckets  # the first is filled last, with what is left
    whole = [plan.moves[n].size_bytes for n in first.moves[-1:] + second.moves]
    assert sum(whole) > limit


def test_the_time_is_that_of_the_shared_calls():
    plan = planned("gloo_loopback")
    parts = sum(d.seconds for d in plan) + sum(m.seconds for m in plan.moves)
    update = plan.step_time_s - parts  # what the optimizer takes
    assert 0 < update < 1e-3
    (bucket,) = plan.buckets
    moves = Moves(plan.grid, gloo_loopback())
    alone = sum(moves.kind_s("all_reduce", plan.moves[n].size_bytes, 0) for n in bucket.moves)
    assert bucket.seconds < alone / 10
    assert 0 <= plan.gap < 0.01


def test_a_plan_with_buckets_is_read_as_it_was_written(tmp_path):
    plan = planned("gloo_loopback", (2, 2), schemes.fsdp)
    assert plan.buckets
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.buckets == plan.buckets and loaded.hash == plan.hash
    assert replace(plan, buckets=()).hash != plan.hash


@pytest.mark.parametrize("name", ["nanogpt", "mlp"])
@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (4, 1), (2, 3)], ids=str)
def test_random_plans_share_calls_and_compute_the_same(name, grid):
    model, inputs = build(name, double=True)
    subject = prepare(model.train(), (), inputs)
    plans, shared = Plans(subject, as_grid(grid), detours=True), 0
    for seed in range(3):
        plan = plans.random(seed)
        report = compare(subject, plan)
        assert report.ok, report
        shared += sum(len(b.moves) > 1 for b in plan.buckets)
    assert shared


@pytest.mark.parametrize("scheme", [schemes.data_parallel, schemes.fsdp], ids=lambda s: s.__name__)
@pytest.mark.parametrize(("name", "grid"), [("nanogpt", (2, 2)), ("mlp", (3, 1))])
def test_uneven_shares_share_calls(scheme, name, grid):
    model, inputs = build(name, double=True)  # 29 words over 2 ranks, 8 rows over 3
    report = autotp.check(
        model, grid, inputs, cluster="gloo_loopback", pins=scheme(model, grid, inputs)
    )
    assert report.ok, report


# What is emitted ---------------------------------------------------------------------------------


def emitted_for(subject, plan, spoil=lambda graph: None):
    """Return the verified program of rank 0, its graph spoilt before."""

    def one(rank, axes):
        module = emit(subject.program, subject.network, plan, plan.grid.coords(rank), axes)
        spoil(module.graph)
        verify(module, subject.network, subject.factors, plan.grid)
        return module

    return run_ranks(plan.grid, one)[0]


def emitted(spoil=lambda graph: None):
    model, inputs = build("mlp")
    subject = prepare(model.train(), (), inputs)
    pins = schemes.data_parallel(model, (2, 1), inputs)
    plan = autotp.plan(model, (2, 1), inputs, cluster="gloo_loopback", pins=pins)
    return emitted_for(subject, plan, spoil)


def only(graph, target):
    (node,) = graph.find_nodes(op="call_function", target=target)
    return node


def test_the_program_awaits_before_all_ops_and_moves_at_the_first_reader():
    calls = [n.target for n in emitted().graph.nodes if n.op == "call_function"]
    assert calls[0] is begin_replicate
    assert calls.index(invariant_to_replicate_together) < calls.index(torch.ops.aten.linear.default)


def read_twice(graph):
    node = only(graph, begin_replicate)
    with graph.inserting_after(node):
        graph.call_function(list, (node,))


def of_another_axis(graph):
    node = only(graph, invariant_to_replicate_together)
    with graph.inserting_before(node):
        node.args = (node.args[0], graph.get_attr("col"))


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (read_twice, "has one reader"),
        (of_another_axis, "began another move"),
    ],
)
def test_no_gradient_on_its_way_may_be_read(spoil, what):
    with pytest.raises(LayoutError, match=what):
        emitted(spoil)
