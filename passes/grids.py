"""Which grid: every factorisation of a number of ranks, and every order of its axes, each planned.

In: a captured model, read and inferred once. Out: Grids, a price for each grid, the fastest first.
The order of the axes says which of them run inside a node (`Cluster.link`), so that (8, 128) and
(128, 8) are two grids. Each is planned by a search at the least that moves may take, which bounds
every plan of the grid; the fastest by one with a call for each move too.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from autotp.cost_model.cluster import Cluster
from autotp.errors import BudgetError
from autotp.grid import Grid, as_grid
from autotp.grid_table import GridPrice, Grids
from autotp.layouts import Shard
from autotp.notation import bytes_text
from autotp.passes.anatomy import Anatomy, read_anatomy
from autotp.passes.choices import split_ways
from autotp.passes.factors import Factors
from autotp.passes.found import budget
from autotp.passes.network import Network
from autotp.passes.planning import Quick, search_plan
from autotp.passes.program import Program
from autotp.passes.workers import in_parallel
from autotp.plan import Plan

MAX_AXES = 3

FINALISTS = 4
"""Grids that are searched twice: a plan of one search is up to 2% slower than that of both."""

LISTED = 5
"""Grids that an error lists, those that need the least memory."""

NOTABLE = 0.1
"""A share of the flops, or of the parameters' bytes, from which it is said what an axis splits."""

WORDS = {"batch": "batch", "sequence": "sequence", "inner": "inner dims", "stream": "hidden dim"}
"""What the dims of an anatomy are called in the table of grids."""


def factorisations(ranks: int) -> tuple[Grid, ...]:
    """Return every grid of `ranks` with one to MAX_AXES axes of more than one rank, in order.

    >>> [grid.sizes for grid in factorisations(8)]
    [(8,), (2, 4), (4, 2), (2, 2, 2)]
    """
    found: dict[int, list[tuple[int, ...]]] = {1: [(ranks,)]}
    for axes in range(2, MAX_AXES + 1):
        found[axes] = [
            (*outer[:-1], n, outer[-1] // n)
            for outer in found[axes - 1]
            for n in range(2, outer[-1])
            if outer[-1] % n == 0
        ]
    return tuple(as_grid(sizes) for axes in found.values() for sizes in axes)


def price_grids(
    program: Program,
    network: Network,
    factors: Factors,
    ranks: int,
    cluster: Cluster,
    sharded_outputs: bool = False,
) -> Grids:
    """Return the price of the best plan on every grid of `ranks`, the fastest first.

    Raises BudgetError where no plan of any grid fits the memory of a rank.
    """
    anatomy = read_anatomy(program, network, factors)

    def price(grid: Grid, quick: Quick = "best") -> GridPrice:
        places = tuple(cluster.place(grid.sizes, axis) for axis in range(len(grid.sizes)))
        given = (program, network, factors, grid, cluster)
        try:
            plan = search_plan(*given, sharded_outputs=sharded_outputs, quick=quick).plan
        except BudgetError as error:
            return GridPrice(grid, places, memory_bytes=error.needed_bytes)
        return GridPrice(
            grid,
            places,
            splits=axis_words(plan, anatomy),
            step_time_s=plan.step_time_s,
            lower_bound_s=plan.lower_bound_s,
            comm_bytes=plan.comm_bytes,
            memory_bytes=plan.memory_bytes,
            method=plan.method,
        )

    # The fewest axes first: they need the most memory, and plans over the limit take the longest.
    prices = sorted(in_parallel(price, factorisations(ranks)), key=GridPrice.rank_key)
    first = [row for row in prices[:FINALISTS] if row.fits]
    again = in_parallel(lambda row: _better(row, price(row.grid, "apart")), first)
    rows = sorted([*again, *prices[len(first) :]], key=GridPrice.rank_key)
    found = Grids(cluster.name, program.train, tuple(rows))
    if not found[0].fits:
        raise _over_budget(found, budget(cluster) or math.inf)
    return found


def _better(bounding: GridPrice, other: GridPrice) -> GridPrice:
    """Return the better price of one grid, under the bound of the first."""
    best = min(bounding, other, key=GridPrice.rank_key)
    return replace(best, lower_bound_s=min(bounding.lower_bound_s, best.step_time_s))


def _over_budget(grids: Grids, limit: float) -> BudgetError:
    least = min(grids, key=lambda row: row.memory_bytes)
    needed, ranks = least.memory_bytes, least.grid.world_size
    return BudgetError(
        f"no grid of {ranks} ranks has a plan that fits {bytes_text(limit)} per rank",
        at=[
            (f"grid {row.grid}", f"{bytes_text(row.memory_bytes)} at least")
            for row in grids.prices[:LISTED]
        ],
        remedy=(
            f"a budget of {needed} bytes or more: cluster.memory_bytes={needed}",
            "more ranks, a smaller batch, or fewer trained parameters",
        ),
    )


# What an axis splits -----------------------------------------------------------------------------


def axis_words(plan: Plan, anatomy: Anatomy) -> tuple[tuple[str, ...], ...]:
    """Return per axis what it splits of the model's products, the most flops first.

    `parameters` stands for weights that rest in shards and are gathered to be read.
    """
    flops: list[Counter[str]] = [Counter() for _ in plan.grid.sizes]
    for op, d in zip(anatomy.network.ops, plan.decisions, strict=True):
        if d.flops:
            ways = split_ways(op, anatomy.factors)
            for axis, name in enumerate(d.choices):
                atoms = {w.atom for w in ways.get(name, {}).values()}
                flops[axis][_word(atoms, anatomy)] += d.flops
    gathered = _gathered(plan)
    return tuple(_notable(flops[axis], gathered[axis]) for axis in range(len(plan.grid.sizes)))


def _word(atoms: set[int], anatomy: Anatomy) -> str:
    found = {anatomy.factors.atoms.find(atom) for atom in atoms}
    known = (word for kind, word in WORDS.items() if found & anatomy.dims[kind])
    return next(known, "other dims") if atoms else ""


def _notable(flops: Counter[str], gathered: float) -> tuple[str, ...]:
    total = sum(flops.values())
    words = [word for word, n in flops.most_common() if word and n >= NOTABLE * total]
    return (*words, *(["parameters"] if gathered >= NOTABLE else []))


def _gathered(plan: Plan) -> list[float]:
    """Return per axis the share of the parameters' elements that it shards and no op reads so."""
    read: dict[str, set[tuple[int, bool]]] = {}
    for d in plan.decisions:
        for value, layout in zip(d.reads, d.operands, strict=True):
            read.setdefault(value, set()).update(
                (axis, isinstance(t, Shard)) for axis, t in enumerate(layout)
            )
    every = [(r, math.prod(r.shape)) for r in plan.params.values()]
    total = sum(n for _, n in every) or 1
    return [
        sum(
            n
            for r, n in every
            if isinstance(r.layout[axis], Shard) and (axis, True) not in read.get(r.value, set())
        )
        / total
        for axis in range(len(plan.grid.sizes))
    ]
