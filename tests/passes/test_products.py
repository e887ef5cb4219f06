"""Products that make a move themselves: which may, what is planned, sent, kept and computed."""

import itertools
from dataclasses import replace
from functools import cache

import pytest

import autotp
from autotp import schemes
from autotp.axis import run_ranks
from autotp.check import compare, prepare, take_step
from autotp.cost_model.cluster import bandwidth_bound
from autotp.errors import LayoutError, PinError
from autotp.notation import seconds_text
from autotp.passes import calls
from autotp.passes.emit.codegen import emit
from autotp.passes.emit.verify import verify
from autotp.passes.products import products_that_move
from autotp.plan import Plan
from autotp.products import SCHEDULES, gather_matmul, matmul_scatter
from tests.models import build

CLUSTER = bandwidth_bound(1e9, latency_s=1e-6, flops_per_s=1e9)
HIDING = replace(CLUSTER, overlap=0.9)


@cache
def given(name):
    model, inputs = build(name, double=True)
    return model.train(), inputs, prepare(model, (), inputs)


def planned(name, grid, scheme, cluster=CLUSTER, **by):
    model, inputs, _ = given(name)
    pins = dict(scheme(model, grid, inputs))
    if by:
        pins["*"] = {axis: f"by {how}" for axis, how in by.items()}
    return autotp.plan(model, grid, inputs, cluster=cluster, pins=pins)


FORCED = [
    ("nanogpt", (2, 2), schemes.summa, "row"),
    ("nanogpt", (2, 3), schemes.summa_abt, "col"),
    ("gpt2", (1, 4), schemes.fsdp, "col"),
    ("llama", (2, 2), schemes.summa, "col"),
    *(
        pytest.param(name, grid, scheme, axis, marks=pytest.mark.slow)
        for name in ("nanogpt", "gpt2", "llama")
        for grid, scheme, axis in [
            ((1, 2), schemes.megatron_sp, "col"),
            ((1, 4), schemes.fsdp, "col"),
            ((2, 2), schemes.summa, "row"),
            ((2, 2), schemes.summa_abt, "col"),
        ]
    ),
    *(  # six heads
        pytest.param("nanogpt", (2, 3), schemes.summa, axis, marks=pytest.mark.slow)
        for axis in ("col", "row")
    ),
]


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "grid", "scheme", "axis"), FORCED, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_a_forced_schedule_computes_what_one_device_does(name, grid, scheme, axis, how):
    plan = planned(name, grid, scheme, **{axis: how})
    subject = given(name)[2]
    report = compare(subject, plan)
    assert report.ok, report
    assert take_step(subject, plan).ranks[0].sent == {k: n for k, n in plan.sent().items() if n}
    assert plan.formula_total("bytes").subs(plan.formula_sizes()) == plan.comm_bytes
    assert f"within the product by {how}" in str(plan)


def test_all_three_operands_of_a_product_may_be_what_moves():
    """x and its gradient in one plan, the weight in another, the result in a third."""
    calls = []
    for scheme, grid in [(schemes.megatron_sp, (1, 2)), (schemes.fsdp, (1, 2))]:
        plan = planned("nanogpt", grid, scheme, col="ring")
        for node in emitted(plan).graph.nodes:
            if node.target in (gather_matmul, matmul_scatter):
                calls.append((node.target.__name__, node.kwargs.get("moved", "x")))
    assert {*calls} == {
        ("gather_matmul", "x"),
        ("gather_matmul", "weight"),
        ("matmul_scatter", "x"),
    }


def emitted(plan, spoil=lambda node: None):
    subject = given("nanogpt")[2]

    def one(rank, axes):
        coords = plan.grid.coords(rank)
        module = emit(subject.program, subject.network, plan, coords, axes)
        for node in module.graph.nodes:
            if node.target is gather_matmul:
                spoil(node)
        verify(module, subject.network, subject.factors, plan.grid)
        return module

    return run_ranks(plan.grid, one)[0]


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (dict(by="rings"), "no product is made by 'rings'"),
        (dict(dim=0), "is no shard of dim 0"),
        (dict(moved="weight"), "is no shard of dim 1"),
    ],
)
def test_a_call_that_moves_otherwise_than_its_types_say_is_refused(wrong, what):
    plan = planned("nanogpt", (1, 2), schemes.megatron_sp, col="ring")
    with pytest.raises(LayoutError, match=what):
        emitted(plan, lambda node: setattr(node, "kwargs", {**node.kwargs, **wrong}))


# What is planned ---------------------------------------------------------------------------------


def test_nothing_is_fused_where_nothing_runs_at_once():
    assert not products_that_move(planned("nanogpt", (1, 2), schemes.megatron_sp))


def test_large_products_take_rings_by_themselves_and_compute_what_one_device_does():
    plan = planned("nanogpt", (1, 2), schemes.megatron_sp, HIDING)
    apart = planned("nanogpt", (1, 2), schemes.megatron_sp, HIDING, col="once")
    assert not products_that_move(apart) and len(products_that_move(plan)) == 9
    assert plan.lower_bound_s <= plan.step_time_s < apart.step_time_s
    assert plan.sent() == apart.sent() and apart.lower_bound_s <= apart.step_time_s
    report = compare(given("nanogpt")[2], plan)
    assert report.ok, report


def test_latency_keeps_small_products_apart():
    late = replace(bandwidth_bound(1e9, latency_s=1e-3, flops_per_s=1e9), overlap=0.9)
    assert not products_that_move(planned("nanogpt", (1, 4), schemes.fsdp, late))


def test_what_several_products_read_is_moved_once_before_them():
    """q, k and v read one gathered x: a ring of one would gather it again for the others."""
    plan = planned("llama", (1, 2), schemes.megatron_sp, HIDING)
    shared = {d.reads[0] for d in plan if d.name.endswith("q_proj")}
    assert shared and not any(m.schedule for m in plan.moves if m.value in shared)


@pytest.mark.parametrize(
    ("grid", "scheme", "flops_per_s", "overlap"),
    [
        ((1, 2), schemes.megatron_sp, 1e10, 0.3),
        ((1, 2), schemes.megatron_sp, 1e11, 0.9),
        ((2, 2), schemes.summa_abt, 1e11, 0.3),
    ],
)
def test_the_choice_is_the_best_of_all(grid, scheme, flops_per_s, overlap, monkeypatch):
    asked = []
    by_price = calls._by_price

    def noted(pairs, case, given):
        asked.append((pairs, case, by_price(pairs, case, given)))
        return asked[-1][2]

    monkeypatch.setattr(calls, "_by_price", noted)
    cluster = bandwidth_bound(1e9, latency_s=2e-7, flops_per_s=flops_per_s)
    planned("nanogpt", grid, scheme, replace(cluster, overlap=overlap))
    pairs, case, (_, found) = asked[-1]
    of_op = {}
    for pair in pairs:
        of_op.setdefault(pair.op, [None]).append((pair, "ring"))
    ways = [dict(zip(of_op, way, strict=True)) for way in itertools.product(*of_op.values())]
    every = [case.called({op: w for op, w in way.items() if w}).seconds for way in ways]
    assert found.seconds == pytest.approx(min(every), rel=1e-9)


def test_what_rings_keep_is_counted_and_kept_within_the_memory():
    apart = planned("nanogpt", (1, 2), schemes.megatron_sp, HIDING, col="once").memory
    free = planned("nanogpt", (1, 2), schemes.megatron_sp, HIDING)
    assert free.memory.activations > apart.activations and free.memory.peak > apart.peak
    tight = replace(HIDING, memory_bytes=float(apart.total))
    plan = planned("nanogpt", (1, 2), schemes.megatron_sp, tight)
    assert plan.memory.total <= apart.total
    scattered = {m.forward for m in plan.moves if m.schedule}
    assert scattered == {"reduce_scatter"} and plan.step_time_s > free.step_time_s


def test_a_plan_says_what_moves_take_within_products_and_apart():
    plan = planned("nanogpt", (1, 2), schemes.megatron_sp, HIDING)
    (chosen,) = [m for m in plan.moves if m.value in plan["h.0.c_fc"].reads and m.schedule]
    assert chosen.seconds < chosen.apart_s
    text = f"apart {seconds_text(chosen.apart_s)}"
    assert f"within the product by ring, {text}" in str(plan)
    assert f"by ring, {seconds_text(chosen.seconds)}; {text}" in str(plan.explain("h.0.c_fc"))


def test_a_ring_sends_the_same_and_is_priced_by_what_it_hides():
    apart = planned("nanogpt", (1, 2), schemes.megatron_sp)
    ring = planned("nanogpt", (1, 2), schemes.megatron_sp, col="ring")
    hiding = planned(
        "nanogpt", (1, 2), schemes.megatron_sp, replace(CLUSTER, overlap=0.9), col="ring"
    )
    assert ring.sent() == apart.sent() and hiding.step_time_s < ring.step_time_s


def test_panels_gather_again():
    apart = planned("nanogpt", (2, 2), schemes.summa)
    plan = planned("nanogpt", (2, 2), schemes.summa, row="panels")
    assert {how for _, _, how in products_that_move(plan)} == {"panels"}
    assert plan.comm_bytes > apart.comm_bytes  # what is not kept is gathered again


def test_a_plan_keeps_its_schedules(tmp_path):
    plan = planned("nanogpt", (1, 2), schemes.megatron_sp, col="panels")
    plan.save(tmp_path / "plan.json")
    assert products_that_move(Plan.load(tmp_path / "plan.json")) == products_that_move(plan)
    assert Plan.load(tmp_path / "plan.json") == plan


# Pins --------------------------------------------------------------------------------------------


def refused(pins):
    model, inputs, _ = given("nanogpt")
    with pytest.raises(PinError) as caught:
        autotp.plan(model, (1, 2), inputs, cluster=CLUSTER, pins=pins)
    return str(caught.value)


def test_pins_of_schedules_are_told_what_is_wrong():
    assert "no schedule 'tree': legal are ring, panels, once" in refused(
        {"*.c_fc": {"col": "by tree"}}
    )
    assert "no axis 'x'; the grid has row, col" in refused({"*.c_fc": {"x": "by ring"}})
    assert "matches no op and no parameter" in refused({"nothing": {"col": "by ring"}})
    assert "'by ring' on axis 'col': no product there may move anything so" in refused(
        {"*.c_fc": {"col": "I by ring"}}
    )


def test_once_keeps_a_product_and_its_move_apart():
    model, inputs, _ = given("nanogpt")
    pins = dict(schemes.megatron_sp(model, (1, 2), inputs))
    pins |= {"*.c_fc": {"col": "by once"}, "*": {"col": "by ring"}}
    plan = autotp.plan(model, (1, 2), inputs, cluster=CLUSTER, pins=pins)
    found = [name for name, *_ in products_that_move(plan)]
    assert found and not any("c_fc" in name for name in found)
