"""The search: numbers in, numbers out.

In: a Problem, and perhaps a memory budget. Out: a Solution, the cheapest choice of every variable
and a bound that no choice beats. Without a budget see `minimum`, with one see `budget`;
`elimination` does the work.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from autotp.passes.search.budget import within
from autotp.passes.search.minimum import Found, Orders, minimise
from autotp.passes.search.problem import Problem, only_memory


@dataclass(frozen=True, slots=True)
class Solution:
    """One choice per variable, and how good it is.

    lower_bound_s   what no choice (within the budget) beats; equal to cost_s where it is exact
    width           the most neighbours that an eliminated variable had
    method          "elimination", "mini-buckets", "ilp", "lagrange", "lagrange+ilp" or "smallest"
    """

    choice: tuple[int, ...]
    cost_s: float
    lower_bound_s: float
    memory_bytes: float
    width: int
    method: str
    seconds: float


SMALLEST = "smallest"
"""The method of the choice of least memory, whatever it costs."""

MAX_TABLE = 2**24
"""Cells of the largest table that is made."""


@dataclass(slots=True)
class Solver:
    """The solutions of one problem: what was found for one budget is not looked for again.

    No table larger than `max_table` cells is made.
    """

    problem: Problem
    max_table: int = MAX_TABLE
    _orders: Orders = field(init=False)
    _cheapest: Found | None = field(init=False, default=None)
    _least: Found | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._orders = Orders(self.max_table)

    def solve(self, memory_budget_bytes: float | None = None, near_s: float = 0.0) -> Solution:
        """Return the cheapest choice, within `memory_budget_bytes` if it is given.

        Within a budget, one that costs at most `near_s` more than its bound. The cost is inf where
        no choice is possible.

        Raises BudgetError if no choice fits the budget.
        """
        start = time.process_time()
        if 0 in self.problem.sizes:
            found = Found((0,) * len(self.problem.sizes), math.inf, math.inf, 0)
            return Solution(found.choice, math.inf, math.inf, 0.0, 0, found.method, 0.0)
        found = self._cheapest = self._cheapest or minimise(self.problem, self._orders)
        held = self.problem.bytes(found.choice)
        budget = math.inf if memory_budget_bytes is None else memory_budget_bytes
        if math.isfinite(found.cost) and held > budget:
            found = within(self.problem, budget, (found, self._smallest()), self._orders, near_s)
        return self._solution(found, start)

    def smallest(self) -> Solution:
        """Return the choice that needs the least memory."""
        start = time.process_time()
        least = self._smallest()
        cost_s = self.problem.seconds(least.choice)
        return self._solution(Found(least.choice, cost_s, cost_s, least.width, SMALLEST), start)

    def _smallest(self) -> Found:
        if self._least is None:
            self._least = minimise(only_memory(self.problem), self._orders)
        return self._least

    def _solution(self, found: Found, start: float) -> Solution:
        return Solution(
            choice=found.choice,
            cost_s=found.cost,
            lower_bound_s=found.lower,
            memory_bytes=self.problem.bytes(found.choice),
            width=found.width,
            method=found.method,
            seconds=time.process_time() - start,
        )


def solve(
    problem: Problem, memory_budget_bytes: float | None = None, *, max_table: int = MAX_TABLE
) -> Solution:
    """Return the cheapest choice, as `Solver.solve` does: of a problem that is solved once."""
    return Solver(problem, max_table).solve(memory_budget_bytes)


__all__ = ["SMALLEST", "Problem", "Solution", "Solver", "solve"]
