"""What a plan says of its own coverage."""

import pytest

import autotp
from autotp.cost_model.cluster import bandwidth_bound
from tests.models import build


def plan_of(**pins):
    model, inputs = build("mlp")
    slow = bandwidth_bound(1e9, flops_per_s=1e9)
    return autotp.plan(model, (1, 2), inputs, cluster=slow, pins=pins)


def test_shares_count_what_some_axis_splits():
    everything = plan_of().coverage()
    assert everything.flops == 1 and 0.9 < everything.parameters < 1  # norms rest whole
    half = plan_of(**{"up.*": {"col": "I"}}).coverage()
    assert half.flops == pytest.approx(0.5, abs=0.01)
    assert dict(half.notable()).keys() == {"linear"}
    assert str(half).startswith("50.5% of the products' flops, ")
    assert "; whole: linear " in str(half)


def test_nothing_is_split_on_one_rank():
    model, inputs = build("mlp")
    assert autotp.plan(model, (1, 1), inputs).coverage().flops == 0


def test_a_plan_that_was_loaded_says_the_same(tmp_path):
    plan = plan_of()
    plan.save(tmp_path / "plan.json")
    assert autotp.Plan.load(tmp_path / "plan.json").coverage() == plan.coverage()
