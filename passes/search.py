"""The exact minimum of a search problem: numbers in, numbers out.

`solve` eliminates variables. Where tables would be too large it first shrinks the problem (small variables
eliminated, dominated choices dropped), then splits sums for a lower bound, improves by solving again with
some variables held, and asks the ILP. A memory budget is priced: for any price >= 0,

    min (seconds + price * bytes) - price * budget  <=  the cheapest plan within the budget

and the best price is found where the two lines of the last plans meet. A gap that remains goes to the ILP.
Source: Handler and Zang 1980, "A dual algorithm for the constrained shortest path problem".
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autotp.errors import BudgetError
from autotp.passes.dominance import factors_of, reduce_to_core, undominated
from autotp.passes.elimination import (
    Elimination,
    Factor,
    back_substitute,
    constant,
    plan_elimination,
    run,
)
from autotp.passes.ilp import cells, solve_ilp
from autotp.passes.problem import Problem, only_memory, restrict, weigh

EASY_WORK = 2**26
"""Cells below which an elimination is run as it is: under half a second."""

MAX_WORK, MAX_HELD = 2**32, 2**27
"""Cells computed (some 20 s) and kept (1 GB) above which sums are split."""

ILP_CELLS = 60_000
"""Columns above which the ILP is not asked: the first relaxation alone would take minutes."""

GAP = 1e-9
"""Share of the cost below which a gap is rounding."""

PRICES = 60
HOLDS = 16


@dataclass(frozen=True, slots=True)
class Solution:
    """One choice per variable, and how good it is.

    lower_bound_s   what no choice (within the budget) beats; equal to cost_s where it is exact
    width           the most neighbours that an eliminated variable had
    method          "elimination", "mini-buckets", "ilp", "lagrange" or "lagrange+ilp"
    """

    choice: tuple[int, ...]
    cost_s: float
    lower_bound_s: float
    memory_bytes: float
    width: int
    method: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Found:
    """A choice without budget: its cost, a lower bound, and how it was found."""

    choice: tuple[int, ...]
    cost: float
    lower: float
    width: int
    method: str = "elimination"


@dataclass(slots=True)
class _Orders:
    """Elimination orders by structure: prices change the numbers and not the order."""

    max_table: int
    known: dict[tuple[object, ...], Elimination] = field(default_factory=dict)

    def order(
        self,
        sizes: tuple[int, ...],
        factors: tuple[Factor, ...],
        leaves: Sequence[np.ndarray],
        max_table: int,
    ) -> Elimination:
        key = (sizes, factors, max_table)
        if key not in self.known:
            shapes = [t.shape for t in leaves]
            self.known[key] = plan_elimination(sizes, factors, shapes, max_table)
        return self.known[key]


def solve(
    problem: Problem, memory_budget_bytes: float | None = None, *, max_table: int = 2**24
) -> Solution:
    """Return the cheapest choice, within `memory_budget_bytes` if it is given.

    No table larger than `max_table` cells is made. The cost is inf where no choice is possible.

    Raises BudgetError if no choice fits the budget.
    """
    start = time.process_time()
    if 0 in problem.sizes:
        found = _Found((0,) * len(problem.sizes), math.inf, math.inf, 0)
        return Solution(found.choice, math.inf, math.inf, 0.0, 0, found.method, 0.0)
    orders = _Orders(max_table)
    found = _minimise(problem, orders)
    held = problem.bytes(found.choice)
    if memory_budget_bytes is not None and math.isfinite(found.cost) and held > memory_budget_bytes:
        found = _within(problem, memory_budget_bytes, found, orders)
    return Solution(
        choice=found.choice,
        cost_s=found.cost,
        lower_bound_s=found.lower,
        memory_bytes=problem.bytes(found.choice),
        width=found.width,
        method=found.method,
        seconds=time.process_time() - start,
    )


# Without a budget --------------------------------------------------------------------------------


def _minimise(problem: Problem, orders: _Orders) -> _Found:
    """Return the minimum: at once where that is easy, else of the core that is left."""
    factors, leaves = factors_of(problem)
    plan = orders.order(problem.sizes, factors, leaves, orders.max_table)
    if plan.exact and plan.work <= EASY_WORK:
        return _eliminate(problem, plan, leaves)
    core = reduce_to_core(problem, orders.max_table)
    small, kept = undominated(core.problem)
    best = _minimise_core(small, orders)
    choice = core.lift([int(k[c]) for k, c in zip(kept, best.choice, strict=True)])
    cost = problem.seconds(choice)
    exact = best.lower == best.cost
    lower = cost if exact else min(cost, best.lower + core.offset_s)
    return _Found(choice, cost, lower, max(best.width, core.elimination.width), best.method)


def _eliminate(problem: Problem, plan: Elimination, leaves: Sequence[np.ndarray]) -> _Found:
    tables = run(plan, leaves)
    choice = back_substitute(plan, tables, len(problem.sizes))
    cost = problem.seconds(choice)
    lower = cost if plan.exact else min(cost, constant(plan, tables))
    return _Found(
        choice, cost, lower, plan.width, "elimination" if plan.exact else "mini-buckets"
    )


def _minimise_core(problem: Problem, orders: _Orders) -> _Found:
    factors, leaves = factors_of(problem)
    limit = orders.max_table
    plan = orders.order(problem.sizes, factors, leaves, limit)
    while (plan.work > MAX_WORK or plan.held > MAX_HELD) and limit > 1:
        limit //= 8
        plan = orders.order(problem.sizes, factors, leaves, limit)
    found = _eliminate(problem, plan, leaves)
    if _is_closed(found):
        return found
    return _ask_ilp(problem, _improve(problem, found, plan.split, limit))


def _is_closed(found: _Found) -> bool:
    return found.cost - found.lower <= GAP * abs(found.cost) or math.isinf(found.lower)


def _improve(problem: Problem, found: _Found, split: Sequence[int], limit: int) -> _Found:
    """Solve again with variables of split sums held at their choice: all, halves, then one free."""
    free_one = [tuple(v for v in split if v != free) for free in split[:HOLDS]]
    for held in (tuple(split), tuple(split[::2]), tuple(split[1::2]), *free_one):
        choice = _solve_holding(problem, found.choice, set(held), limit)
        cost = problem.seconds(choice)
        if cost < found.cost:
            found = _Found(choice, cost, min(cost, found.lower), found.width, found.method)
        if _is_closed(found):
            break
    return found


def _solve_holding(
    problem: Problem, choice: Sequence[int], held: set[int], limit: int
) -> tuple[int, ...]:
    every = {n: np.arange(n) for n in sorted(set(problem.sizes))}
    one = {k: np.array([k]) for k in sorted(set(choice))}
    kept = [one[choice[v]] if v in held else every[n] for v, n in enumerate(problem.sizes)]
    smaller = restrict(problem, kept)
    factors, leaves = factors_of(smaller)
    plan = plan_elimination(smaller.sizes, factors, [t.shape for t in leaves], limit)
    picks = back_substitute(plan, run(plan, leaves), len(kept))
    return tuple(int(k[c]) for k, c in zip(kept, picks, strict=True))


def _ask_ilp(problem: Problem, found: _Found) -> _Found:
    """Return the better of `found` and the ILP's choice, with the better of their bounds."""
    if _is_closed(found) or cells(problem) > ILP_CELLS:
        return found
    answer = solve_ilp(problem)
    choice, cost = found.choice, found.cost
    if answer.choice is not None and problem.seconds(answer.choice) < cost:
        choice, cost = answer.choice, problem.seconds(answer.choice)
    lower = min(cost, max(found.lower, answer.lower_bound_s))
    return _Found(choice, cost, lower, found.width, "ilp")


# Within a budget ---------------------------------------------------------------------------------


def _within(problem: Problem, budget: float, cheapest: _Found, orders: _Orders) -> _Found:
    """Return the cheapest choice within `budget`, given the cheapest of all, which is not."""
    smallest = _minimise(only_memory(problem), orders)
    if smallest.lower > budget * (1 + GAP):
        raise _over_budget(problem, budget, smallest.lower)
    best, seen = _price(problem, budget, cheapest, smallest.choice, orders)
    if best is not None and _is_closed(best):
        return best
    best = _refine(problem, budget, cheapest, best, seen)
    if best.cost == math.inf:
        raise _over_budget(problem, budget, problem.bytes(smallest.choice))
    return best


def _over_budget(problem: Problem, budget: float, smallest: float) -> BudgetError:
    return BudgetError(
        f"no plan fits {budget / 1e9:.6g} GB per rank",
        at=[("smallest", f"{smallest / 1e9:.6g} GB is what the plan of least memory needs")],
        remedy=f"a budget of at least {math.ceil(smallest)} bytes, or more ranks",
    )
