"""Plans on disk: equal when read back, refused when damaged or of another model."""

import json

import pytest
import torch
from torch import nn

import autotp
from autotp.errors import PlanError
from autotp.grid import Grid
from autotp.plan import Plan
from autotp.plan_file import from_json, refuse_other, to_json


@pytest.fixture(scope="module")
def plan():
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8))
    model[0].bias.requires_grad_(False)
    return autotp.plan(model, (2, 2), (torch.randn(4, 6, 8),), cluster="gloo_loopback")


def test_a_plan_reads_back_equal(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.hash == plan.hash
    assert loaded.comm_bytes == plan.comm_bytes and loaded.memory == plan.memory


def test_a_plan_is_written_the_same_twice(plan, tmp_path):
    for name in ("one", "two"):
        Plan.load(plan.save(tmp_path / name) or tmp_path / name).save(tmp_path / f"{name}.again")
    texts = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(texts) == 1


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_a_truncated_file_is_refused(plan, tmp_path, keep):
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(path.read_text()[:keep])
    with pytest.raises(PlanError, match="whole plan file"):
        Plan.load(path)


@pytest.mark.parametrize("key", ["grid", "ops", "parameters", "moves", "memory_bytes"])
def test_a_file_without_a_part_is_refused(plan, key):
    data = to_json(plan)
    del data[key]
    with pytest.raises(PlanError, match="damaged"):
        from_json(data)


@pytest.mark.parametrize(
    "key, value",
    [
        ("ops", [{"name": "0"}]),
        ("moves", [["a", "b"]]),
        ("parameters", {"0.weight": ["S(x)", [8], "float32", 1, True, "", []]}),
        ("memory_bytes", [1, 2]),
        ("grid", ["row"]),
    ],
)
def test_a_damaged_part_is_refused(plan, key, value):
    with pytest.raises(PlanError, match="damaged"):
        from_json(to_json(plan) | {key: value})


@pytest.mark.parametrize("data", [{"version": 0}, {"format": "a recipe"}])
def test_another_version_or_format_is_refused(plan, data):
    with pytest.raises(PlanError, match="not a plan of version"):
        from_json(to_json(plan) | data)


@pytest.mark.parametrize("text", ["[]", "3", '"plan"', "null"])
def test_json_that_is_no_plan_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "plan.json")


def test_all_differences_of_another_model_are_listed(plan):
    other = {**plan.model, "0.weight": "float32[16, 8]", "extra": "float32[1]"}
    with pytest.raises(PlanError) as refusal:
        refuse_other(plan, other, Grid(("row", "col"), (1, 4)), not plan.train)
    said = str(refusal.value)
    assert (
        all(word in said for word in ("grid", "mode", "0.weight", "extra")) and "3.bias" not in said
    )


def test_the_plan_of_the_same_model_is_taken(plan):
    refuse_other(plan, plan.model, plan.grid, plan.train)


def test_a_file_holds_no_measured_time(plan):
    assert "search" not in json.dumps(to_json(plan))
