"""Exact min-sum variable elimination over tables, with equal tables worked out once.

    min over x of sum_i u_i(x_i) + sum_ij t_ij(x_i, x_j)

A variable is eliminated by adding up the tables that it is in and taking the minimum over it: a new
table over its neighbours. The cheapest variable goes first, ties in graph order. Tables are known by
identity, and a step by the identities of its tables, so that the equal layers of a model cost one.

Source: Bertele and Brioschi 1972, "Nonserial Dynamic Programming".
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Scope = tuple[int, ...]


@dataclass(slots=True)
class Memo:
    """Results of earlier steps, by the identities of their tables, which it keeps alive."""

    steps: dict[tuple[object, ...], tuple[Array, Array]] = field(default_factory=dict)
    alive: list[Array] = field(default_factory=list)
    hits: int = 0


@dataclass(slots=True)
class Elimination:
    """The tables that are left, and the record from which the eliminated variables are read back."""

    sizes: Sequence[int]
    memo: Memo
    tables: dict[int, tuple[Scope, Array]] = field(default_factory=dict)
    of_variable: list[list[int]] = field(default_factory=list)
    record: list[tuple[int, Scope, Array]] = field(default_factory=list)
    alive: set[int] = field(default_factory=set)
    constant: float = 0.0
    width: int = 0
    next_table: int = 0

    @classmethod
    def start(cls, sizes, unary, pairs, memo):
        """Return the state before the first step."""
        e = cls(sizes, memo, of_variable=[[] for _ in sizes], alive=set(range(len(sizes))))
        for i, u in enumerate(unary):
            e._add((i,), u)
        for i, j, t in pairs:
            e._add((i, j), t)
        return e

    def _add(self, scope: Scope, table: Array) -> None:
        self.tables[self.next_table] = (scope, table)
        for variable in scope:
            self.of_variable[variable].append(self.next_table)
        self.next_table += 1

    def neighbours(self, variable: int) -> Scope:
        """Return the variables that share a table with this one, in graph order."""
        seen = {v for t in self.of_variable[variable] for v in self.tables[t][0]}
        seen.discard(variable)
        return tuple(sorted(seen))

    def cost(self, variable: int) -> int:
        """Return how many entries the step of this variable looks at."""
        return math.prod(self.sizes[v] for v in (variable, *self.neighbours(variable)))

    def run(self, max_table: int, max_neighbours: int | None = None) -> bool:
        """Eliminate what steps of at most `max_table` entries can; say whether nothing is left."""
        queue = [(self.cost(v), v) for v in sorted(self.alive)]
        heapq.heapify(queue)
        while queue:
            cost, variable = heapq.heappop(queue)
            if variable not in self.alive or cost != self.cost(variable) or cost > max_table:
                continue
            around = self.neighbours(variable)
            if max_neighbours is not None and len(around) > max_neighbours:
                continue
            self._eliminate(variable, around)
            for v in around:
                heapq.heappush(queue, (self.cost(v), v))
        return not self.alive

    def _eliminate(self, variable: int, around: Scope) -> None:
        numbers = self.of_variable[variable]
        entries = [self.tables[t] for t in numbers]
        place = {v: k for k, v in enumerate((variable, *around))}
        key = tuple((id(table), *(place[v] for v in scope)) for scope, table in entries)
        if key in self.memo.steps:
            self.memo.hits += 1
        else:
            shape = [self.sizes[v] for v in place]
            self.memo.steps[key] = _minimise(entries, place, shape)
            self.memo.alive += [table for _, table in entries]
        best, choice = self.memo.steps[key]
        self.record.append((variable, around, choice))
        self.width = max(self.width, len(around))
        for t in list(numbers):
            for v in self.tables.pop(t)[0]:
                self.of_variable[v].remove(t)
        self.alive.discard(variable)
        if around:
            self._add(around, best)
        else:
            self.constant += float(best)

    def read_back(self, choice: dict[int, int]) -> list[int]:
        """Return the best choice of every variable, given those that were not eliminated."""
        for variable, around, best in reversed(self.record):
            choice[variable] = int(best[tuple(choice[v] for v in around)])
        return [choice[v] for v in range(len(self.sizes))]


def _minimise(entries, place, shape):
    """Return the minimum over the first place, and where it is; the lowest choice wins a tie."""
    total = np.zeros(shape)
    for scope, table in entries:
        order = sorted(range(len(scope)), key=lambda k: place[scope[k]])
        placed = {place[scope[k]]: table.shape[k] for k in order}
        total += table.transpose(order).reshape([placed.get(k, 1) for k in range(len(shape))])
    choice = total.argmin(axis=0)
    return np.take_along_axis(total, choice[None], axis=0)[0], choice
