"""What the numbers of the search mean: variables, and the moves of values between them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from autotp.layouts import Layout
from autotp.passes.move_table import Column, MoveTable
from autotp.passes.moves import Kind, Moves
from autotp.passes.network import Value
from autotp.passes.pricing import Table
from autotp.passes.search.problem import Problem
from autotp.passes.sharing import Best, Seen, may_share
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
        return self._table(value, best=self._best(value))

    def best(self) -> Model:
        """Return this model with moves at the least that they may take: no plan takes less."""
        model, pairs = replace(self, is_best=True), list(self.problem.pairs)
        for m in self.meetings:
            if what := model._best(m.value):
                table = self._table(m.value, m.again, what)
                seconds = self.moves.between(table, m.before, m.after)
                pairs[m.pair] = (*pairs[m.pair][:2], seconds)
        return replace(model, problem=replace(self.problem, pairs=tuple(pairs)))

    def like(self, plans: Sequence[Plan], apart: tuple[str, str] | None = None) -> Model:
        """Return this model with moves shared and hidden as much, kind by kind, as in plans.

        Each kind as in the plan that has most of it, and at its least where none has it; the
        collectives `apart` of parameters as calls of their own, with nothing hidden.
        """
        most: dict[Kind, _Paid] = {}
        for plan in plans:
            for kind, paid in self._paid(plan).items():
                if kind not in most or paid.apart_s > most[kind].apart_s:
                    most[kind] = paid
        seen = {kind: paid.seen for kind, paid in most.items()}
        if apart is not None:
            seen["parameter", *apart] = Seen()
        return replace(self, moves=self.moves.as_seen(seen)).best()

    def _paid(self, plan: Plan) -> dict[Kind, _Paid]:
        out: dict[Kind, _Paid] = {}
        for m in plan.moves:
            out.setdefault(self._kind(m), _Paid()).add(m, *self._ends_s(m))
        for b in plan.buckets:
            out[self._kind(plan.moves[b.moves[0]])].hidden_s += b.hidden_s
        return out

    def _ends_s(self, m: PlannedMove) -> tuple[float, float]:
        """Return what a move takes by calls of its own, and as its part of full ones."""
        kinds, axis = m.kinds, self.moves.grid.axis(m.axis)
        apart_s = self.moves.kinds_s(kinds, m.size_bytes, axis)
        if m.value not in self.params or not may_share(m.forward, m.backward, m.again):
            apart_s = apart_s if m.schedule else m.seconds
            return apart_s, apart_s
        return apart_s, sum(self.moves.share_s(kind, m.size_bytes, axis) for kind in kinds)

    def _kind(self, m: PlannedMove) -> Kind:
        return "parameter" if m.value in self.params else "activation", m.forward, m.backward

    def searched_s(self, m: PlannedMove, value: Value) -> float:
        """Return what the search took a move of a value to cost."""
        best = self._best(value)
        if best is None:
            return m.seconds
        axis = self.moves.grid.axis(m.axis)
        apart = self.moves.apart(m.value, value.shape, (m.before[axis], m.after[axis]))
        return self.moves.move_s(m.kinds, m.size_bytes, axis, apart, best)

    def _best(self, value: Value) -> Best | None:
        return best_of(value, self.params, self.within, self.moves) if self.is_best else None

    def _table(self, v: Value, again: bool = False, best: Best | None = None) -> MoveTable:
        is_put = v.name not in self.params
        return self.moves.table(v.shape, v.dtype, v.grad, self.types[v.name], again, best, is_put)


def best_of(
    value: Value, params: Collection[str], within: Mapping[str, frozenset[str]], moves: Moves
) -> Best | None:
    """Return as what a value's moves may take less than calls of their own, if they may.

    `within` are the collectives that products may make themselves, by the value they move.
    """
    overlaps = bool(moves.cluster.overlap)
    inside = within.get(value.name, frozenset()) if overlaps else frozenset()
    if value.name in params:
        return Best("parameter", inside)
    return Best("activation", inside) if inside or (overlaps and value.grad) else None


@dataclass(slots=True)
class _Paid:
    """What the moves of one kind take in a plan: apart, as parts of full calls, called, hidden."""

    apart_s: float = 0.0
    least_s: float = 0.0
    called_s: float = 0.0
    hidden_s: float = 0.0

    def add(self, m: PlannedMove, apart_s: float, least_s: float) -> None:
        """Add a move; what a product makes of it beside itself counts as hidden."""
        self.apart_s += apart_s
        self.least_s += least_s
        self.called_s += apart_s if m.schedule else m.seconds
        self.hidden_s += max(0.0, apart_s - m.seconds) if m.schedule else 0.0

    @property
    def seen(self) -> Seen:
        """The shares that are paid, and hidden."""
        beyond_s = self.apart_s - self.least_s
        calls = (self.called_s - self.least_s) / beyond_s if beyond_s > 0 else 1.0
        hidden = self.hidden_s / self.called_s if self.called_s > 0 else 0.0
        return Seen(min(1.0, max(0.0, calls)), min(1.0, hidden))
