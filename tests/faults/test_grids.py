"""Grids that are none, and processes that do not fit them."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.cost_model.cluster import bandwidth_bound
from autotp.grid import as_grid
from tests.end_to_end.on_ranks import on_ranks
from tests.faults.table import fault


def mlp():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))


@fault(
    "An axis has no rank, or fewer",
    """
    GridError: grid (0, -2) is not a grid of ranks
      at      axis 'row'   0 ranks: at least 1 is needed
      at      axis 'col'   -2 ranks: at least 1 is needed
      remedy  give one integer of at least 1 per axis, such as grid=(2, 2)
    """,
)
def test_sizes_below_one():
    as_grid((0, -2))


@fault(
    "The size of an axis is no integer",
    """
    GridError: grid (2.0, '4', True) is not a grid of ranks
      at      axis 'dp'   2.0 is a float, not an integer
      at      axis 'tp'   '4' is a str, not an integer
      at      axis 'pp'   True is a bool, not an integer
      remedy  give one integer of at least 1 per axis, such as grid=(2, 2)
    """,
)
def test_sizes_that_are_no_integers():
    as_grid({"dp": 2.0, "tp": "4", "pp": True})


@fault(
    "A grid without axes",
    """
    GridError: grid () is not a grid of ranks
      at      grid   has no axis
      remedy  give one integer of at least 1 per axis, such as grid=(2, 2)
    """,
)
def test_a_grid_without_axes():
    as_grid(())


@fault(
    "A grid that is no tuple, dict, int or DeviceMesh",
    """
    GridError: grid (None,) is not a grid of ranks
      at      axis 'col'   None is a NoneType, not an integer
      remedy  give one integer of at least 1 per axis, such as grid=(2, 2)
    """,
)
def test_a_grid_of_another_kind():
    as_grid(None)


@fault(
    "Names of axes that cannot be",
    """
    GridError: grid (2, 2) is not a grid of ranks
      at      axis 'data parallel'   is no name that Python could give an attribute
      at      axis 3                 is no name that Python could give an attribute
      remedy  give one integer of at least 1 per axis, such as grid=(2, 2)
    """,
)
def test_axis_names():
    as_grid({"data parallel": 2, 3: 2})


@fault(
    "Axes and names of different number",
    """
    GridError: 2 names for 3 axes of a grid
      at      names   ('row', 'col')
      at      sizes   (2, 2, 2)
      remedy  name each axis once, such as grid=dict(row=2, col=2)
    """,
)
def test_axis_names_of_another_number():
    autotp.Grid(("row", "col"), (2, 2, 2))


@fault(
    "Started without torchrun",
    """
    RuntimeStateError: grid 2x2 needs 4 ranks
      at      process   was started alone: no process group, no RANK, no WORLD_SIZE
      remedy  torchrun --nproc-per-node=4 your_script.py
    """,
)
def test_a_process_alone_is_told_how_to_start():
    autotp.parallelize(mlp(), (2, 2))


@on_ranks((1, 2))
@fault(
    "The grid is not as large as the process group",
    """
    GridError: grid 2x3 needs 6 ranks, the process group has 2
      at      grid            2 x 3 = 6
      at      process group   2 ranks
      remedy  a grid of 2 ranks: (1, 2), (2, 1)
      remedy  torchrun --nproc-per-node=6 your_script.py
    """,
)
def test_the_product_of_a_grid(grid):
    autotp.parallelize(mlp(), (2, 3))


@fault(
    "A grid is to be chosen, and nothing says for how many ranks",
    """
    GridError: grid="auto" takes all ranks of the process group, and there is none
      at      process   was started alone: no process group, no RANK, no WORLD_SIZE
      remedy  say how many ranks: grid=4
      remedy  torchrun --nproc-per-node=4 your_script.py
    """,
)
def test_auto_needs_ranks():
    autotp.plan(mlp(), "auto", (torch.randn(4, 8),))


@fault(
    "A grid is to be chosen, and a script was started without torchrun",
    """
    GridError: grid="auto" takes all ranks of the process group, and there is none
      at      process   was started alone: no process group, no RANK, no WORLD_SIZE
      remedy  say how many ranks: grid=4
      remedy  torchrun --nproc-per-node=4 your_script.py
    """,
)
def test_auto_needs_torchrun():
    autotp.parallelize(mlp(), "auto", (torch.randn(4, 8),))


@on_ranks((2, 2))
@fault(
    "A grid is to be chosen without example inputs",
    """
    GridError: grid='auto' is chosen for the sizes of example inputs, and there are none
      at      example_inputs   None: the plan is made at the first call
      remedy  pass example_inputs, or name the grid, such as grid=(2, 2)
    """,
)
def test_a_grid_is_chosen_for_inputs(grid):
    autotp.parallelize(mlp(), "auto")


@fault(
    "A grid is to be chosen, and pins name its axes",
    """
    PinError: pins name axes, and grid=4 has none before it is chosen
      at      0          is pinned on col
      at      2.weight   is pinned on row, col
      remedy  plan without pins, or name the grid, such as grid=(2, 2): print(autotp.grids(...)) shows them
    """,
)
def test_pins_need_a_grid():
    pins = {"0": {"col": "o"}, "2.weight": {"row": "S(0)", "col": "S(1)"}}
    autotp.plan(mlp(), 4, (torch.randn(4, 8),), pins=pins)


@fault(
    "No grid of so many ranks fits their memory",
    """
    BudgetError: no grid of 4 ranks has a plan that fits 2 kB per rank
      at      grid 4     2.75 kB at least
      at      grid 2x2   3.52 kB at least
      remedy  a budget of 2752 bytes or more: cluster.memory_bytes=2752
      remedy  more ranks, a smaller batch, or fewer trained parameters
    """,
)
def test_no_grid_fits():
    autotp.grids(mlp(), 4, (torch.randn(4, 8),), cluster=bandwidth_bound(memory_bytes=2e3))


@on_ranks((2, 2))
@fault(
    "A number of ranks that the process group does not have",
    """
    GridError: grid 8 needs 8 ranks, the process group has 4
      at      grid            8 = 8
      at      process group   4 ranks
      remedy  a grid of 4 ranks: (1, 4), (2, 2), (4, 1)
      remedy  torchrun --nproc-per-node=8 your_script.py
    """,
)
def test_another_number_of_ranks(grid):
    autotp.parallelize(mlp(), 8, (torch.randn(4, 8),))


@contextlib.contextmanager
def no_group_left():
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("grid", [(1, 1), (1,), 1, {"dp": 1}])
def test_a_grid_of_one_needs_no_torchrun(grid):
    model, x = mlp(), torch.randn(4, 8)
    expected = model(x)
    with no_group_left():
        assert torch.equal(autotp.parallelize(model, grid, (x,))(x), expected)
