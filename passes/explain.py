"""What a plan would take if one op chose otherwise: the search solved again without its choice.

In: the solved search problem. Out: RunnersUp, which a Plan carries as `alternatives`. Each
runner-up is a whole plan, the cheapest one in which the op has none of the choices before it; every
other op is free to follow. Nothing is priced again: the problem's tables are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from autotp.errors import BudgetError
from autotp.notation import choice_text
from autotp.passes.search.problem import restrict
from autotp.passes.search.solve import Solution, solve
from autotp.passes.search_model import Model
from autotp.plan import Alternative, Plan

RUNNERS_UP = 3


@dataclass(frozen=True, slots=True)
class RunnersUp:
    """Find the best plans in which one op chooses otherwise.

    ops     plan name -> name in the network
    read    reads a solution of the whole problem as a plan
    """

    model: Model
    solution: Solution
    ops: Mapping[str, str]
    budget_bytes: float | None
    read: Callable[[Solution], Plan]

    def __call__(self, name: str) -> list[Alternative]:
        """Return the runners-up of the op called `name`, best first; fewer where it has fewer."""
        kinds = [(v.kind, v.name) for v in self.model.variables]
        number = kinds.index(("op", self.ops[name]))
        refused = [self.solution.choice[number]]
        found: list[Alternative] = []
        while len(found) < RUNNERS_UP:
            solution = solve_without(self.model, number, refused, self.budget_bytes)
            if solution is None:
                break
            refused.append(solution.choice[number])
            found.append(alternative(self.read(solution), name))
        return found


def solve_without(
    model: Model, number: int, refused: list[int], budget_bytes: float | None
) -> Solution | None:
    """Return the best solution in which a variable has none of the `refused` choices, if any."""
    sizes = model.problem.sizes
    every = {n: np.arange(n) for n in sorted(set(sizes))}
    kept = [every[n] for n in sizes]
    kept[number] = np.setdiff1d(kept[number], refused)
    if not len(kept[number]):
        return None
    try:
        found = solve(restrict(model.problem, kept), memory_budget_bytes=budget_bytes)
    except BudgetError:
        return None
    if not np.isfinite(found.cost_s):
        return None
    choice = tuple(int(k[c]) for k, c in zip(kept, found.choice, strict=True))
    return replace(found, choice=choice)


def alternative(plan: Plan, name: str) -> Alternative:
    """Return what a plan takes, under the choice that it makes for the op called `name`."""
    choice = choice_text(plan[name], plan.grid)
    return Alternative(choice, plan.step_time_s, plan.comm_bytes, plan.memory_bytes)
