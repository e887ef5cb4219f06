"""The cheapest choice within a memory budget: memory is priced, and a gap goes to the ILP.

For any price >= 0 of a byte

    min (seconds + price * bytes) - price * budget  <=  the cheapest choice within the budget

and the best price is found where the lines of two choices meet, one over the budget, one within it.
Equal layers change sides at one price, all together: `_mixes` lets the first layers take the one
choice and the last layers the other. A gap that remains goes to the ILP.
Source: Handler and Zang 1980, "A dual algorithm for the constrained shortest path problem".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from autotp.errors import BudgetError
from autotp.passes.search.dominance import undominated
from autotp.passes.search.ilp import MAX_CELLS, cells, solve_ilp
from autotp.passes.search.minimum import GAP, Found, Orders, has_gap_below, is_closed, minimise
from autotp.passes.search.problem import Problem, restrict, weigh

MAX_PRICES = 60
"""Prices tried; some ten reach the best one."""

MARGIN = 1e-9
"""Share of the budget that the ILP's tolerance may break; then it is asked again for that less."""

CLOSE = 1e-3
"""Share of the cost below which a gap of a large problem is left, and stated."""

Choice = tuple[int, ...]


def within(
    problem: Problem, budget: float, ends: tuple[Found, Found], orders: Orders, near_s: float
) -> Found:
    """Return the cheapest choice within `budget`, or one at most `near_s` dearer than the bound.

    `ends` are the cheapest choice of all, which does not fit, and that of least memory, whose cost
    is its bytes. Raises BudgetError if nothing fits.
    """
    cheapest, smallest = ends
    if smallest.lower > budget * (1 + GAP):
        raise _over_budget(budget, smallest.lower)
    seen, lower = _price(problem, budget, cheapest, smallest.choice, orders)
    best = _best(problem, budget, seen, lower, cheapest.width)
    if not is_closed(best):
        mixes = _mixes(problem, budget, list(dict.fromkeys(seen)))
        best = _best(problem, budget, [*seen, *mixes], lower, cheapest.width)
    if not is_closed(best) and best.cost - best.lower > near_s:
        best = _refine(problem, budget, best, seen, near_s)
    if best.cost == math.inf:
        raise _over_budget(budget, problem.bytes(smallest.choice))
    return best


def _best(
    problem: Problem, budget: float, seen: Sequence[Choice], lower: float, width: int
) -> Found:
    """Return the cheapest of `seen` that fits; its cost is inf if none does."""
    fitting = [c for c in seen if problem.bytes(c) <= budget]
    costs = [problem.seconds(c) for c in fitting]
    cost = min(costs, default=math.inf)
    choice = fitting[costs.index(cost)] if fitting else seen[-1]
    return Found(choice, cost, min(cost, lower), width, "lagrange")


def _price(
    problem: Problem, budget: float, cheapest: Found, smallest: Choice, orders: Orders
) -> tuple[list[Choice], float]:
    """Return the choices that are optimal at some price, the last ends last, and the best bound."""
    over, fits = cheapest.choice, smallest
    seen, lower = [], cheapest.lower
    for _ in range(MAX_PRICES):
        saved = problem.bytes(over) - problem.bytes(fits)
        lost = problem.seconds(fits) - problem.seconds(over)
        if saved <= 0 or lost <= 0:
            break
        price = lost / saved
        found = minimise(weigh(problem, price), orders)
        lower = max(lower, found.lower - price * budget)
        seen.append(found.choice)
        line = problem.seconds(over) + price * problem.bytes(over)
        if found.cost >= line * (1 - 1e-12):
            break
        if problem.bytes(found.choice) <= budget:
            fits = found.choice
        else:
            over = found.choice
    return [*seen, over, fits], lower


def _mixes(problem: Problem, budget: float, seen: Sequence[Choice]) -> list[Choice]:
    """Return, of each two of `seen`, the cheapest mix that fits: one, then the other."""
    out = []
    for first, last in itertools.permutations(seen, 2):
        held, costs = _mixed(problem, first, last)
        cut = int(np.argmin(np.where(held <= budget, costs, np.inf)))
        out.append(first[:cut] + last[cut:])
    return out


def _mixed(problem: Problem, first: Choice, last: Choice) -> tuple[np.ndarray, np.ndarray]:
    """Return bytes and seconds of `first[:cut] + last[cut:]` for every cut, by differences."""
    count = len(problem.sizes)
    held, costs, never = np.zeros(count + 1), np.zeros(count + 1), np.zeros(count + 1)
    assert problem.memory is not None
    for v, (u, m) in enumerate(zip(problem.unary, problem.memory, strict=True)):
        costs[v + 1] += u[first[v]] - u[last[v]]
        held[v + 1] += m[first[v]] - m[last[v]]
    for a, b, table in problem.pairs:
        i, j, t = (a, b, table) if a < b else (b, a, table.T)
        stages = (t[last[i], last[j]], t[first[i], last[j]], t[first[i], first[j]])
        for at, value, gone in zip((0, i + 1, j + 1), stages, (0.0, *stages), strict=False):
            costs[at] += (value if value < np.inf else 0.0) - (gone if gone < np.inf else 0.0)
            never[at] += float(value == np.inf) - float(gone == np.inf)
    held[0] += problem.bytes(last)
    costs[0] += sum(float(u[k]) for u, k in zip(problem.unary, last, strict=True))
    return np.cumsum(held), np.where(np.cumsum(never) > 0, np.inf, np.cumsum(costs))


def _refine(
    problem: Problem, budget: float, best: Found, seen: Sequence[Choice], near_s: float
) -> Found:
    """Ask the ILP: of all choices where that is possible, else of those that some price chose."""
    gap = near_s / best.cost if near_s else 0.0
    small, kept = undominated(problem)
    if cells(small) <= MAX_CELLS:
        choice, lower = _ask(small, kept, budget, gap)
    elif has_gap_below(best, CLOSE):
        return best
    else:
        kept = _chosen(problem, list(reversed(seen)))
        choice, lower = _ask(restrict(problem, kept), kept, budget, gap)[0], best.lower
    cost, found = best.cost, best.choice
    if choice is not None and problem.seconds(choice) < cost:
        cost, found = problem.seconds(choice), choice
    return Found(found, cost, min(cost, max(lower, best.lower)), best.width, "lagrange+ilp")


def _ask(
    problem: Problem, kept: Sequence[np.ndarray], budget: float, gap: float
) -> tuple[Choice | None, float]:
    """Return the ILP's choice within the budget, in the numbers before `kept`, and its bound."""
    answer = solve_ilp(problem, budget, gap)
    picks = answer.choice
    if picks is not None and problem.bytes(picks) > budget:
        picks = solve_ilp(problem, budget * (1 - MARGIN), gap).choice
    if picks is None or problem.bytes(picks) > budget:
        return None, answer.lower_bound_s
    return tuple(int(k[c]) for k, c in zip(kept, picks, strict=True)), answer.lower_bound_s


def _chosen(problem: Problem, seen: Sequence[Choice]) -> tuple[np.ndarray, ...]:
    """Return the choices of each variable that `seen` uses, or its first half if they are many."""
    arrays: dict[tuple[int, ...], np.ndarray] = {}
    used = [tuple(sorted(set(picks))) for picks in zip(*seen, strict=True)]
    kept = tuple(arrays.setdefault(u, np.array(u)) for u in used)
    if len(seen) > 2 and cells(restrict(problem, kept)) > MAX_CELLS:
        return _chosen(problem, seen[: len(seen) // 2 + 1])
    return kept


def _over_budget(budget: float, smallest: float) -> BudgetError:
    return BudgetError(
        f"no plan fits {budget / 1e9:.6g} GB per rank",
        at=[("smallest", f"{smallest / 1e9:.6g} GB is what the plan of least memory needs")],
        remedy=f"a budget of at least {math.ceil(smallest)} bytes, or more ranks",
    )
