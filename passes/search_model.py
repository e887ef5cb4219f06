"""What the numbers of the search mean: variables, and the moves of parameters between them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from autotp.layouts import Layout
from autotp.passes.moves import AxisTypes, Column, Moves, MoveTable
from autotp.passes.network import Value
from autotp.passes.pricing import Table
from autotp.passes.search.problem import Problem


@dataclass(frozen=True, slots=True)
class Variable:
    """What one variable of the problem decides: kind "op", "rest" or "copy", of which name."""

    kind: str
    name: str
    table: Table


@dataclass(frozen=True, slots=True)
class Meeting:
    """A pair of the problem whose cost is that of moving a parameter between two columns."""

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
    meetings: tuple[Meeting, ...]  # where those are moved
    sharing: bool = False  # whether moves of parameters are priced at their share of a full call

    def table_of(self, value: Value) -> MoveTable:
        """Return the moves of a value."""
        together, types = self.sharing and value.name in self.params, self.types[value.name]
        return self.moves.table(value.shape, value.dtype, value.grad, types, together=together)

    def shared(self) -> Model:
        """Return this model with the moves of parameters at their share: no plan takes less."""
        pairs = list(self.problem.pairs)
        for m in self.meetings:
            v, types = m.value, self.types[m.value.name]
            table = self.moves.table(v.shape, v.dtype, v.grad, types, m.again, together=True)
            seconds = self.moves.between(table, m.before, m.after)
            pairs[m.pair] = (*pairs[m.pair][:2], seconds)
        return replace(self, problem=replace(self.problem, pairs=tuple(pairs)), sharing=True)
