"""The minimum of a problem without a budget: exact where tables stay small, bounded where not.

`minimise` drops what cannot win, where choices are many, and eliminates variables. Where that is
too much work it first shrinks the problem (small variables eliminated, dominated choices dropped).
Where tables would still be too large it splits sums for a lower bound, improves its choice by
solving again with some variables held, and asks the ILP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autotp.passes.search.dominance import contenders, factors_of, reduce_to_core, undominated
from autotp.passes.search.elimination import (
    Elimination,
    Factor,
    back_substitute,
    constant,
    plan_elimination,
    run,
)
from autotp.passes.search.ilp import MAX_CELLS, cells, solve_ilp
from autotp.passes.search.problem import Problem, restrict

EASY_WORK = 2**26
"""Cells below which an elimination is run as it is: under half a second."""

CORE_WIDTH = 2
"""The most neighbours of what `reduce_to_core` eliminates: all of it, in problems of that width."""

CROWDED = 2**14
"""Cells of the largest pair from which choices that cannot win are looked for first."""

MAX_WORK, MAX_HELD = 2**31, 2**27
"""Cells computed (some 10 s) and kept (1 GB) above which sums are split."""

GAP = 1e-9
"""Share of the cost below which a gap is rounding."""

HOLDS = 16
"""Variables of split sums that are freed one by one when a choice is improved."""


@dataclass(frozen=True, slots=True)
class Found:
    """A choice, its cost, a lower bound (equal to the cost where exact), and how it was found."""

    choice: tuple[int, ...]
    cost: float
    lower: float
    width: int
    method: str = "elimination"


@dataclass(slots=True)
class Orders:
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
        """Return the order of a structure, planned once."""
        key = (sizes, factors, max_table)
        if key not in self.known:
            shapes = [t.shape for t in leaves]
            self.known[key] = plan_elimination(sizes, factors, shapes, max_table)
        return self.known[key]


def minimise(problem: Problem, orders: Orders) -> Found:
    """Return the minimum: of contenders where choices are many, else of all."""
    if _are_first_least(problem):
        first = (0,) * len(problem.sizes)
        cost = problem.seconds(first)
        return Found(first, cost, cost, 0)
    if max((t.size for _, _, t in problem.pairs), default=0) < CROWDED:
        return _minimise(problem, orders)
    small, kept = contenders(problem)
    found = _minimise(small, orders)
    choice = tuple(int(k[c]) for k, c in zip(kept, found.choice, strict=True))
    return replace(found, choice=choice)


def _are_first_least(problem: Problem) -> bool:
    """Say whether every first choice is among the cheapest, alone and beside all others."""
    alone = all(u[0] <= u.min() for u in problem.unary)
    return alone and all(t[0, 0] <= t.min() for _, _, t in problem.pairs)


def _minimise(problem: Problem, orders: Orders) -> Found:
    """Return the minimum: at once where that is easy, else of the core that is left."""
    factors, leaves = factors_of(problem)
    plan = orders.order(problem.sizes, factors, leaves, orders.max_table)
    if plan.exact and (plan.work <= EASY_WORK or plan.width <= CORE_WIDTH):
        return _eliminate(problem, plan, leaves)
    core = reduce_to_core(problem)
    small, kept = undominated(core.problem)
    best = _minimise_core(small, orders)
    choice = core.lift([int(k[c]) for k, c in zip(kept, best.choice, strict=True)])
    cost = problem.seconds(choice)
    exact = best.lower == best.cost
    lower = cost if exact else min(cost, best.lower + core.offset_s)
    return Found(choice, cost, lower, max(best.width, core.elimination.width), best.method)


def _eliminate(problem: Problem, plan: Elimination, leaves: Sequence[np.ndarray]) -> Found:
    tables = run(plan, leaves)
    choice = back_substitute(plan, tables, len(problem.sizes))
    cost = problem.seconds(choice)
    lower = cost if plan.exact else min(cost, constant(plan, tables))
    return Found(choice, cost, lower, plan.width, "elimination" if plan.exact else "mini-buckets")


def _minimise_core(problem: Problem, orders: Orders) -> Found:
    factors, leaves = factors_of(problem)
    limit = orders.max_table
    plan = orders.order(problem.sizes, factors, leaves, limit)
    while (plan.work > MAX_WORK or plan.held > MAX_HELD) and limit > 1:
        limit //= 8
        plan = orders.order(problem.sizes, factors, leaves, limit)
    found = _eliminate(problem, plan, leaves)
    if is_closed(found):
        return found
    return _ask_ilp(problem, _improve(problem, found, plan.split, limit))


def is_closed(found: Found) -> bool:
    """Say whether no choice can be better, but for rounding."""
    return found.lower == found.cost or has_gap_below(found, GAP)


def has_gap_below(found: Found, share: float) -> bool:
    """Say whether a choice is known that is at most this share of its cost from the bound."""
    return math.isfinite(found.cost) and found.cost - found.lower <= share * abs(found.cost)


def _improve(problem: Problem, found: Found, split: Sequence[int], limit: int) -> Found:
    """Solve again with variables of split sums held at their choice: all, halves, then one free."""
    free_one = [tuple(v for v in split if v != free) for free in split[:HOLDS]]
    spent = 0
    for held in (tuple(split), tuple(split[::2]), tuple(split[1::2]), *free_one):
        choice, work = _solve_holding(problem, found.choice, set(held), limit)
        spent += work
        cost = problem.seconds(choice)
        if cost < found.cost:
            found = Found(choice, cost, min(cost, found.lower), found.width, found.method)
        if is_closed(found) or spent > MAX_WORK:
            break
    return found


def _solve_holding(
    problem: Problem, choice: Sequence[int], held: set[int], limit: int
) -> tuple[tuple[int, ...], int]:
    """Return the choices when `held` variables keep theirs, and the cells that it took."""
    every = {n: np.arange(n) for n in sorted(set(problem.sizes))}
    one = {k: np.array([k]) for k in sorted(set(choice))}
    kept = [one[choice[v]] if v in held else every[n] for v, n in enumerate(problem.sizes)]
    smaller = restrict(problem, kept)
    factors, leaves = factors_of(smaller)
    plan = plan_elimination(smaller.sizes, factors, [t.shape for t in leaves], limit)
    picks = back_substitute(plan, run(plan, leaves), len(kept))
    return tuple(int(k[c]) for k, c in zip(kept, picks, strict=True)), plan.work


def _ask_ilp(problem: Problem, found: Found) -> Found:
    """Return the better of `found` and the ILP's choice, with the better of their bounds."""
    if is_closed(found) or cells(problem) > MAX_CELLS:
        return found
    answer = solve_ilp(problem)
    choice, cost = found.choice, found.cost
    if answer.choice is not None and problem.seconds(answer.choice) < cost:
        choice, cost = answer.choice, problem.seconds(answer.choice)
    lower = min(cost, max(found.lower, answer.lower_bound_s))
    return Found(choice, cost, lower, found.width, "ilp")
