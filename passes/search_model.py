"""What the numbers of the search mean: variables, and the moves of values between them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from autotp.layouts import Layout
from autotp.passes.moves import Column, Moves, MoveTable
from autotp.passes.network import Value
from autotp.passes.pricing import Table
from autotp.passes.search.problem import Problem
from autotp.passes.sharing import Best, best_s
from autotp.passes.spaces import AxisTypes
from autotp.plan import Plan, PlannedMove


@dataclass(frozen=True, slots=True)
class Variable:
    """What one variable of the problem decides: kind "op", "rest" or "copy", of which name."""

    kind: str
    name: str
    table: Table


@dataclass(frozen=True, slots=True)
class Meeting:
    """A pair of the problem whose cost is that of moving a value between two columns."""

    pair: int
    value: Value
    before: Column
    after: Column
    again: bool


@dataclass(frozen=True, slots=True)
class Model:
    """The search problem and its meaning."""

    problem: Problem
    variables: tuple[Variable, ...]
    moves: Moves
    types: Mapping[str, AxisTypes]  # per value, the types on each axis that its moves may use
    may_return: Callable[[str, Layout], bool]
    params: Collection[str]  # the values that are parameters
    meetings: tuple[Meeting, ...]  # where values are moved
    within: Mapping[str, frozenset[str]]  # what products may move, by which collectives
    is_best: bool = False  # whether moves are priced at the least that they may take

    def table_of(self, value: Value) -> MoveTable:
        """Return the moves of a value."""
        return self._table(value, best=self._best(value) if self.is_best else None)

    def best(self) -> Model:
        """Return this model with moves at the least that they may take: no plan takes less."""
        pairs = list(self.problem.pairs)
        for m in self.meetings:
            if what := self._best(m.value):
                table = self._table(m.value, m.again, what)
                seconds = self.moves.between(table, m.before, m.after)
                pairs[m.pair] = (*pairs[m.pair][:2], seconds)
        return replace(self, problem=replace(self.problem, pairs=tuple(pairs)), is_best=True)

    def like(self, plan: Plan) -> Model:
        """Return this model with moves hidden as much, kind by kind, as a plan hides them."""
        taken: dict[tuple[str, str, str], float] = {}
        hidden: dict[tuple[str, str, str], float] = {}
        for m in plan.moves:
            key = (self._what(m.value), m.forward, m.backward)
            taken_s = self._apart_s(m)
            taken[key] = taken.get(key, 0.0) + taken_s
            hidden[key] = hidden.get(key, 0.0) + max(0.0, taken_s - m.seconds)
        for b in plan.buckets:
            key = (self._what(plan.moves[b.moves[0]].value), b.forward, b.backward)
            hidden[key] = hidden.get(key, 0.0) + b.hidden_s
        shares = {key: s / taken[key] for key, s in hidden.items() if taken[key]}
        return replace(self, moves=self.moves.hiding(shares)).best()

    def _apart_s(self, m: PlannedMove) -> float:
        """Return what a move takes as a call, also where a product makes it."""
        if not m.schedule:
            return m.seconds
        kinds = (m.forward, m.backward)
        return self.moves.kinds_s(kinds, m.size_bytes, self.moves.grid.axis(m.axis))

    def _what(self, value: str) -> str:
        return "parameter" if value in self.params else "activation"

    def searched_s(self, m: PlannedMove, value: Value) -> float:
        """Return what the search took a move of a value to cost."""
        best = self._best(value) if self.is_best else None
        if best is None:
            return m.seconds
        kinds = [m.forward] * (1 + m.again) + [m.backward]
        return best_s(self.moves, kinds, m.size_bytes, self.moves.grid.axis(m.axis), best)

    def _best(self, value: Value) -> Best | None:
        """Return as what a value's moves may take less than calls of their own, if they may."""
        overlaps = bool(self.moves.cluster.overlap)
        within = self.within.get(value.name, frozenset()) if overlaps else frozenset()
        if value.name in self.params:
            return Best("parameter", within)
        return Best("activation", within) if within or (overlaps and value.grad) else None

    def _table(self, v: Value, again: bool = False, best: Best | None = None) -> MoveTable:
        return self.moves.table(v.shape, v.dtype, v.grad, self.types[v.name], again, best)
