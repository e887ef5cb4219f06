"""The exact search: one choice per variable, so that unary and pair costs add up to the least.

In: a Problem, numbers only. Out: a Solution with its certificate: a bound that no assignment is
below, equal to the cost where the answer is exact. Dominated choices are pruned; `elimination` is
exact; what would need too large a table goes to `ilp`. A memory budget enters by a Lagrange
multiplier, refined by the ILP where a gap remains and the problem is small enough. Ties are broken
in one place, `elimination._minimise`: the lowest choice wins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autotp.errors import BudgetError
from autotp.passes.elimination import Elimination, Memo
from autotp.passes.ilp import Integer, solve_ilp, total_cost

Array = np.ndarray
Pairs = tuple[tuple[int, int, Array], ...]

ILP_ENTRIES = 300_000
"""Pair entries up to which an integer program is tried to close the gap of a memory budget."""

BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be minimised.

    unary    seconds per choice, per variable in graph order
    pairs    (i, j, seconds [n_i, n_j]); inf where two choices cannot meet. Equal tables should be
             the same object: they are worked out once
    memory   bytes per choice, per variable
    """

    sizes: tuple[int, ...]
    unary: tuple[Array, ...]
    pairs: Pairs
    memory: tuple[Array, ...] | None = None


@dataclass(frozen=True, slots=True)
class Solution:
    """The choices, their cost and memory, and what is proved about them."""

    choice: tuple[int, ...]
    cost_s: float
    lower_bound_s: float
    memory_bytes: float
    width: int
    method: str
    seconds: float


def solve(
    problem: Problem, memory_budget_bytes: float | None = None, *, max_table: int = 2**24
) -> Solution:
    """Return the cheapest choices, within the memory budget if one is given.

    Raises BudgetError, with the least memory that can do, when nothing fits.
    """
    start = time.process_time()
    memo = Memo()
    free = _minimum(problem, problem.unary, memo, max_table)
    if memory_budget_bytes is None or problem.memory is None:
        return replace(free, seconds=time.process_time() - start)
    if free.memory_bytes > memory_budget_bytes:
        free = _within(problem, memory_budget_bytes, free, memo, max_table)
    return replace(free, seconds=time.process_time() - start)


def _minimum(
    problem: Problem, unary: Sequence[Array], memo: Memo, max_table: int
) -> Solution:
    """Return the choices of least cost under these unary costs."""
    kept, small_unary, small_pairs = prune(unary, problem.pairs)
    sizes = [len(u) for u in small_unary]
    core = Elimination.start(sizes, small_unary, small_pairs, memo)
    core.run(max_table, max_neighbours=2)
    done = _clone(core)
    method, bound = "elimination", None
    if done.run(max_table):
        choice = done.read_back({})
    else:
        method = "ilp"
        choice, bound = _by_ilp(core)
    whole = tuple(int(kept[v][k]) for v, k in enumerate(choice))
    cost = total_cost(unary, problem.pairs, whole)
    memory = _memory(problem, whole)
    return Solution(
        whole, cost, cost if bound is None else min(bound, cost), memory, done.width, method, 0.0
    )


def _clone(e: Elimination) -> Elimination:
    return replace(
        e,
        tables=dict(e.tables),
        of_variable=[list(t) for t in e.of_variable],
        record=list(e.record),
        alive=set(e.alive),
    )


def _by_ilp(core: Elimination) -> tuple[list[int], float]:
    """Solve what is left when only variables of at most two neighbours were eliminated."""
    order = sorted(core.alive)
    place = {v: k for k, v in enumerate(order)}
    unary = [np.zeros(core.sizes[v]) for v in order]
    pairs: dict[tuple[int, int], Array] = {}
    for scope, table in core.tables.values():
        if len(scope) == 1:
            unary[place[scope[0]]] = unary[place[scope[0]]] + table
            continue
        i, j = (place[v] for v in scope)
        key, oriented = ((i, j), table) if i < j else ((j, i), table.T)
        pairs[key] = pairs[key] + oriented if key in pairs else oriented
    found = solve_ilp(unary, [(i, j, t) for (i, j), t in pairs.items()])
    assert found is not None, "the integer program has no solution in time"
    choice = core.read_back({order[k]: c for k, c in enumerate(found.choice)})
    return choice, found.bound + core.constant


def _memory(problem: Problem, choice: Sequence[int]) -> float:
    if problem.memory is None:
        return 0.0
    return float(sum(float(m[choice[i]]) for i, m in enumerate(problem.memory)))


# Pruning -------------------------------------------------------------------------------------------


def prune(
    unary: Sequence[Array], pairs: Sequence[tuple[int, int, Array]]
) -> tuple[list[Array], list[Array], list[tuple[int, int, Array]]]:
    """Drop choices that another is never worse than; equal variables are worked out once.

    Returns the numbers of the kept choices, and the tables over them.
    """
    around: list[list[Array]] = [[] for _ in unary]
    keys: list[list[tuple[int, int]]] = [[] for _ in unary]
    for i, j, table in pairs:
        around[i].append(table)
        keys[i].append((id(table), 0))
        around[j].append(table.T)
        keys[j].append((id(table), 1))
    memo: dict[tuple[object, ...], Array] = {}
    kept = []
    for u, tables, key in zip(unary, around, keys, strict=True):
        whole_key = (id(u), *key)
        if whole_key not in memo:
            memo[whole_key] = undominated(np.concatenate([u[:, None], *tables], axis=1))
        kept.append(memo[whole_key])
    cut: dict[tuple[int, ...], Array] = {}

    def narrow(table: Array, *index: Array) -> Array:
        name = (id(table), *(id(i) for i in index))
        if name not in cut:
            cut[name] = table[np.ix_(*index)]
        return cut[name]

    return (
        kept,
        [narrow(u, kept[i]) for i, u in enumerate(unary)],
        [(i, j, narrow(t, kept[i], kept[j])) for i, j, t in pairs],
    )


def undominated(costs: Array) -> Array:
    """Return the rows that no other row is at most as large as everywhere; of equals, the first.

    Rows that are infinite against every choice of some neighbour are dropped by the same rule.
    """
    if len(costs) == 1:
        return np.zeros(1, dtype=int)
    at_most = (costs[:, None, :] <= costs[None, :, :]).all(axis=2)
    strictly = at_most & ~at_most.T
    equal_before = np.tril(at_most & at_most.T, -1).any(axis=1)
    dominated = strictly.any(axis=0) | equal_before
    return np.flatnonzero(~dominated)


# The memory budget ---------------------------------------------------------------------------------


def _within(
    problem: Problem, budget: float, free: Solution, memo: Memo, max_table: int
) -> Solution:
    """Minimise seconds + multiplier * bytes, and find the least multiplier that fits."""
    least = _least_memory(problem, memo, max_table)
    if least.memory_bytes > budget:
        raise BudgetError(
            f"no plan fits {budget / 1e9:.3f} GB on a rank",
            at=[("least", f"{least.memory_bytes / 1e9:.3f} GB")],
            remedy="use more ranks, a smaller batch, or a rank with more memory",
        )
    best, bound = least, free.cost_s
    low, high = 0.0, max(free.cost_s, 1e-9) / max(budget, 1.0)
    for _ in range(BISECTIONS):
        found = _priced(problem, high, memo, max_table)
        bound = max(bound, found[1] - high * budget)
        if found[0].memory_bytes <= budget:
            best = min(best, found[0], key=lambda s: s.cost_s)
            break
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        if best.cost_s - bound <= 1e-9 * best.cost_s or high - low <= 1e-6 * high:
            break
        middle = (low + high) / 2
        found = _priced(problem, middle, memo, max_table)
        bound = max(bound, found[1] - middle * budget)
        if found[0].memory_bytes <= budget:
            best, high = min(best, found[0], key=lambda s: s.cost_s), middle
        else:
            low = middle
    best = replace(best, method="lagrange", lower_bound_s=min(bound, best.cost_s))
    return _refined(problem, budget, best)


def _priced(
    problem: Problem, multiplier: float, memo: Memo, max_table: int
) -> tuple[Solution, float]:
    """Return the solution under a price per byte, with its true cost, and the priced minimum."""
    assert problem.memory is not None
    made: dict[tuple[int, int], Array] = {}
    unary = []
    for u, m in zip(problem.unary, problem.memory, strict=True):
        key = (id(u), id(m))
        if key not in made:
            made[key] = u + multiplier * m
        unary.append(made[key])
    found = _minimum(problem, unary, Memo(), max_table)
    cost = total_cost(problem.unary, problem.pairs, found.choice)
    return replace(found, cost_s=cost), found.lower_bound_s


def _least_memory(problem: Problem, memo: Memo, max_table: int) -> Solution:
    assert problem.memory is not None
    possible: dict[int, Array] = {}
    for _, _, t in problem.pairs:
        possible.setdefault(id(t), np.where(np.isfinite(t), 0.0, np.inf))
    pairs = tuple((i, j, possible[id(t)]) for i, j, t in problem.pairs)
    bare = replace(problem, pairs=pairs)
    found = _minimum(bare, problem.memory, Memo(), max_table)
    return replace(found, cost_s=total_cost(problem.unary, problem.pairs, found.choice))


def _refined(problem: Problem, budget: float, best: Solution) -> Solution:
    """Close the gap by the integer program, where the problem is small enough for it."""
    entries = sum(t.size for _, _, t in problem.pairs)
    if best.cost_s - best.lower_bound_s <= 1e-9 * best.cost_s or entries > ILP_ENTRIES:
        return best
    found: Integer | None = solve_ilp(problem.unary, problem.pairs, problem.memory, budget)
    if found is None or _memory(problem, found.choice) > budget * (1 + 1e-9):
        return best
    if found.cost < best.cost_s:
        memory = _memory(problem, found.choice)
        best = replace(best, choice=found.choice, cost_s=found.cost, memory_bytes=memory)
    bound = min(max(best.lower_bound_s, found.bound), best.cost_s)
    return replace(best, lower_bound_s=bound, method="lagrange+ilp")
