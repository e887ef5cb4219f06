"""Experts split over an axis: the model computes the same, and what it sends is counted."""

import pytest

from autotp.check import compare, prepare
from autotp.cost_model.cluster import bandwidth_bound
from autotp.grid import as_grid
from autotp.layouts import Shard
from autotp.passes.planning import search_plan
from autotp.simulate import run_grid
from tests.zoo.models import build

FREE = bandwidth_bound(1e15, flops_per_s=1e9)
EXPERTS = {
    "mixtral": {"model.layers.*.mlp.experts.grouped_mm*": "t+e"},
    "qwen2-moe": {"model.layers.*.mlp.experts.grouped_mm*": "t+e"},
    "experts by einsum": {"layers.*.experts.up": "S(0)", "layers.*.experts.down": "S(0)"},
    "experts by slots": {"layers.*.experts.bmm*": "z"},
    "experts on all tokens": {"layers.*.experts.up": "S(0)", "layers.*.experts.down": "S(0)"},
}


def planned(name, grid, pins, axis="col"):
    model, inputs = build(name)
    subject = prepare(model.train(), (), inputs)
    given = (subject.program, subject.network, subject.factors, as_grid(grid), FREE)
    plan = search_plan(*given, {k: {axis: v} for k, v in pins.items()}).plan
    return subject, plan


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("mixtral", (2, 2)),
        pytest.param("qwen2-moe", (1, 3), marks=pytest.mark.slow),
        ("experts by einsum", (1, 3)),
        ("experts by slots", (2, 2)),
        ("experts on all tokens", (1, 3)),
    ],
    ids=str,
)
def test_experts_split_over_an_axis(name, grid):
    subject, plan = planned(name, grid, EXPERTS[name])
    weights = [r for n, r in plan.params.items() if ".experts." in n and len(r.shape) == 3]
    assert len(weights) == 4 and all(r.layout[1] == Shard(0) for r in weights)
    report = compare(subject, plan)
    assert report.ok, report


def test_rows_go_to_their_experts_and_back_and_all_of_it_is_counted():
    subject, plan = planned("mixtral", (1, 3), EXPERTS["mixtral"])
    run = run_grid(
        subject.program, subject.network, plan, subject.state, subject.inputs,
        backward=subject.backward,
    )  # fmt: skip
    assert run.ranks[0].sent == {k: n for k, n in plan.sent().items() if n}
    inside = [kind for name, _, kind, _ in plan.internal if "grouped_mm" in name]
    assert inside == ["all_to_all"] * 4 * 4
