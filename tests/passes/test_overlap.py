"""What begins early, where, and how much of it is hidden: plans, and the programs of them."""

from dataclasses import replace

import pytest

import autotp
from autotp import schemes
from autotp.check import prepare
from autotp.cost_model.cluster import Link, bandwidth_bound
from autotp.errors import LayoutError, PinError
from autotp.late import late, linear_late
from autotp.plan import AT_ONCE, WHERE_MADE
from autotp.plan_file import from_json, to_json
from autotp.together import (
    all_gather_together,
    begin_gather,
    begin_replicate,
    invariant_to_replicate_together,
)
from tests.models import build
from tests.passes.test_coalesce import emitted_for

APART = bandwidth_bound(1e9, latency_s=2e-7, flops_per_s=1e10)
BESIDE = replace(APART, overlap=0.5)
CASES = [
    ("nanogpt", schemes.fsdp, (4, 1)),
    ("nanogpt", schemes.megatron, (1, 3)),
    ("nanogpt", schemes.megatron_sp, (1, 3)),
    ("llama", schemes.batch_x_tensor, (2, 2)),
    ("gpt2", schemes.summa, (2, 2)),
    ("gpt2", None, (2, 2)),
]
each_case = pytest.mark.parametrize(("name", "scheme", "grid"), CASES)


def planned(name, scheme, grid, cluster=BESIDE):
    model, inputs = build(name)
    pins = scheme(model.train(), grid, inputs) if scheme else None
    return autotp.plan(model, grid, inputs, cluster=cluster, pins=pins)


def apart(model, grid, inputs):
    """Fully sharded, no product gathering its weight itself."""
    return {**schemes.fsdp(model, grid, inputs), "*": {"row": "by once"}}


@each_case
def test_what_begins_early_computes_the_same(name, scheme, grid):
    model, inputs = build(name, double=True)
    pins = scheme(model.train(), grid, inputs) if scheme else None
    report = autotp.check(model, grid, inputs, cluster=BESIDE, pins=pins)
    assert report.ok, report


@each_case
def test_what_is_hidden_is_a_share_of_what_runs_at_once(name, scheme, grid):
    plan = planned(name, scheme, grid)
    assert any(b.hidden_s for b in plan.buckets) or any(m.schedule for m in plan.moves)
    for bucket in plan.buckets:
        assert 0 <= bucket.hidden_s <= 0.5 * bucket.seconds
    ops = sum(d.seconds for d in plan)
    hidden = sum(b.hidden_s for b in plan.buckets)
    assert hidden <= 0.5 * ops
    assert plan.lower_bound_s <= plan.step_time_s
    if scheme:  # the same layouts
        slow = planned(name, scheme, grid, APART)
        assert plan.step_time_s < slow.step_time_s and plan.sent() == slow.sent()


@pytest.mark.parametrize(
    ("name", "grid"), [("nanogpt", (2, 2)), ("gpt2", (2, 2)), ("llama", (2, 2))]
)
def test_what_is_found_is_no_slower_than_any_scheme(name, grid):
    best = planned(name, None, grid)
    for scheme in (schemes.batch_x_tensor, schemes.megatron, schemes.fsdp, schemes.data_parallel):
        try:
            plan = planned(name, scheme, grid)
        except PinError:
            continue
        assert best.step_time_s <= plan.step_time_s * 1.001, scheme.__name__


def test_nothing_is_hidden_where_nothing_runs_at_once():
    for scheme, grid in ((schemes.fsdp, (4, 1)), (schemes.batch_x_tensor, (2, 2))):
        for bucket in planned("nanogpt", scheme, grid, APART).buckets:
            assert not bucket.hidden_s
            assert bucket.begins in (AT_ONCE, WHERE_MADE)
            assert bucket.begins == AT_ONCE or bucket.forward == "none"


@pytest.mark.parametrize(("latency_s", "is_shared"), [(1e-3, True), (0.0, False)])
def test_no_gradient_leaves_before_the_call_that_makes_it(latency_s, is_shared):
    """Sums over rows follow reduce-scatters over columns: where one call makes these, all do."""
    model, inputs = build("nanogpt")
    fsdp = schemes.fsdp(model.train(), (2, 2), inputs)
    pins = {name: {**pin, "row": "I"} if "S" in pin.values() else pin for name, pin in fsdp.items()}
    inside = Link(latency_s, 1e12)
    cluster = replace(BESIDE, ranks_per_node=2, intra=inside)
    plan = autotp.plan(model, (2, 2), inputs, cluster=cluster, pins=pins)
    sums = [b for b in plan.buckets if b.axis == "row"]
    scatters = [b for b in plan.buckets if b.axis == "col"]
    assert len(sums) > 8 and {b.backward for b in sums} == {"all_reduce"}
    assert (len(scatters) == 1) == is_shared
    assert any(b.hidden_s for b in sums) != is_shared


def test_gathers_begin_within_a_layer_before_their_reader():
    plan = planned("nanogpt", apart, (4, 1))
    order = [d.name for d in plan]
    readers = {m.value: n for n, d in enumerate(plan) for m in plan.moves if m.value in d.reads}
    early = [b for b in plan.buckets if b.begins]
    assert len(early) > 8
    for bucket in early:
        first = min(readers[plan.moves[n].value] for n in bucket.moves)
        assert order.index(bucket.begins) < first


def test_a_plan_that_begins_early_is_written_read_and_printed():
    plan = planned("nanogpt", schemes.fsdp, (4, 1))
    assert from_json(to_json(plan)).buckets == plan.buckets
    text = str(plan)
    assert "begins before " in text and " hidden" in text and "beside other ops" in text
    text = str(planned("nanogpt", schemes.megatron, (1, 3)))
    assert "backward all_reduce beside the weights' gradients" in text


# The programs ------------------------------------------------------------------------------------


def emitted(scheme, grid, spoil=lambda graph: None):
    model, inputs = build("nanogpt")
    subject = prepare(model.train(), (), inputs)
    pins = scheme(model, grid, inputs)
    plan = autotp.plan(model, grid, inputs, cluster=BESIDE, pins=pins)
    return emitted_for(subject, plan, spoil)


def order_of(graph):
    return {node: k for k, node in enumerate(graph.nodes)}


def test_gathers_begin_before_other_ops():
    graph = emitted(apart, (4, 1)).graph
    order, between = order_of(graph), []
    for begin in graph.find_nodes(op="call_function", target=begin_gather):
        (end,) = begin.users
        assert end.target is all_gather_together
        between.append(order[end] - order[begin])
    assert len(between) > 8 and max(between) > 5


def test_weights_stand_between_begin_and_end():
    graph = emitted(schemes.megatron, (1, 3)).graph
    order = order_of(graph)
    found = graph.find_nodes(op="call_function", target=linear_late)
    assert len(found) == 5  # c_attn and c_fc of two layers, the head
    for node in found:
        end, weight = node.args[0].args[0], node.args[1]
        (begin,) = [end.args[0]]
        assert begin.target is begin_replicate and weight.target is late
        assert order[begin] < order[weight] < order[end] < order[node]


def weight_read_twice(graph):
    node = next(iter(graph.find_nodes(op="call_function", target=late)))
    with graph.inserting_after(node):
        graph.call_function(id, (node,))


def gather_read_by_another(graph):
    node = next(iter(graph.find_nodes(op="call_function", target=begin_gather)))
    (end,) = node.users
    end.target = invariant_to_replicate_together


def other_dims(graph):
    node = next(iter(graph.find_nodes(op="call_function", target=begin_gather)))
    node.update_kwarg("dims", [9])


@pytest.mark.parametrize(
    ("scheme", "grid", "spoil", "what"),
    [
        (schemes.megatron, (1, 3), weight_read_twice, "has one reader, a product"),
        (schemes.fsdp, (4, 1), gather_read_by_another, "gradients on their way come to it"),
        (schemes.fsdp, (4, 1), other_dims, "began another move"),
    ],
)
def test_nothing_on_its_way_may_be_read(scheme, grid, spoil, what):
    with pytest.raises(LayoutError, match=what):
        emitted(scheme, grid, spoil)
