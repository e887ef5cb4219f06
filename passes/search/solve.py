"""The search: numbers in, numbers out.

In: a Problem, and perhaps a memory budget. Out: a Solution, the cheapest choice of every variable
and a bound that no choice beats. Without a budget see `minimum`, with one see `budget`;
`elimination` does the work.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

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


def solve(
    problem: Problem,
    memory_budget_bytes: float | None = None,
    *,
    max_table: int = 2**24,
    near_s: float = 0.0,
) -> Solution:
    """Return the cheapest choice, within `memory_budget_bytes` if it is given.

    Within a budget, one that costs at most `near_s` more than its bound. No table larger than
    `max_table` cells is made. The cost is inf where no choice is possible.

    Raises BudgetError if no choice fits the budget.
    """
    start = time.process_time()
    if 0 in problem.sizes:
        found = Found((0,) * len(problem.sizes), math.inf, math.inf, 0)
        return Solution(found.choice, math.inf, math.inf, 0.0, 0, found.method, 0.0)
    orders = Orders(max_table)
    found = minimise(problem, orders)
    held = problem.bytes(found.choice)
    if memory_budget_bytes is not None and math.isfinite(found.cost) and held > memory_budget_bytes:
        found = within(problem, memory_budget_bytes, found, orders, near_s)
    return Solution(
        choice=found.choice,
        cost_s=found.cost,
        lower_bound_s=found.lower,
        memory_bytes=problem.bytes(found.choice),
        width=found.width,
        method=found.method,
        seconds=time.process_time() - start,
    )


SMALLEST = "smallest"
"""The method of the choice of least memory, whatever it costs."""


def smallest(problem: Problem, *, max_table: int = 2**24) -> Solution:
    """Return the choice that needs the least memory."""
    start = time.process_time()
    found = minimise(only_memory(problem), Orders(max_table))
    cost_s = problem.seconds(found.choice)
    return Solution(
        choice=found.choice,
        cost_s=cost_s,
        lower_bound_s=cost_s,
        memory_bytes=problem.bytes(found.choice),
        width=found.width,
        method=SMALLEST,
        seconds=time.process_time() - start,
    )


__all__ = ["SMALLEST", "Problem", "Solution", "smallest", "solve"]
