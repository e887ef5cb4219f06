"""The search problem as an integer program, for what elimination cannot hold or a budget splits.

    min  sum u_i x_i + sum t_ij y_ij    x one-hot per variable, y_ij a distribution over pairs whose
                                        margins are x_i and x_j; sum m_i x_i <= budget

Solved by HiGHS through scipy. Pairs that are infinite have no y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Integer:
    """An assignment, its cost, and a bound that no assignment is below."""

    choice: tuple[int, ...]
    cost: float
    bound: float


def solve_ilp(
    unary: Sequence[Array],
    pairs: Sequence[tuple[int, int, Array]],
    memory: Sequence[Array] | None = None,
    budget: float | None = None,
    time_limit_s: float = 60.0,
) -> Integer | None:
    """Return the best assignment found in the time, or None if there is none."""
    starts = np.cumsum([0, *(len(u) for u in unary)])
    costs, rows, columns, values, targets = [*unary], [], [], [], []
    for i, u in enumerate(unary):
        _row(rows, columns, values, targets, range(starts[i], starts[i] + len(u)), 1.0, 1.0)
    size = int(starts[-1])
    for i, j, table in pairs:
        allowed = np.argwhere(np.isfinite(table))
        costs.append(table[np.isfinite(table)])
        for side, start, count in ((0, starts[i], len(unary[i])), (1, starts[j], len(unary[j]))):
            for a in range(count):
                row = len(targets)
                ys = size + np.flatnonzero(allowed[:, side] == a)
                _row(rows, columns, values, targets, ys, 1.0, 0.0)
                rows.append(row)
                columns.append(int(start) + a)
                values.append(-1.0)
        size += len(allowed)
    integral = np.zeros(size)
    integral[: starts[-1]] = 1
    shape = (len(targets), size)
    limits = [LinearConstraint(coo_array((values, (rows, columns)), shape=shape), targets, targets)]
    if memory is not None and budget is not None:
        weights = np.concatenate([*memory, np.zeros(size - starts[-1])])[None] / max(budget, 1.0)
        limits.append(LinearConstraint(weights, -np.inf, 1.0))
    found = milp(
        np.concatenate(costs),
        constraints=limits,
        integrality=integral,
        bounds=Bounds(0, 1),
        options={"time_limit": time_limit_s, "mip_rel_gap": 1e-9},
    )
    if found.x is None:
        return None
    choice = tuple(
        int(np.argmax(found.x[starts[i] : starts[i + 1]])) for i in range(len(unary))
    )
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
    return Integer(choice, total_cost(unary, pairs, choice), float(bound))


def _row(
    rows: list[int],
    columns: list[int],
    values: list[float],
    targets: list[float],
    where: Sequence[int] | range | Array,
    value: float,
    target: float,
) -> None:
    row = len(targets)
    for column in where:
        rows.append(row)
        columns.append(int(column))
        values.append(value)
    targets.append(target)


def total_cost(
    unary: Sequence[Array], pairs: Sequence[tuple[int, int, Array]], choice: Sequence[int]
) -> float:
    """Return the cost of an assignment, summed in the problem's order."""
    alone = sum(float(u[choice[i]]) for i, u in enumerate(unary))
    return alone + sum(float(t[choice[i], choice[j]]) for i, j, t in pairs)
