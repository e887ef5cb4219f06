"""The choice of a grid for a call that gives a number of ranks, or "auto"."""

from __future__ import annotations

from typing import Any

from torch import nn

from autotp.cost_model.cluster import Cluster
from autotp.errors import GridError, PinError
from autotp.grid import Grid, is_open
from autotp.grid_table import Grids
from autotp.options import Options
from autotp.passes.factors import Factors
from autotp.passes.grids import factorisations, price_grids
from autotp.passes.network import Network
from autotp.passes.pins import Pins
from autotp.passes.planning import search_plan
from autotp.passes.program import Program
from autotp.plan import Plan
from autotp.progress import stage
from autotp.reading import inferred, split_inputs


def is_undecided(grid: object, shape: Grid) -> bool:
    """Say whether a grid is open, and there is more than one of as many ranks as `shape` has."""
    return is_open(grid) and len(factorisations(shape.world_size)) > 1


def refuse_open(grid: object, example_inputs: Any, pins: Pins | None) -> None:
    """Raise for what needs to know the grid before it is chosen."""
    named = "or name the grid, such as grid=(2, 2)"
    if example_inputs is None:
        raise GridError(
            f"grid={grid!r} is chosen for the sizes of example inputs, and there are none",
            at=[("example_inputs", "None: the plan is made at the first call")],
            remedy=(f"pass example_inputs, {named}"),
        )
    if pins:
        raise PinError(
            f"pins name axes, and grid={grid!r} has none before it is chosen",
            at=[(pattern, f"is pinned on {', '.join(axes)}") for pattern, axes in pins.items()],
            remedy=f"plan without pins, {named}: print(autotp.grids(...)) shows them",
        )


def best_plan(
    model: nn.Module, ranks: int, example_inputs: Any, cluster: Cluster, options: Options
) -> Plan:
    """Return the plan of a model on the fastest grid of so many ranks."""
    found, prices = priced(model, ranks, example_inputs, cluster, options)
    return search_plan(*found, prices.best, cluster, sharded_outputs=options.sharded).plan


def priced(
    model: nn.Module, ranks: int, example_inputs: Any, cluster: Cluster, options: Options
) -> tuple[tuple[Program, Network, Factors], Grids]:
    """Return a model as it is planned, and the prices of all grids of so many ranks."""
    args, kwargs = split_inputs(example_inputs)
    found = inferred(model, args, kwargs, options)
    with stage(f"price the grids of {ranks} ranks"):
        return found, price_grids(*found, ranks, cluster, options.sharded)
