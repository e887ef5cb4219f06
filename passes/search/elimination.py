"""Exact min-sum variable elimination, with repeated layers computed once.

In: the domain sizes and the factors (a table number, the variables of its axes). `plan_elimination`
decides the order without touching a number; `run` computes its distinct operations;
`back_substitute` reads the choices. To eliminate v is to replace the factors that hold v by

    out[neighbours] = min_v sum_f f[v, neighbours]

Equal operations (the same tables, the same layout of axes) have the same `out`, so all variables of
one operation are eliminated together, in all layers at once. Where `out` would be too large the sum
is split (mini-buckets): then the minimum is a lower bound, and `exact` is false.
Source: Dechter 1999, "Bucket elimination"; Dechter and Rish 2003, "Mini-buckets".
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

CALL = 20_000
"""Cells that are computed in the time that one more numpy operation costs."""

BLOCK = 2**18
"""Cells above which a sum is minimised in parts that stay in the cache."""

TOGETHER, ROWS = 16, 64
"""How many: of the variable that is minimised out, and of the first that stays."""

TIE = 1e-13
"""Costs closer than this share of the total are equal: the lowest choice wins."""

Inputs = tuple[tuple[tuple[int, ...], int], ...]  # (place of each axis, table), sorted
Key = tuple[int, Inputs]


@dataclass(frozen=True, slots=True)
class Factor:
    """A table and the variable of each of its axes."""

    table: int
    scope: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One distinct operation: the tables that it adds, and how their axes stand in the sum.

    Axis 0 of the sum is the variable that is minimised out.
    """

    tables: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]
    spread: tuple[tuple[slice | None, ...], ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Elimination:
    """The order and the operations.

    steps      distinct operations; step k makes table `leaves + k`
    buckets    per eliminated variable, in order: the factors that held it
    rest       factors that are left over: constants, and what was not to be eliminated
    split      variables whose sum was split
    width      the most neighbours that an eliminated variable had
    work       cells that are computed, `held` cells that are kept
    """

    leaves: int
    steps: tuple[Step, ...]
    buckets: tuple[tuple[int, tuple[Factor, ...]], ...]
    rest: tuple[Factor, ...]
    split: tuple[int, ...]
    width: int
    work: int
    held: int

    @property
    def exact(self) -> bool:
        """Say whether the minimum is the true one."""
        return not self.split


@dataclass(slots=True)
class _Planner:
    sizes: Sequence[int]
    shapes: list[tuple[int, ...]]
    max_table: int
    max_arity: int | None
    incident: list[list[Factor]]
    base: int
    steps: list[Step] = field(default_factory=list)
    made: dict[Key, int] = field(default_factory=dict)
    buckets: list[tuple[int, tuple[Factor, ...]]] = field(default_factory=list)
    constants: list[Factor] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    width: int = 0
    numbers: dict[Key, int] = field(default_factory=dict)
    kind: dict[int, int] = field(default_factory=dict)  # variable -> number of its operation
    scopes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    members: dict[int, set[int]] = field(default_factory=dict)
    queue: list[tuple[int, float, int, int]] = field(default_factory=list)


def plan_elimination(
    sizes: Sequence[int],
    factors: Iterable[Factor],
    shapes: Sequence[tuple[int, ...]],
    max_table: int,
    max_arity: int | None = None,
) -> Elimination:
    """Return the order: the smallest resulting table first, then the least cells per variable.

    All that is no larger than the largest input table counts as small. `shapes` are those of the
    tables that the factors name. With `max_arity`, variables with more neighbours stay.
    """
    incident: list[list[Factor]] = [[] for _ in sizes]
    for factor in factors:
        for variable in factor.scope:
            incident[variable].append(factor)
    base = max((math.prod(shape) for shape in shapes), default=1)
    p = _Planner(sizes, list(shapes), max_table, max_arity, incident, base)
    _refresh(p, range(len(sizes)))
    while p.queue:
        entry = heapq.heappop(p.queue)
        if entry == _rank(p, entry[-1]):
            _refresh(p, sorted(_eliminate_all(p, entry[-1])))
    return _result(p, len(shapes))


def _result(p: _Planner, leaves: int) -> Elimination:
    left = [f for v in sorted(p.kind) for f in p.incident[v] if f.scope[0] == v]
    return Elimination(
        leaves=leaves,
        steps=tuple(p.steps),
        buckets=tuple(p.buckets),
        rest=(*p.constants, *left),
        split=tuple(p.split),
        width=p.width,
        work=sum(math.prod(s.shape) for s in p.steps),
        held=sum(math.prod(s.shape[1:]) for s in p.steps),
    )


def _refresh(p: _Planner, variables: Iterable[int]) -> None:
    """Note again which operation eliminates each variable, and queue what changed."""
    touched: dict[int, None] = {}
    for v in variables:
        if v in p.kind:
            touched[p.kind[v]] = None
            p.members[p.kind[v]].discard(v)
        key, p.scopes[v] = _describe(p.incident[v], v)
        p.kind[v] = p.numbers.setdefault(key, len(p.numbers))
        touched[p.kind[v]] = None
        p.members.setdefault(p.kind[v], set()).add(v)
    for number in touched:
        entry = _rank(p, number)
        if entry is not None:
            heapq.heappush(p.queue, entry)


def _rank(p: _Planner, number: int) -> tuple[int, float, int, int] | None:
    """Return the place of an operation in the queue, or None if no variable wants it."""
    members = p.members[number]
    if not members:
        return None
    first = min(members)
    scope = p.scopes[first]
    if p.max_arity is not None and len(scope) - 1 > p.max_arity:
        return None
    cells = math.prod(p.sizes[u] for u in scope)
    result = cells // p.sizes[first]
    return max(result, p.base), (cells + CALL) / len(members), first, number


def _describe(factors: Sequence[Factor], v: int) -> tuple[Key, tuple[int, ...]]:
    """Return the operation that eliminates v, free of variable numbers, and its variables."""
    scope = tuple(sorted({u for f in factors for u in f.scope}))
    place = {u: k for k, u in enumerate(scope)}
    inputs = sorted((tuple(place[u] for u in f.scope), f.table) for f in factors)
    return (place[v], tuple(inputs)), scope


def _eliminate_all(p: _Planner, number: int) -> set[int]:
    """Eliminate those variables of one operation that are no neighbours; return all theirs."""
    beside: set[int] = set()
    gone = []
    for v in sorted(p.members[number]):
        if v not in beside:
            beside.update(u for u in p.scopes[v] if u != v)
            gone.append(v)
    for v in gone:
        _eliminate(p, v)
        p.members[number].discard(v)
        del p.kind[v]
    return beside


def _eliminate(p: _Planner, v: int) -> None:
    factors, scope = p.incident[v], p.scopes[v]
    p.buckets.append((v, tuple(factors)))
    p.width = max(p.width, len(scope) - 1)
    parts = _partition(p, factors, v)
    if len(parts) > 1:
        p.split.append(v)
    made = [_project(p, part, v) for part in parts]
    for u in scope:
        if u != v:
            kept = [f for f in p.incident[u] if v not in f.scope]
            p.incident[u] = kept + [f for f in made if u in f.scope]
    p.constants += [f for f in made if not f.scope]
    p.incident[v] = []


def _partition(p: _Planner, factors: Sequence[Factor], v: int) -> list[list[Factor]]:
    """Split the factors of v so that no result is too large: largest first, where it fits first."""
    if _result_size(p, factors, v) <= p.max_table:
        return [list(factors)]
    parts: list[list[Factor]] = []
    for factor in sorted(factors, key=lambda f: -math.prod(p.shapes[f.table])):
        fits = (t for t in parts if _result_size(p, [*t, factor], v) <= p.max_table)
        part = next(fits, None)
        if part is None:
            parts.append([factor])
        else:
            part.append(factor)
    return parts


def _result_size(p: _Planner, factors: Sequence[Factor], v: int) -> int:
    return math.prod(p.sizes[u] for u in {u for f in factors for u in f.scope if u != v})


def _project(p: _Planner, factors: Sequence[Factor], v: int) -> Factor:
    key, scope = _describe(factors, v)
    others = tuple(u for u in scope if u != v)
    if key not in p.made:
        p.made[key] = len(p.shapes)
        p.shapes.append(tuple(p.sizes[u] for u in others))
        p.steps.append(_step(p, key, (p.sizes[v], *p.shapes[-1])))
    return Factor(p.made[key], others)


def _step(p: _Planner, key: Key, shape: tuple[int, ...]) -> Step:
    first, inputs = key
    ordered = sorted(inputs, key=lambda i: (math.prod(p.shapes[i[1]]), i))
    turns, spread = [], []
    for places, _ in ordered:
        axes = [0 if k == first else k + (k < first) for k in places]
        turns.append(tuple(sorted(range(len(axes)), key=axes.__getitem__)))
        spread.append(tuple(slice(None) if k in axes else None for k in range(len(shape))))
    return Step(tuple(t for _, t in ordered), tuple(turns), tuple(spread), shape)


def run(elimination: Elimination, leaves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return all tables: the leaves, then the result of each step."""
    tables = list(leaves)
    for step in elimination.steps:
        views = [
            tables[t].transpose(turn)[spread]
            for t, turn, spread in zip(step.tables, step.turns, step.spread, strict=True)
        ]
        tables.append(_minimum(views, math.prod(step.shape)))
    return tables


def _minimum(views: Sequence[np.ndarray], cells: int) -> np.ndarray:
    """Return the minimum over axis 0 of the sum of `views`.

    Large ones by torch, whose loops over broadcast doubles take less than half of numpy's time.
    Whole sums, those of the first `apart` tables and one more, are made in one place: new memory
    for each may take longer than its sum.
    """
    ends = range(1, len(views) + 1)
    shapes = [np.broadcast_shapes(*(view.shape[1:] for view in views[:n])) for n in ends]
    shape = shapes[-1]
    if cells <= BLOCK or not shape:
        return np.asarray(_sum(views).min(axis=0))
    apart = max(1, shapes.index(shape))
    tables = [torch.from_numpy(view) for view in views]
    least = torch.full(shape, math.inf, dtype=torch.float64)
    sums = torch.empty((TOGETHER, min(ROWS, shape[0]), *shape[1:]), dtype=torch.float64)
    lowest = torch.empty(sums.shape[1:], dtype=torch.float64)
    for row in range(0, shape[0], ROWS):
        there = [t if t.shape[1] == 1 else t[:, row : row + ROWS] for t in tables]
        found = least[row : row + ROWS]
        low = lowest[: len(found)]
        for k in range(0, len(views[0]), TOGETHER):
            parts = [table[k : k + TOGETHER] for table in there]
            total = _sum(parts[:apart])
            place = sums[: len(total), : len(found)]
            for table in parts[apart:]:
                total = torch.add(total, table, out=place)
            torch.minimum(found, torch.amin(total, 0, out=low), out=found)
    return least.numpy()


Array = TypeVar("Array", np.ndarray, torch.Tensor)


def _sum(views: Sequence[Array]) -> Array:
    total = views[0]
    for view in views[1:]:
        total = total + view
    return total


def constant(elimination: Elimination, tables: Sequence[np.ndarray]) -> float:
    """Return the minimum that the elimination found: the sum of the tables without axes."""
    return math.fsum(float(tables[f.table]) for f in elimination.rest if not f.scope)


def back_substitute(
    elimination: Elimination,
    tables: Sequence[np.ndarray],
    size: int,
    known: dict[int, int] | None = None,
) -> tuple[int, ...]:
    """Return the choice of each of `size` variables, last eliminated first.

    This is the one place where ties are broken: the lowest choice.
    """
    choice = dict(known or {})
    total = constant(elimination, tables)
    slack = TIE * abs(total) if math.isfinite(total) else 0.0
    for v, factors in reversed(elimination.buckets):
        costs = _sum(
            [
                tables[f.table][tuple(slice(None) if u == v else choice[u] for u in f.scope)]
                for f in factors
            ]
        )
        choice[v] = int(np.argmax(costs <= costs.min() + slack))
    return tuple(choice[v] for v in range(size))
