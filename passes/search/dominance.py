"""Smaller problems with the same minimum: small variables eliminated, dominated choices dropped.

`reduce_to_core` eliminates every variable that leaves no table on more than two others, so that
what is left is a Problem again. `undominated` drops choice a where some b costs no more, alone and
beside every choice of every neighbour; of equals the lowest stays. `contenders` drops a where some
b costs less whatever the neighbours choose, which no minimum can have:

    u[a] - u[b] + sum_k min_j (t_k[a, j] - t_k[b, j]) > 0

Source: Goldstein 1994, "Efficient rotamer elimination applied to protein side-chains".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autotp.passes.search.elimination import (
    Elimination,
    Factor,
    back_substitute,
    constant,
    plan_elimination,
    run,
)
from autotp.passes.search.problem import Problem, intern, restrict

ROUNDS = 8
"""What is dropped at one variable lets more be dropped beside it; few rounds reach the end."""

PATIENCE = 3
"""Choices tried against all others without one being dropped, after which no more are tried."""

MARGIN = 1e-12
"""Share of the largest cost by which a choice must lose: what is equal but for rounding stays."""

UNREACHABLE = 1e30
"""Stands for inf where costs are subtracted."""


def factors_of(problem: Problem) -> tuple[tuple[Factor, ...], tuple[np.ndarray, ...]]:
    """Return the tables of a problem as factors, and the distinct tables that they name."""
    scopes = [(i,) for i in range(len(problem.sizes))] + [(i, j) for i, j, _ in problem.pairs]
    numbers, tables = intern([*problem.unary, *(t for _, _, t in problem.pairs)])
    return tuple(map(Factor, numbers, scopes)), tables


@dataclass(frozen=True, slots=True)
class Core:
    """What is left of a problem, and the way back."""

    problem: Problem
    offset_s: float
    left: tuple[int, ...]
    elimination: Elimination
    tables: list[np.ndarray]
    size: int

    def lift(self, choice: Sequence[int]) -> tuple[int, ...]:
        """Return the choice of the whole problem that a choice of the core implies."""
        known = dict(zip(self.left, choice, strict=True))
        return back_substitute(self.elimination, self.tables, self.size, known)


def reduce_to_core(problem: Problem) -> Core:
    """Eliminate what has at most two neighbours, until nothing has."""
    factors, leaves = factors_of(problem)
    shapes = [t.shape for t in leaves]
    plan = plan_elimination(problem.sizes, factors, shapes, sys.maxsize, max_arity=2)
    tables = run(plan, leaves)
    gone = {v for v, _ in plan.buckets}
    left = tuple(v for v in range(len(problem.sizes)) if v not in gone)
    core = _merge(plan.rest, tables, left, problem.sizes)
    offset = constant(plan, tables)
    return Core(core, offset, left, plan, tables, len(problem.sizes))


def _merge(
    rest: Sequence[Factor], tables: Sequence[np.ndarray], left: Sequence[int], sizes: Sequence[int]
) -> Problem:
    """Return the problem of the factors that are left: one table per variable and per pair."""
    number = {v: k for k, v in enumerate(left)}
    terms: dict[tuple[int, ...], list[tuple[int, bool]]] = {(v,): [] for v in left}
    for f in rest:
        if f.scope:
            scope = tuple(sorted(f.scope))
            terms.setdefault(scope, []).append((f.table, scope != f.scope))
    sums: dict[tuple[tuple[int, bool], ...], np.ndarray] = {}
    for parts in terms.values():
        if parts and tuple(parts) not in sums:
            turned = [tables[t].T if flip else tables[t] for t, flip in parts]
            sums[tuple(parts)] = np.asarray(sum(turned[1:], turned[0]))
    merged = {
        s: sums[tuple(parts)] if parts else np.zeros(sizes[s[0]]) for s, parts in terms.items()
    }
    return Problem(
        sizes=tuple(sizes[v] for v in left),
        unary=tuple(merged[v,] for v in left),
        pairs=tuple((number[s[0]], number[s[1]], merged[s]) for s in sorted(merged) if len(s) == 2),
    )


def undominated(problem: Problem) -> tuple[Problem, tuple[np.ndarray, ...]]:
    """Return the problem without dominated choices, and the choices kept of each variable."""
    whole: dict[int, np.ndarray] = {n: np.arange(n) for n in sorted(set(problem.sizes))}
    kept = tuple(whole[n] for n in problem.sizes)
    for _ in range(ROUNDS):
        survivors = _survivors(problem)
        if all(len(s) == n for s, n in zip(survivors, problem.sizes, strict=True)):
            break
        problem = restrict(problem, survivors)
        kept = tuple(k[s] for k, s in zip(kept, survivors, strict=True))
    return problem, kept


def _survivors(problem: Problem) -> tuple[np.ndarray, ...]:
    more: Sequence[Sequence[np.ndarray]] = [[]] * len(problem.sizes)
    if problem.memory is not None:
        more = [[m[:, None]] for m in problem.memory]
    return _kept(problem, more, lambda tables: _keep(np.concatenate(tables, axis=1)))


def contenders(problem: Problem) -> tuple[Problem, tuple[np.ndarray, ...]]:
    """Return the problem without choices that no minimum has, and the choices kept of each."""
    kept = _kept(problem, [[]] * len(problem.sizes), _contending)
    return restrict(problem, kept), kept


def _kept(
    problem: Problem,
    more: Sequence[Sequence[np.ndarray]],
    keep: Callable[[Sequence[np.ndarray]], np.ndarray],
) -> tuple[np.ndarray, ...]:
    """Return what to keep of each variable, by its costs [choice, ...]; equals are asked once.

    They are its own, `more`, and those beside each neighbour.
    """
    beside = [[u[:, None], *tables] for u, tables in zip(problem.unary, more, strict=True)]
    names = [[(id(u), 0)] for u in problem.unary]
    for i, j, table in problem.pairs:
        beside[i].append(table)
        beside[j].append(table.T)
        names[i].append((id(table), 1))
        names[j].append((id(table), 2))
    for v, memory in enumerate(problem.memory or ()):
        names[v].append((id(memory), 0))
    known: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    for key, tables in zip(map(tuple, names), beside, strict=True):
        if key not in known:
            known[key] = keep(tables)
    return tuple(known[tuple(key)] for key in names)


def _contending(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rows that no other beats whatever the columns, those that cost least tried first.

    Each table has its own columns: two rows differ by at least the sum of their least differences.
    Rows that cost the same by themselves are not compared: each is best beside one like it.
    """
    own, left, idle = tables[0][:, 0], np.arange(len(tables[0])), 0
    if own.min() == own.max():
        return left
    costs = [np.where(np.isinf(t), UNREACHABLE, t) for t in tables]
    margin = MARGIN * max(float(t[t < UNREACHABLE].max(initial=0.0)) for t in costs)
    rows = costs
    for best in np.argsort(own, kind="stable").tolist():
        if idle == PATIENCE:
            break
        if best in left:
            least = [(t - c[best]).min(axis=1) for t, c in zip(rows, costs, strict=True)]
            stays = sum(least[1:], least[0]) <= margin
            idle = idle + 1 if stays.all() else 0
            if not stays.all():
                left, rows = left[stays], [t[stays] for t in rows]
    return left


def _keep(costs: np.ndarray) -> np.ndarray:
    """Return the rows of `costs` that no other row is at most equal to everywhere."""
    number = np.arange(len(costs))
    dropped = np.zeros(len(costs), dtype=bool)
    for b in number:
        if not dropped[b]:
            worse = (costs >= costs[b]).all(axis=1)
            same = (costs == costs[b]).all(axis=1)
            dropped |= worse & (~same | (number > b))
    return np.flatnonzero(~dropped)
