"""The search problem as a 0/1 program, solved by HiGHS.

x_ik = 1 where variable i takes choice k; y_ijkl >= 0 is the flow between choices k and l of a pair:

    minimise  sum unary x + sum pair y
    where     sum_k x_ik = 1,  sum_l y_ijkl = x_ik,  sum_k y_ijkl = x_jl,  sum bytes x <= budget

Unreachable moves have no y. Work is limited by nodes, not by time, so that all
ranks find the same.
Source: Koster, van Hoesel and Kolen 1998, "The partial constraint satisfaction problem".
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from autotp.passes.search.problem import Problem

MAX_NODES = 2_000
NODE_CELLS = 300_000
"""Nodes times cells that one call may explore: a few seconds."""

MAX_CELLS = 20_000
"""Columns above which not to ask: the relaxations alone would take minutes."""

SCALE = 1e3
"""Largest coefficient of objective and budget: the solver's tolerances are absolute (1e-6)."""


@dataclass(frozen=True, slots=True)
class Bounded:
    """The best choice found, None if there is none, and a bound that no choice beats."""

    choice: tuple[int, ...] | None
    lower_bound_s: float


def cells(problem: Problem) -> int:
    """Return the number of columns of the program."""
    return sum(problem.sizes) + sum(int(t.size) for _, _, t in problem.pairs)


def solve_ilp(problem: Problem, budget_bytes: float | None = None, gap: float = 0.0) -> Bounded:
    """Return the cheapest choice within the budget, if there is one, as far as the nodes reach.

    Or one whose cost is at most this share of it from the bound.
    """
    start = np.concatenate([[0], np.cumsum(problem.sizes)]).astype(int)
    costs, rows = _program(problem, start)
    finite = np.isfinite(costs)
    scale = SCALE / max(float(np.abs(costs[finite]).max(initial=0.0)), 1e-300)
    constraints = [rows]
    if budget_bytes is not None:
        constraints.append(_budget(problem, budget_bytes, len(costs)))
    integral = np.arange(len(costs)) < start[-1]
    nodes = max(10, min(MAX_NODES, NODE_CELLS // len(costs)))
    result = milp(
        np.where(finite, costs, 0.0) * scale,
        integrality=integral.astype(int),
        bounds=Bounds(0, np.where(finite, 1.0, 0.0)),
        constraints=constraints,
        options={"mip_rel_gap": gap, "node_limit": nodes},
    )
    bound = getattr(result, "mip_dual_bound", None)
    lower = np.inf if result.status == 2 else -np.inf if bound is None else bound / scale
    if result.x is None:
        return Bounded(None, float(lower))
    spans = itertools.pairwise(start)
    return Bounded(tuple(int(result.x[a:b].argmax()) for a, b in spans), float(lower))


def _program(problem: Problem, start: np.ndarray) -> tuple[np.ndarray, LinearConstraint]:
    """Return the costs of all columns, and the rows that make x a choice and y its pairs."""
    count, last = len(problem.sizes), int(start[-1])
    row = [np.repeat(np.arange(count), problem.sizes)]
    column, value = [np.arange(last)], [np.ones(last)]
    costs, right = [np.concatenate(problem.unary)], [np.ones(count)]
    for i, j, table in problem.pairs:
        flows = last + np.arange(table.size).reshape(table.shape)
        for v, lines in ((i, flows), (j, flows.T)):
            own = count + np.arange(len(lines))
            row += [np.repeat(own, lines.size // len(lines)), own]
            column += [lines.ravel(), start[v] + np.arange(len(lines))]
            value += [np.ones(lines.size), -np.ones(len(lines))]
            right.append(np.zeros(len(lines)))
            count += len(lines)
        costs.append(table.ravel())
        last += table.size
    entries = (np.concatenate(value), (np.concatenate(row), np.concatenate(column)))
    matrix = coo_array(entries, shape=(count, last)).tocsr()
    equal = np.concatenate(right)
    return np.concatenate(costs), LinearConstraint(matrix, equal, equal)


def _budget(problem: Problem, budget_bytes: float, columns: int) -> LinearConstraint:
    assert problem.memory is not None
    held = np.concatenate(problem.memory)
    unit = SCALE / max(float(held.max(initial=0.0)), 1e-300)
    row = np.concatenate([held * unit, np.zeros(columns - len(held))])[None, :]
    return LinearConstraint(row, -np.inf, budget_bytes * unit)
