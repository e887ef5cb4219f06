"""The search problem: which strategies each op has, what they cost, and what their meeting costs.

In: a Network and its Factors, a grid, a cluster, pins. Out: a Model of the search, whose `problem`
is numbers only and whose `variables` say what the numbers mean:

    op     one per op: its strategy                       unary: roofline seconds, saved bytes
    rest   one per parameter: its layout at rest          unary: the optimizer's traffic, its bytes
    copy   one per value with several consumers: the layout that they share
           pairs: producer -> copy -> each consumer, else producer -> consumer; the cheapest moves

Equal calls on equal shapes share their tables, so that a repeated layer costs nothing to describe
and is recognised by the search. What is kept for backward is charged once: to the first op that
keeps it, or to the copy where several do. `pricing` fills the tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from autotp.cost_model.cluster import Cluster
from autotp.grid import Grid
from autotp.layouts import I, Layout, Shard, is_valid, shard
from autotp.passes.choices import Strategy, Typing, strategies_of
from autotp.passes.factors import Factors
from autotp.passes.move_table import Column, MoveTable
from autotp.passes.moves import Moves, axis_types
from autotp.passes.network import Network, Op, Value
from autotp.passes.pricing import (
    RESULT,
    Table,
    is_recomputed,
    price_copy,
    price_op,
    price_rest,
    saved_positions,
    typing_of,
)
from autotp.passes.products import movable
from autotp.passes.search.problem import Problem
from autotp.passes.search_model import Meeting, Model, Variable, best_of
from autotp.passes.sharing import Best
from autotp.passes.spaces import AxisTypes

OUTPUT = -1
"""Stands among a value's readers for the program's result."""

Position = tuple[int, int]
"""An op and one of its operands, both by number."""


def _all(subject: object, choices: Sequence[object]) -> Sequence[int]:
    return range(len(choices))


@dataclass(frozen=True, slots=True)
class Limits:
    """What narrows the choices.

    op, rest         the numbers of an op's strategies and of a parameter's layouts that are allowed
    fixed            how some parameters rest already
    sharded          the outputs that may be returned in shards
    """

    op: Callable[[Op, Sequence[Strategy]], Sequence[int]] = _all
    rest: Callable[[str, Sequence[Layout]], Sequence[int]] = _all
    fixed: Mapping[str, Layout] = field(default_factory=dict)
    sharded: Collection[str] = ()

    def may_return(self, value: str, layout: Layout) -> bool:
        """Say whether the program may return an output in this layout."""
        if value in self.sharded:
            return is_owned(layout) and can_rest(layout)
        return all(t is I for t in layout)


@dataclass(slots=True)
class _Builder:
    """What is known so far of the problem.

    wide     of every op, its table before any pin; `tables` after
    within   by which collectives products may move a value
    is_best  whether moves between variables are priced at the least that they may take
    readers  of every value, who reads it; `savers` which slots of which ops backward needs
    places   of every value, the variable that decides where readers find it, and its layouts
    """

    network: Network
    factors: Factors
    moves: Moves
    params: Mapping[str, str]
    limits: Limits
    within: Mapping[str, frozenset[str]]
    is_best: bool
    readers: Mapping[str, list[Position]]
    savers: Mapping[str, list[Position]]
    wide: list[Table] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    made: dict[tuple[object, ...], Table] = field(default_factory=dict)
    resting: dict[tuple[object, ...], Column] = field(default_factory=dict)
    met: dict[tuple[object, ...], AxisTypes] = field(default_factory=dict)
    distinct: dict[AxisTypes, AxisTypes] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    unary: list[np.ndarray] = field(default_factory=list)
    pairs: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    places: dict[str, tuple[int, Column]] = field(default_factory=dict)
    types: dict[str, AxisTypes] = field(default_factory=dict)

    def table(self, key: tuple[object, ...], make: Callable[[], Table]) -> Table:
        """Return the table of this key, made at most once."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def add(self, kind: str, name: str, table: Table) -> int:
        """Add a variable and return its number."""
        self.variables.append(Variable(kind, name, table))
        self.unary.append(table.seconds)
        return len(self.unary) - 1


def build_model(
    network: Network,
    factors: Factors,
    grid: Grid,
    cluster: Cluster,
    params: Mapping[str, str],
    limits: Limits | None = None,
    is_best: bool = False,
) -> Model:
    """Return the search problem of `network` on `grid`, each move priced as a call of its own.

    With `is_best` at the least that it may take, as in `Model.best`. `params` names the values that
    are parameters.
    """
    limits = limits or Limits()
    whole, savers = (I,) * len(grid.sizes), _savers(network)
    moves = Moves(grid, cluster)
    values = [network.values[name] for name in params if name in network.values]
    moves.shared_bytes = sum(moves.local_bytes(v.shape, v.dtype, whole) for v in values)
    moves.params = frozenset(params)
    given = network, factors, moves, params, limits, movable(network), is_best
    b = _Builder(*given, _readers(network), savers)
    for op in network.ops:
        _add_tables(b, op)
    numbers = []
    for n, op in enumerate(network.ops):
        for value in dict.fromkeys(op.operands):
            if value in params and value not in b.types:
                _add_source(b, value)
        numbers.append(b.add("op", op.name, b.tables[n]))
        for k, value in enumerate(op.results):
            b.places[value] = (numbers[n], b.tables[n].results[k])
            _note_types(b, value, [b.wide[n].results[k]])
            _add_copy(b, value)
    for value in params:
        if value in network.values and not b.readers[value]:
            _add_source(b, value)
    for n, op in enumerate(network.ops):
        for value, wanted in zip(op.operands, b.tables[n].operands, strict=True):
            _join(b, value, numbers[n], wanted, is_recomputed(network, op))
    for value in (v for v in network.values if v in params and v not in b.types):
        _add_source(b, value)  # read by no op: it may be spread all the same
    for value in dict.fromkeys(o for o in network.outputs if o in b.places):
        _join_output(b, value)
    meanings = (tuple(b.variables), moves, b.types, limits.may_return, params, tuple(b.meetings))
    return Model(_problem(b), *meanings, b.within, is_best)


def _problem(b: _Builder) -> Problem:
    interned: dict[bytes, np.ndarray] = {}
    unary = tuple(interned.setdefault(u.tobytes(), u) for u in b.unary)
    return Problem(
        sizes=tuple(len(u) for u in unary),
        unary=unary,
        pairs=tuple(b.pairs),
        memory=tuple(v.table.memory for v in b.variables),
    )


def is_owned(layout: Layout) -> bool:
    """Say whether every rank holds the whole of a tensor, or its own part of it."""
    return all(t is I or isinstance(t, Shard) for t in layout)


def _readers(network: Network) -> dict[str, list[Position]]:
    readers = network.consumers()
    for value in dict.fromkeys(o for o in network.outputs if o):
        readers[value].append((OUTPUT, 0))
    return readers


def _savers(network: Network) -> dict[str, list[Position]]:
    """Return, per value, who keeps it for backward: the op and the slot, each op once.

    What enters a checkpoint region is kept as it is made, before the region moves it.
    """
    savers: dict[str, dict[int, int]] = {name: {} for name in network.values}
    makers = {op.results[0]: (n, RESULT) for n, op in enumerate(network.ops)}
    for n, op in enumerate(network.ops):
        for slot in saved_positions(op, typing_of(network, op)):
            value = op.results[0] if slot == RESULT else op.operands[slot]
            at = (n, slot) if not op.region else makers.get(value, (n, slot))
            savers[value].setdefault(*at)
    return {name: list(slots.items()) for name, slots in savers.items()}


# Tables ------------------------------------------------------------------------------------------


def _add_tables(b: _Builder, op: Op) -> None:
    """Add the table of an op: all its strategies, then those that the pins allow."""
    typing = typing_of(b.network, op)
    alike = b.factors.kind_of(op.name, lambda: _described(op, typing, b.factors))

    def price() -> Table:
        return price_op(op, strategies_of(op, typing, b.factors, b.moves.grid), typing, b.moves)

    wide = b.table(("op", alike), price)
    slots = _charged(b, len(b.wide))
    b.wide.append(wide)
    charged = b.table((wide, slots), lambda: wide.charge(slots))
    kept = tuple(b.limits.op(op, wide.strategies))
    if len(kept) < len(wide.strategies):
        charged = b.table((charged, kept), lambda: charged.keep(kept, b.moves))
    b.tables.append(charged)


def _described(op: Op, typing: Typing, factors: Factors) -> Iterable[object]:
    """Describe all that an op's strategies depend on; atoms are numbered by appearance."""
    yield op.call.op
    yield bool(op.region), op.enters
    yield repr((op.call.args, op.call.kwargs))
    yield op.call.operands
    yield typing
    seen: dict[int, int] = {}
    for factor in op.signature.factors():
        for way in factors.ways(op.name, factor):
            atom = seen.setdefault(way.atom, len(seen))
            yield (factor, way.parts, way.unit_count, way.is_atom, atom, factors.name(way.atom))


def _charged(b: _Builder, n: int) -> tuple[int, ...]:
    """Return the slots whose bytes op n is charged: where it is the first to keep them."""
    op = b.network.ops[n]
    values = {RESULT: op.results[0], **dict(enumerate(op.operands))}
    return tuple(
        slot
        for slot, value in values.items()
        if b.savers[value][:1] == [(n, slot)] and not _is_charged_to_copy(b, value)
    )


def _is_charged_to_copy(b: _Builder, value: str) -> bool:
    return len(b.savers[value]) > 1 and len(b.readers[value]) > 1


# Variables and their meeting ---------------------------------------------------------------------


def _note_types(b: _Builder, value: str, made: Sequence[Column]) -> None:
    """Note the types that moves of a value may use: all that it may meet, whatever is pinned."""
    wanted = [b.wide[n].operands[position] for n, position in b.readers[value] if n != OUTPUT]
    grad = b.network.values[value].grad
    columns = tuple(dict.fromkeys([*made, *wanted]))
    if (grad, *columns) not in b.met:
        layouts = list(dict.fromkeys(itertools.chain(*(c.distinct for c in columns))))
        types = axis_types(layouts, grad, len(b.moves.grid.sizes))
        b.met[grad, *columns] = b.distinct.setdefault(types, types)
    b.types[value] = b.met[grad, *columns]


def _add_source(b: _Builder, value: str) -> None:
    """Add a parameter's resting layout, and the copy that its readers share."""
    v, fixed = b.network.values[value], b.limits.fixed.get(value)
    made = [fixed] if fixed else [] if _meets_shards(b, value) else [_spread(v, b.moves.grid)]
    _note_types(b, value, [b.moves.column(made)] if made else [])
    layouts = b.moves.column([fixed]) if fixed else _resting_layouts(b, v)
    is_saved = bool(b.savers[value])
    key = ("rest", v.shape, v.dtype, v.grad, layouts, is_saved)
    table = b.table(key, lambda: price_rest(v, layouts, is_saved, b.moves))
    b.places[value] = (b.add("rest", value, table), layouts)
    _add_copy(b, value)


def _meets_shards(b: _Builder, value: str) -> bool:
    """Say whether any reader of a value can read it in shards in which it may rest."""
    wanted = (b.wide[n].operands[position] for n, position in b.readers[value] if n != OUTPUT)
    types = (t for column in wanted for layout in column.distinct for t in layout)
    return any(isinstance(t, Shard) and can_rest((t,)) for t in types)


def _spread(v: Value, grid: Grid) -> Layout:
    """Return how a parameter may rest though all that read it need it whole: by its longest dim."""
    longest = v.shape.index(max(v.shape)) if v.shape else None
    return (I if longest is None else shard(longest),) * len(grid.sizes)


def _resting_layouts(b: _Builder, v: Value) -> Column:
    key = (v.shape, b.types[v.name])
    if key not in b.resting:
        b.resting[key] = b.moves.column(
            c
            for c in itertools.product(*b.types[v.name])
            if is_owned(c) and can_rest(c) and is_valid(v.shape, c, b.moves.grid)
        )
    every = b.resting[key]
    kept = b.limits.rest(v.name, tuple(every))
    return every if len(kept) == len(every) else b.moves.column(every[k] for k in kept)


def can_rest(layout: Layout) -> bool:
    """A parameter rests in equal blocks only, of a dim of one axis: those DTensor can place."""
    dims = [t.dim for t in layout if isinstance(t, Shard)]
    blocks = [t for t in layout if isinstance(t, Shard) and t.parts]
    alone = all(dims.count(t.dim) == 1 for t in blocks)
    return alone and len(blocks) < 2 and all(len(set(t.parts)) == 1 for t in blocks)


def _add_copy(b: _Builder, value: str) -> None:
    """Add the layout that several readers of a value share, joined to what makes it."""
    if len(b.readers[value]) < 2:
        return
    v, (producer, made) = b.network.values[value], b.places[value]
    wanted = [b.tables[n].operands[p] for n, p in b.readers[value] if n != OUTPUT]
    columns = tuple(dict.fromkeys([made, *wanted]))
    is_saved = _is_charged_to_copy(b, value)
    giving = sum(n != OUTPUT and _gives(b, n, p) for n, p in b.readers[value])
    key = ("copy", v.shape, v.dtype, giving, is_saved, columns)

    def price() -> Table:
        shared = b.moves.column(dict.fromkeys(itertools.chain(*(c.distinct for c in columns))))
        return price_copy(v, shared, giving, is_saved, b.moves)

    table = b.table(key, price)
    layouts = table.results[0]
    b.places[value] = (b.add("copy", value, table), layouts)
    n, _ = b.readers[value][0]
    again = n != OUTPUT and is_recomputed(b.network, b.network.ops[n])
    _meet(b, v, (producer, b.places[value][0]), made, layouts, again)


def _gives(b: _Builder, n: int, position: int) -> bool:
    """Say whether an op gives its operand a gradient."""
    typing = typing_of(b.network, b.network.ops[n])
    return typing.operands[position] and any(typing.results)


def _meet(
    b: _Builder, v: Value, ends: tuple[int, int], before: Column, after: Column, again: bool
) -> None:
    """Charge two variables for what lies between the layouts that each leaves to the other."""
    best = best_of(v, b.params, b.within, b.moves) if b.is_best else None
    b.meetings.append(Meeting(len(b.pairs), v, before, after, again))
    b.pairs.append((*ends, b.moves.between(_table(b, v, again, best), before, after)))


def _table(b: _Builder, v: Value, again: bool = False, best: Best | None = None) -> MoveTable:
    is_put = v.name not in b.params
    return b.moves.table(v.shape, v.dtype, v.grad, b.types[v.name], again, best, is_put)


def _join(b: _Builder, value: str, number: int, wanted: Column, again: bool) -> None:
    """Charge an op for bringing one operand to the layout that it wants, twice if `again`."""
    v = b.network.values[value]
    if value in b.places:
        origin, found = b.places[value]
        _meet(b, v, (origin, number), found, wanted, again)
        return
    if value not in b.types:
        _note_types(b, value, [])
    whole = b.moves.column([(I,) * len(b.moves.grid.sizes)])
    seconds = b.moves.between(_table(b, v, again), whole, wanted)
    b.unary[number] = b.unary[number] + seconds[0]


def _join_output(b: _Builder, value: str) -> None:
    """Charge the cheapest way to a layout in which the program may return a value."""
    v, (number, found) = b.network.values[value], b.places[value]
    table = _table(b, v)
    allowed = b.moves.column(c for c in table.layouts if b.limits.may_return(value, c))
    b.unary[number] = b.unary[number] + b.moves.between(table, found, allowed).min(axis=1)
