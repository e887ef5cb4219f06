"""Plan files, pins and memory budgets that cannot be followed."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import autotp
from autotp.errors import BudgetError
from tests.end_to_end.models import CLUSTER, Mlp
from tests.end_to_end.on_ranks import on_ranks
from tests.faults.table import fault

X = torch.randn(8, 8)


def plan(width=32, grid=(1, 2), x=X, train=True, **options):
    return autotp.plan(Mlp(width).train(train), grid, {"x": x}, cluster=CLUSTER, **options)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan().save("plan.json")
    return tmp_path / "plan.json"


def changed(path, **parts):
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    autotp.Plan.load("plan.json")


# Files -------------------------------------------------------------------------------------------


@fault(
    "A plan file that was cut off",
    """
    PlanError: plan.json is not a whole plan file
      at      file   Unterminated string starting at: line ... column ... (char ...)
      remedy  save it again
    """,
)
def test_truncated(path):
    text = path.read_text()
    path.write_text(text[: text.rindex('"')])  # within its last string
    autotp.Plan.load("plan.json")


@fault(
    "A file that is not JSON",
    """
    PlanError: plan.json is not a whole plan file
      at      file   Expecting value: line 1 column 1 (char 0)
      remedy  save it again
    """,
)
def test_not_json(path):
    path.write_text("dear diary")
    autotp.Plan.load("plan.json")


@fault(
    "A file that is not text",
    """
    PlanError: plan.json is not a whole plan file
      at      file   'utf-8' codec can't decode byte 0x80 in position 0: invalid start byte
      remedy  save it again
    """,
)
def test_not_text(path):
    path.write_bytes(b"\x80\x81\x82")
    autotp.Plan.load("plan.json")


@fault(
    "JSON that is no plan",
    """
    PlanError: not a plan of version ...
      at      file   no plan
      remedy  plan again and save
    """,
)
def test_no_plan(path):
    path.write_text("[1, 2, 3]")
    autotp.Plan.load("plan.json")


@fault(
    "A plan of another version",
    """
    PlanError: not a plan of version ...
      at      file   format 'autotp plan', version 1
      remedy  plan again and save
    """,
)
def test_other_version(path):
    changed(path, version=1)


@fault(
    "A plan file with a part that is missing or broken",
    """
    PlanError: the plan file is damaged
      at      file   ValueError('not enough values to unpack (expected at least 10, got 2)')
      remedy  plan again and save
    """,
)
def test_damaged(path):
    changed(path, moves=[["fc1", "fc1"]])


@fault(
    "The plan of another grid, of another mode, and of inputs and weights of another shape",
    """
    PlanError: the plan belongs to another model, grid or shape
      at      grid         2x1 ('row', 'col'), planned 1x2 ('row', 'col')
      at      mode         eval, planned the other
      at      input x      float32[4, 8], planned float32[8, 8]
      at      fc1.weight   float32[16, 8], planned float32[32, 8]
      at      fc1.bias     float32[16], planned float32[32]
      at      fc2.weight   float32[8, 16], planned float32[8, 32]
      remedy  plan this model on this grid
    """,
)
def test_other_model():
    autotp.check(Mlp(width=16).eval(), (2, 1), {"x": X[:4]}, plan=plan(), cluster=CLUSTER)


class Deeper(Mlp):
    def forward(self, x):
        return torch.tanh(super().forward(x).sin())


@fault(
    "The plan of a model with the same parameters and other ops",
    """
    PlanError: the plan decides the ops of another model
      at      sin    sin -> sin, planned absent
      at      tanh   tanh -> tanh, planned absent
      remedy  plan this model on this grid
    """,
)
def test_other_ops():
    autotp.check(Deeper(), (1, 2), {"x": X}, plan=plan(), cluster=CLUSTER)


@on_ranks((1, 2))
@fault(
    "A plan with sharded outputs where whole ones are wanted",
    """
    PlanError: the plan returns sharded outputs
      at      output 0   I,S(1)
      remedy  parallelize with outputs="sharded"
    """,
)
def test_sharded_outputs(grid):
    split = plan(outputs="sharded", pins={"fc2": {"col": "o"}})
    autotp.parallelize(Mlp(), grid, {"x": X}, plan=split, cluster=CLUSTER)


@on_ranks((1, 2))
@fault(
    "Outputs that are neither whole nor sharded",
    """
    AutotpError: outputs are returned whole or in pieces
      at      outputs   'gathered' is neither
      remedy  outputs="full" or outputs="sharded"
    """,
)
def test_outputs(grid):
    autotp.parallelize(Mlp(), grid, {"x": X}, outputs="gathered")


# Pins --------------------------------------------------------------------------------------------


@fault(
    "Pins that name nothing, or an axis that the grid has not",
    """
    PinError: pins that fit nothing
      at      fc9        matches no op and no parameter; nearest: fc2, fc1, fc2.bias
      at      fc1        no axis 'column'; the grid has row, col
      at      *.weight   matches parameters only, and 'o' is not for them
      remedy  correct the patterns or axes
    """,
)
def test_pins_of_nothing():
    plan(pins={"fc9": {"col": "o"}, "fc1": {"column": "o"}, "*.weight": {"col": "o"}})


@fault(
    "Pins that no strategy fits",
    """
    PinError: pins that no strategy fits
      at      fc1          'z' on axis 'col' of 2: legal are I, R, P0, P1, b, i, o
      at      fc2.weight   'S(2)' on axis 'col' of 2: legal are I, S(0), S(1)
      remedy  pin one of the legal choices
    """,
)
def test_pins_without_a_strategy():
    plan(pins={"fc1": {"col": "z"}, "fc2.weight": {"col": "S(2)"}})


@fault(
    "Pins that contradict each other on one op",
    """
    PinError: pins that contradict each other: no choice of fc1 has all of these
      at      fc1   'i' on axis 'col'
      at      fc*   'o' on axis 'col'
      remedy  remove or change one of them
    """,
)
def test_contradicting_pins():
    plan(pins={"fc*": {"col": "o"}, "fc1": {"col": "i"}})


# Budgets -----------------------------------------------------------------------------------------


def small(memory_bytes):
    return dataclasses.replace(CLUSTER, memory_bytes=memory_bytes)


def wide(memory_bytes):
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    return autotp.plan(model, (1, 2), (torch.randn(16, 64),), cluster=small(memory_bytes))


@fault(
    "A memory budget that no plan meets",
    """
    BudgetError: no plan was found that fits 100 kB per rank
      at      smallest plan   283 kB: parameters 66.2 kB, gradients 66.2 kB, optimizer 132 kB, activations 18.4 kB
      at      budget          100 kB, 183 kB too little
      remedy  a budget of 283136 bytes or more: cluster.memory_bytes=283136
      remedy  more ranks, a smaller batch, or fewer trained parameters
    """,
)
def test_budget():
    wide(100e3)


def test_the_budget_of_the_remedy_is_met():
    with pytest.raises(BudgetError) as refusal:
        wide(100e3)
    least = int(refusal.value.remedies[0].rpartition("=")[2])
    assert wide(least).memory_bytes <= least
    with pytest.raises(BudgetError):
        wide(least - 1)


# Explanations ------------------------------------------------------------------------------------


@fault(
    "An explanation of an op that the plan has not",
    """
    PlanError: the plan has no op 'fc3'
      remedy  nearest names: fc2, fc1
    """,
)
def test_explain_nothing():
    plan()["fc3"]


@fault(
    "An explanation of a plan that was loaded",
    """
    PlanError: a loaded plan cannot explain its choices: it holds no search
      at      fc1   o/col
      remedy  plan the model again: autotp.plan(model, grid, example_inputs).explain(name)
    """,
)
def test_explain_loaded(path):
    autotp.Plan.load(path).explain("fc1")
