"""Parameters, optimizers and checkpoints of a parallel model, used in ways that would go wrong."""

import pickle

import torch
from torch import nn

import autotp
from tests.end_to_end.models import CLUSTER, Mlp
from tests.end_to_end.on_ranks import on_ranks
from tests.faults.table import fault


def batch():
    return {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}


def parallel(grid, model=None, inputs=None):
    return autotp.parallelize(model or Mlp(), grid, inputs or batch(), cluster=CLUSTER)


@on_ranks((1, 2))
@fault(
    "The plan of a model that was not called yet",
    """
    RuntimeStateError: the model is planned at its first call
      at      the model   was not called yet, and no example inputs were given
      remedy  call it once, or give autotp.parallelize its example_inputs
    """,
)
def test_no_plan_yet(grid):
    _ = autotp.parallelize(Mlp(), grid, cluster=CLUSTER).plan


@on_ranks((1, 2))
@fault(
    "A parameter that was replaced",
    """
    RuntimeStateError: distributed parameters were replaced
      at      fc1.weight   is a Parameter, planned a DTensor, ...
      remedy  change them in place, or through load_state_dict
    """,
)
def test_replaced_parameter(grid):
    model = parallel(grid)
    model.fc1.weight = nn.Parameter(torch.zeros(32, 8))
    model(**batch())


@on_ranks((1, 2))
@fault(
    "load_state_dict(assign=True)",
    """
    RuntimeStateError: load_state_dict(assign=True) would replace distributed parameters
      at      assign   True, and 5 parameters are DTensors
      remedy  load with assign=False
    """,
)
def test_assign(grid):
    state = Mlp().state_dict()
    parallel(grid).load_state_dict(state, assign=True)


@on_ranks((1, 2))
@fault(
    "A parallel model that is pickled",
    """
    RuntimeStateError: a parallel module is bound to its process group and cannot be pickled
      at      ParallelMlp   runs on grid 1x2
      remedy  save autotp.full_state_dict(model) and model.plan, or copy with copy.deepcopy
    """,
)
def test_pickle(grid):
    pickle.dumps(parallel(grid))


@on_ranks((1, 2))
@fault(
    "An optimizer that stepped before autotp.parallelize",
    """
    RuntimeStateError: AdamW has stepped on parameters that were replaced since
      at      param_groups[0]   holds state of 4 whole parameters
      remedy  build the optimizer after autotp.parallelize, or before its first step
    """,
)
def test_optimizer_that_has_stepped(grid):
    model, inputs = Mlp(), batch()
    optimizer = torch.optim.AdamW(model.parameters())
    model(**inputs).backward()
    optimizer.step()
    parallel(grid, model, inputs)
    model(**inputs).backward()
    optimizer.step()


@on_ranks((1, 2))
def test_state_dict_needs_no_other_rank(grid):
    model = parallel(grid)
    if torch.distributed.get_rank() == 0:
        assert set(model.state_dict()) == set(Mlp().state_dict())


@on_ranks((1, 2))
def test_full_state_dicts_are_called_by_all(grid):
    model = parallel(grid)
    for _ in range(2):
        assert autotp.full_state_dict(model)["fc1.weight"].shape == (32, 8)
