"""The plan that the search finds: within the memory of a rank, and once moves are scheduled.

The search counts neither what several layouts of one value hold together, nor which moves share a
call, nor what they run beside. So each solution is read as a plan, which does: `scheduled` asks
once more with each move at the least that it may take, then with what moves pay in the plans found
so far, and returns the fastest; `solve_within` asks for less memory until the plan fits.

A plan fits by layouts that need less, and by making again in backward what is over the limit
(`passes.again`). Layouts are searched at several budgets between the limit, where all is kept, and
none: each is optimal for its budget, and what is made again for its layouts. That the two are
chosen one after the other is what the gap states: the bound is the cost of the cheapest layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from autotp.cost_model.cluster import Cluster
from autotp.errors import BudgetError
from autotp.notation import bytes_text, memory_text
from autotp.passes.search.problem import Problem
from autotp.passes.search.solve import SMALLEST, Solution, Solver, solve
from autotp.passes.search_model import Model
from autotp.plan import Memory, Plan

ROUNDS = 10
"""How often a smaller plan is asked for, where none is small enough."""

SEARCHES = 3
"""How often layouts are searched at what moves take in the plans found so far, if that is new."""

SHARES = (0.75, 0.5, 0.25)
"""Of what the cheapest layouts need beyond the limit, what is left for backward to make again."""

KEPT = 4
"""Plans that a reader remembers."""

NEAR = 2e-3
"""Share of its time that a plan may be from the bound for no other to be tried."""

TIE = 1e-3
"""Share by which a plan must be faster to be taken before one whose layers are more alike."""


@dataclass(frozen=True, slots=True)
class Found:
    """A solution of a model, and how it is read as a plan."""

    model: Model
    solution: Solution
    read: Callable[[Solution], Plan]

    @property
    def plan(self) -> Plan:
        """The plan of the solution, its moves scheduled."""
        return self.read(self.solution)

    def bounded(self, bound_s: float, spent_s: float | None = None) -> Found:
        """Return this with a bound that no plan beats, and what the search took in all."""
        bound_s = min(bound_s, self.plan.step_time_s)
        seconds = self.solution.seconds if spent_s is None else spent_s
        solution = replace(self.solution, lower_bound_s=bound_s, seconds=seconds)
        return replace(self, solution=solution)


def scheduled(apart: Found, search: Callable[[Model], Found], quick: bool) -> Found:
    """Return what is faster once scheduled, the first of equals, and a bound of all plans.

    `apart` was searched with a call for each move. With `quick` nothing more is searched, and what
    is stated is the gap of that search; where it was at the least that moves may take, a bound of
    all plans.
    """
    if quick and apart.model.is_best:
        return apart.bounded(apart.solution.lower_bound_s)
    if quick or apart.plan.grid.world_size == 1:
        saved_s = apart.solution.cost_s - apart.plan.step_time_s
        return apart.bounded(apart.solution.lower_bound_s - saved_s)
    model = apart.model.best()
    try:
        other = search(model)
    except BudgetError:
        return apart.bounded(solve(model.problem).lower_bound_s)
    tried = [apart, other]
    for model in _as_paid(tried):
        with suppress(BudgetError):
            found = search(model)
            if found.solution.choice not in [f.solution.choice for f in tried]:
                tried.append(found)
    best = _fastest(tried)
    return best.bounded(other.solution.lower_bound_s, sum(f.solution.seconds for f in tried))


def _as_paid(tried: Sequence[Found]) -> Iterator[Model]:
    """Yield models whose moves take what they turn out to take in plans; `tried` grows meanwhile.

    What all plans pay, and what the fastest pays, as long as that is new; then with each kind of
    shared calls as though it shared none. Moves of one kind make one another cheap, and a plan with
    few of a kind does not show how cheap many would be.
    """
    model, known = tried[0].model, 0
    if not any(f.plan.buckets for f in tried):
        return
    for _ in range(SEARCHES):
        if known < (known := len(tried)):
            yield model.like([f.plan for f in tried])
            yield model.like([_fastest(tried).plan])
    for kind in dict.fromkeys((b.forward, b.backward) for f in tried for b in f.plan.buckets):
        yield model.like([f.plan for f in tried], apart=kind)


def _fastest(tried: Sequence[Found]) -> Found:
    return reduce(_faster, tried)


def _faster(first: Found, second: Found) -> Found:
    is_faster = second.plan.step_time_s < first.plan.step_time_s * (1 - TIE)
    return second if is_faster else first


def reader(read: Callable[[Solution], Plan]) -> Callable[[Solution], Plan]:
    """Return what reads plans, and keeps the last few: equal choices are found in several ways.

    The best of those that were tried is read once more.
    """
    kept: dict[tuple[int, ...], Plan] = {}

    def read_or_kept(solution: Solution) -> Plan:
        plan = kept.pop(solution.choice, None) or read(solution)
        kept[solution.choice] = plan
        if len(kept) > KEPT:
            del kept[next(iter(kept))]
        return replace(
            plan,
            lower_bound_s=solution.lower_bound_s,
            search_s=solution.seconds,
            method=solution.method,
        )

    return read_or_kept


def solve_within(
    problem: Problem, limit: float | None, read: Callable[[Solution], Plan], rounds: int = ROUNDS
) -> Solution:
    """Return the cheapest solution found whose plan needs at most `limit` bytes.

    Raises BudgetError where no plan fits.
    """
    if limit is None:
        return solve(problem)
    solver = Solver(problem)
    best, best_s, spent_s, bound_s = None, np.inf, 0.0, 0.0
    for found in _tried(solver, limit, read, SHARES if rounds else ()):
        if not np.isfinite(found.cost_s):
            return found
        spent_s, bound_s = spent_s + found.seconds, bound_s or found.lower_bound_s
        plan = read(found)
        if plan.memory.total <= limit and plan.step_time_s < best_s:
            best, best_s = found, plan.step_time_s
        if best_s <= bound_s * (1 + NEAR):
            break
    if best is None:
        raise _over_budget(limit, _least(solver, read, rounds))
    return replace(best, seconds=spent_s, lower_bound_s=bound_s)


def _tried(
    solver: Solver, limit: float, read: Callable[[Solution], Plan], shares: Sequence[float]
) -> Iterator[Solution]:
    """Yield the cheapest layouts, then the cheapest that need less and less."""
    found = solver.solve()
    yield found
    over = found.memory_bytes - limit
    if over <= 0 and read(found).memory.total <= limit:
        return  # to need less can only cost more
    for share in shares:
        if over > 0:
            try:
                yield solver.solve(limit + share * over)
            except BudgetError:
                break
    fitting = _fitting(solver, limit, read)
    if fitting is not None:
        yield fitting


def _fitting(solver: Solver, limit: float, read: Callable[[Solution], Plan]) -> Solution | None:
    """Return the cheapest solution found whose plan needs at most `limit` bytes.

    The search counts a value that several ops keep in different layouts once; the plan counts each.
    What that adds is taken from the budget, until the plan fits.
    """
    asked, spent_s, bound_s = limit, 0.0, None
    while True:
        try:
            solution = solver.solve(asked)
        except BudgetError:
            solution = solver.smallest()
        if not np.isfinite(solution.cost_s):
            return solution
        spent_s += solution.seconds
        bound_s = solution.lower_bound_s if bound_s is None else bound_s
        total = read(solution).memory.total
        if total <= limit:
            return replace(solution, seconds=spent_s, lower_bound_s=bound_s)
        if solution.method == SMALLEST:
            return None
        asked = solution.memory_bytes - (total - limit)


def _least(solver: Solver, read: Callable[[Solution], Plan], rounds: int) -> Memory:
    """Return the memory of the smallest plan that can be found."""
    least = read(solver.smallest()).memory
    for _ in range(rounds):
        smaller = _fitting(solver, least.total - 1, read)
        if smaller is None:
            break
        least = read(smaller).memory
    return least


def _over_budget(limit: float, least: Memory) -> BudgetError:
    error = BudgetError(
        f"no plan was found that fits {bytes_text(limit)} per rank",
        at=[
            ("smallest plan", memory_text(least)),
            ("budget", f"{bytes_text(limit)}, {bytes_text(least.total - limit)} too little"),
        ],
        remedy=(
            f"a budget of {least.total} bytes or more: cluster.memory_bytes={least.total}",
            "more ranks, a smaller batch, or fewer trained parameters",
        ),
    )
    error.needed_bytes = least.total
    return error


def budget(cluster: Cluster) -> float | None:
    """Return the memory of one rank, or None if it is not limited."""
    return cluster.memory_bytes if np.isfinite(cluster.memory_bytes) else None
