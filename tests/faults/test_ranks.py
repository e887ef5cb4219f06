"""Ranks that differ, or of which one fails: all are told, before a collective that could hang."""

import contextlib
import copy
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.errors import RuntimeStateError
from tests.end_to_end.models import CLUSTER, Mlp
from tests.end_to_end.on_ranks import on_ranks
from tests.faults.table import fault

PINS = {"fc1": {"col": "o"}, "fc1.weight": {"col": "S(0)"}}


def is_odd():
    return dist.get_rank() == 1


def batch():
    torch.manual_seed(0)
    return {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}


def shared(width=32):
    torch.manual_seed(0)
    return Mlp(width)


def parallelize(model, grid, **options):
    return autotp.parallelize(model, grid, batch(), cluster=CLUSTER, **options)


# Differences -------------------------------------------------------------------------------------


@on_ranks((1, 2))
@fault(
    "Another version of torch on a rank",
    """
    RuntimeStateError: the ranks have different versions
      at      rank 1   torch: 2.11.0, on rank 0 2.12.0
      remedy  install the same versions on every machine
    """,
)
def test_versions(grid):
    with mock.patch("torch.__version__", "2.11.0" if is_odd() else "2.12.0"):
        parallelize(shared(), grid)


@on_ranks((1, 2))
@fault(
    "Another version of autotp on a rank",
    """
    RuntimeStateError: the ranks have different versions
      at      rank 1   autotp: 9.0, on rank 0 9.1
      remedy  install the same versions on every machine
    """,
)
def test_own_versions(grid):
    with mock.patch("autotp.ranks.VERSION", "9.0" if is_odd() else "9.1"):
        parallelize(shared(), grid)


@on_ranks((2, 2))
@fault(
    "Another grid on a rank, of as many ranks",
    """
    RuntimeStateError: the ranks have different calls of autotp.parallelize
      at      rank 1   grid: 4x1 ('row', 'col'), on rank 0 2x2 ('row', 'col')
      remedy  make the same call on every rank
    """,
)
def test_grids(grid):
    parallelize(shared(), (4, 1) if is_odd() else grid)


@on_ranks((2, 2))
@fault(
    "A grid that does not fit, on one rank alone",
    """
    GridError: grid 3x1 needs 3 ranks, the process group has 4
      at      grid            3 x 1 = 3
      at      process group   4 ranks
      remedy  a grid of 4 ranks: (1, 4), (2, 2), (4, 1)
      remedy  torchrun --nproc-per-node=3 your_script.py
    """,
)
def test_one_grid(grid):
    parallelize(shared(), (3, 1) if is_odd() else grid)


@on_ranks((1, 2))
@fault(
    "Other options, another mode, and a plan on one rank alone",
    """
    RuntimeStateError: the ranks have different calls of autotp.parallelize
      at      rank 1   mode: eval, on rank 0 train
      at      rank 1   plan: given, on rank 0 none
      at      rank 1   strict: True, on rank 0 False
      remedy  make the same call on every rank
    """,
)
def test_calls(grid):
    plan = autotp.plan(shared(), grid, batch(), cluster=CLUSTER) if is_odd() else None
    parallelize(shared().train(not is_odd()), grid, strict=is_odd(), plan=plan)


@on_ranks((1, 2))
@fault(
    "Another model on a rank: weights of another shape",
    """
    RuntimeStateError: the ranks have different models
      at      rank 1   fc1.weight: float32[40, 8], on rank 0 float32[32, 8]
      at      rank 1   fc1.bias: float32[40], on rank 0 float32[32]
      at      rank 1   fc2.weight: float32[8, 40], on rank 0 float32[8, 32]
      remedy  build the same model, and pass inputs of the same shapes, on every rank
    """,
)
def test_shapes(grid):
    parallelize(shared(32 + 8 * is_odd()), grid)


class Squared(Mlp):
    def forward(self, x, target=None):
        return super().forward(x, target) ** 2


@on_ranks((1, 2))
@fault(
    "Another model on a rank: other ops",
    """
    RuntimeStateError: the ranks have different models
      at      rank 1   the graph's ops: ..., on rank 0 ...
      remedy  build the same model, and pass inputs of the same shapes, on every rank
    """,
)
def test_ops(grid):
    torch.manual_seed(0)
    parallelize(Squared() if is_odd() else Mlp(), grid)


@on_ranks((1, 2))
@fault(
    "Other weights on a rank",
    """
    RuntimeStateError: the ranks have different weights
      at      rank 1   fc1.weight: ..., on rank 0 ...
      at      rank 1   fc1.bias: ..., on rank 0 ...
      at      rank 1   fc2.weight: ..., on rank 0 ...
      at      rank 1   and 1 more
      remedy  call torch.manual_seed before the model is built, or load one checkpoint
    """,
)
def test_weights(grid):
    torch.manual_seed(dist.get_rank())
    parallelize(Mlp(), grid)


@on_ranks((1, 2))
@fault(
    "Another plan on a rank",
    """
    RuntimeStateError: the ranks have different plans
      at      rank 1   plan: ..., on rank 0 ...
      remedy  give every rank the same plan and versions
    """,
)
def test_plans(grid):
    pins = PINS if is_odd() else {"fc1": {"col": "R"}, "fc2": {"col": "R"}}
    plan = autotp.plan(shared(), grid, batch(), cluster=CLUSTER, pins=pins)
    parallelize(shared(), grid, plan=plan)


# Failures of one rank ----------------------------------------------------------------------------


class Branch(Mlp):
    def forward(self, x, target=None):
        return super().forward(x, target) if x.sum() > 0 else x


@on_ranks((1, 2))
@fault(
    "A model that one rank alone cannot capture",
    """
    CaptureError: the model's Python depends on the values of a tensor, and a plan is made before them
      at      test_ranks.py:...   return super().forward(x, target) if x.sum() > 0 else x
      at      torch               Could not guard on data-dependent expression ...
      remedy  compute with the values in tensors: torch.where in place of if and of x[mask]
      remedy  compute the number before the model is called, and pass it: a constant of the plan
      remedy  put these lines into a torch.library custom op: it runs whole, or as autotp.rule says
    """,
)
def test_capture(grid):
    parallelize(Branch() if is_odd() else Mlp(), grid)


def failing(where):
    """Fail on rank 1 where a step of the compiler is called."""
    error = MemoryError("not enough memory")
    return mock.patch(where, side_effect=error) if is_odd() else contextlib.nullcontext()


def failure_of_rank_1(grid, where):
    model = shared()
    try:
        with failing(where):
            parallelize(model, grid)
    except MemoryError as error:  # rank 1 raises its own
        assert is_odd()
        raise RuntimeStateError(
            "rank 1 failed, and the others stop with it",
            at=[("rank 1", f"MemoryError: {error}")],
            remedy="see the traceback of rank 1",
        ) from error


@on_ranks((1, 2))
@fault(
    "One rank fails while its program is emitted",
    """
    RuntimeStateError: rank 1 failed, and the others stop with it
      at      rank 1   MemoryError: not enough memory
      remedy  see the traceback of rank 1
    """,
)
def test_emit(grid):
    failure_of_rank_1(grid, "autotp.api.emit")


@on_ranks((1, 2))
def test_no_rank_is_left_waiting_wherever_one_fails(grid):
    for step in (
        "reading.read_network",
        "api.infer_factors",
        "api.verify",
        "distribute.take_shard",
    ):
        try:
            failure_of_rank_1(grid, f"autotp.{step}")
        except RuntimeStateError as error:
            assert "rank 1   MemoryError" in str(error), error
        else:
            raise AssertionError(step)


# Modes -------------------------------------------------------------------------------------------


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.fc(x)))


@on_ranks((1, 2))
def test_submodules_in_other_modes_are_programs_of_their_own(grid):
    torch.manual_seed(0)
    one, x = Dropped(), torch.randn(4, 8)
    ours = autotp.parallelize(copy.deepcopy(one), grid, (x,), cluster=CLUSTER)
    layouts = {n: p.placements for n, p in ours.named_parameters()}
    for model in (one, ours):
        model.drop.eval()
    assert torch.allclose(ours(x), one(x), atol=1e-6)  # nothing is dropped
    for model in (one, ours):
        model.norm.eval()
    assert torch.allclose(ours(x), one(x), atol=1e-6)
    programs = len(ours._autotp.modes)
    ours.train()
    assert (ours(x) == 0).any()
    ours.drop.eval()
    ours(x)
    assert len(ours._autotp.modes) == programs == 3  # each is planned once
    assert {n: p.placements for n, p in ours.named_parameters()} == layouts


@on_ranks((1, 2))
def test_a_frozen_parameter_gets_no_gradient(grid):
    model = parallelize(shared(), grid)
    model.fc1.weight.requires_grad_(False)
    model(**batch()).backward()
    assert model.fc1.weight.grad is None and model.fc2.weight.grad is not None
