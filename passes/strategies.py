"""The search problem: which strategies each op has, what they cost, and what their meeting costs.

In: a Network and its Factors, a grid, a cluster, pins. Out: a Model of the search, whose `problem` is
numbers only and whose `variables` say what the numbers mean:

    op     one per op: its strategy                       unary: roofline seconds, saved bytes
    rest   one per parameter: its layout at rest          unary: the optimizer's traffic, its bytes
    copy   one per value with several consumers: the layout that they share
           pairs: producer -> copy -> each consumer, else producer -> consumer; the cheapest moves

Equal calls on equal shapes share their tables, so that a repeated layer costs nothing to describe
and is recognised by the search.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from autotp.cost_model.cluster import Cluster
from autotp.cost_model.compute import op_s
from autotp.cost_model.memory import ADAMW_STATES
from autotp.grid import Grid
from autotp.layouts import I, Layout, Shard, is_valid
from autotp.passes.choices import Strategy, Typing, strategies_of
from autotp.passes.factors import Factors
from autotp.passes.moves import AxisTypes, Moves, MoveTable, axis_types
from autotp.passes.network import Network, Op, Value
from autotp.passes.search import Problem
from autotp.passes.traffic import internal_traffic

OpFilter = Callable[[Op, Sequence[Strategy]], Sequence[int]]
RestFilter = Callable[[str, Sequence[Layout]], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Table:
    """The choices of one variable: their layouts as operand and result, seconds and bytes."""

    strategies: tuple[Strategy, ...]
    operands: tuple[tuple[Layout, ...], ...]  # per operand, the layout under each strategy
    results: tuple[tuple[Layout, ...], ...]
    seconds: np.ndarray
    memory: np.ndarray


@dataclass(frozen=True, slots=True)
class Variable:
    """What one variable of the problem decides: kind "op", "rest" or "copy", of which name."""

    kind: str
    name: str
    table: Table


@dataclass(frozen=True, slots=True)
class Model:
    """The search problem and its meaning."""

    problem: Problem
    variables: tuple[Variable, ...]
    moves: Moves
    types: Mapping[str, AxisTypes]  # per value, the types on each axis that its moves may use
    may_return: Callable[[Layout], bool]

    def table_of(self, value: Value) -> MoveTable:
        """Return the moves of a value."""
        return self.moves.table(value.shape, value.dtype, value.grad, self.types[value.name])


@dataclass(slots=True)
class _Builder:
    network: Network
    factors: Factors
    grid: Grid
    cluster: Cluster
    params: Mapping[str, str]
    filter_op: OpFilter
    filter_rest: RestFilter
    fixed_rest: Mapping[str, Layout]
    output_layouts: Callable[[Layout], bool]
    moves: Moves = field(init=False)
    wide: list[Table] = field(default_factory=list)  # of every op, before any pin
    op_tables: dict[tuple[object, ...], Table] = field(default_factory=dict)
    arrays: dict[tuple[object, ...], np.ndarray] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    numbers: dict[tuple[str, str], int] = field(default_factory=dict)
    unary: list[np.ndarray] = field(default_factory=list)
    pairs: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    types: dict[str, AxisTypes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.moves = Moves(self.grid, self.cluster)


def build_model(
    network: Network,
    factors: Factors,
    grid: Grid,
    cluster: Cluster,
    params: Mapping[str, str],
    filter_op: OpFilter,
    filter_rest: RestFilter,
    fixed_rest: Mapping[str, Layout],
    sharded_outputs: bool = False,
) -> Model:
    """Return the search problem of `network` on `grid`.

    `params` names the values that are parameters; the filters keep the choices that pins allow, and
    `fixed_rest` says how some parameters rest already.
    """
    outputs = _is_whole if not sharded_outputs else is_owned
    b = _Builder(
        network, factors, grid, cluster, params, filter_op, filter_rest, fixed_rest, outputs
    )
    b.wide = [_op_table(b, op) for op in network.ops]
    tables = [_pinned(b, op, table) for op, table in zip(network.ops, b.wide, strict=True)]
    readers = _readers(network)
    made = {v: (n, k) for n, op in enumerate(network.ops) for k, v in enumerate(op.results)}
    numbers: dict[int, int] = {}
    for n, (op, table) in enumerate(zip(network.ops, tables, strict=True)):
        for value in dict.fromkeys(op.operands):
            if value in params and value not in b.types:
                _add_source(b, value, readers[value], tables)
        numbers[n] = _add(b, Variable("op", op.name, table), table.seconds)
        for k, value in enumerate(op.results):
            _note_types(b, value, [*b.wide[n].results[k]], readers[value])
            if len(readers[value]) > 1:
                _add_copy(b, value, readers[value], tables, numbers[n], table.results[k])
    for n, op in enumerate(network.ops):
        for position, value in enumerate(op.operands):
            _join(b, value, position, numbers, n, made, tables, readers[value])
    for value in dict.fromkeys(o for o in network.outputs if o):
        _join_output(b, value, made, numbers, tables)
    interned: dict[bytes, np.ndarray] = {}
    unary = tuple(interned.setdefault(u.tobytes(), u) for u in b.unary)
    problem = Problem(
        sizes=tuple(len(u) for u in unary),
        unary=unary,
        pairs=tuple(b.pairs),
        memory=tuple(v.table.memory for v in b.variables),
    )
    return Model(problem, tuple(b.variables), b.moves, b.types, outputs)


OUTPUT = -1
"""Stands among a value's readers for the program's result."""


def _readers(network: Network) -> dict[str, list[tuple[int, int]]]:
    readers = network.consumers()
    for value in dict.fromkeys(o for o in network.outputs if o):
        readers[value].append((OUTPUT, 0))
    return readers


def _is_whole(layout: Layout) -> bool:
    return all(t is I for t in layout)


def is_owned(layout: Layout) -> bool:
    return all(t is I or isinstance(t, Shard) for t in layout)


# Tables of one op --------------------------------------------------------------------------------


def _op_table(b: _Builder, op: Op) -> Table:
    typing = Typing.of(
        [b.network.values[v] for v in op.operands], [b.network.values[v] for v in op.results]
    )
    key = (*_op_key(op, typing, b.factors),)
    if key not in b.op_tables:
        b.op_tables[key] = _price(b, op, strategies_of(op, typing, b.factors, b.grid), typing)
    return b.op_tables[key]


def _pinned(b: _Builder, op: Op, table: Table) -> Table:
    """Return the part of a table that the pins allow; equal parts are one table."""
    kept = tuple(b.filter_op(op, table.strategies))
    if len(kept) == len(table.strategies):
        return table
    key = (id(table), kept)
    if key not in b.op_tables:
        b.op_tables[key] = _keep(table, kept)
    return b.op_tables[key]


def _op_key(op: Op, typing: Typing, factors: Factors) -> Iterable[object]:
    """Describe all that an op's strategies depend on; atoms are numbered by appearance."""
    yield op.call.op
    yield repr((op.call.args, op.call.kwargs))
    yield op.call.operands
    yield typing
    seen: dict[int, int] = {}
    for factor in op.signature.factors():
        for way in factors.ways(op.name, factor):
            atom = seen.setdefault(way.atom, len(seen))
            yield (factor, way.parts, way.unit_count, way.is_atom, atom, factors.name(way.atom))


def _keep(table: Table, kept: Sequence[int]) -> Table:
    index = list(kept)
    return Table(
        strategies=tuple(table.strategies[k] for k in index),
        operands=tuple(tuple(row[k] for k in index) for row in table.operands),
        results=tuple(tuple(row[k] for k in index) for row in table.results),
        seconds=table.seconds[index],
        memory=table.memory[index],
    )


def _price(b: _Builder, op: Op, strategies: Sequence[Strategy], typing: Typing) -> Table:
    costs = [_op_cost(b, op, s, typing) for s in strategies]
    operands = zip(*(s.operands for s in strategies), strict=True)
    results = zip(*(s.results for s in strategies), strict=True)
    return Table(
        strategies=tuple(strategies),
        operands=tuple(operands),
        results=tuple(results),
        seconds=np.array([c[0] for c in costs]),
        memory=np.array([c[1] for c in costs]),
    )


PASSES = 3
"""Forward once, and backward twice as much: the gradients of both operands of a product."""


def _op_cost(b: _Builder, op: Op, s: Strategy, typing: Typing) -> tuple[float, float]:
    """Return seconds, forward and backward, and the bytes that backward keeps."""
    tensors = [t for t in op.call.operands if t]
    held = [
        b.moves.local_bytes(t.shape, t.dtype, layout)
        for t, layout in zip(
            [*tensors, *op.call.results], [*s.operands, *s.results], strict=True
        )
    ]
    count = len(tensors)
    training = any(typing.results)
    kept = sum(held[k if k >= 0 else count] for k in saved_positions(op, typing)) if training else 0
    if op.rule.free:
        return 0.0, float(kept)
    dtype = op.call.results[0].dtype
    seconds = op_s(local_flops(op, s, b.grid), sum(held), dtype, b.cluster)
    split = [c.split for c in s.choices]
    inside = internal_traffic(op, split, s.operands, s.results, b.grid, training)
    sending = sum(b.moves.kind_s("all_reduce", size, axis) for axis, size in inside)
    return float(seconds) * (PASSES if training else 1) + sending, float(kept)


def saved_positions(op: Op, typing: Typing) -> list[int]:
    """Return the operands (and -1, the result) that backward needs."""
    count = len(typing.operands)
    if op.rule.saves is not None:
        return [k for k in op.rule.saves if k < count]
    if count == 1:
        return [0]
    return [k for k in range(count) if k not in op.signature.added]


def local_flops(op: Op, s: Strategy, grid: Grid) -> int:
    """Return the forward flops of one rank: two per element of each contracted product."""
    sizes = op.signature.sizes
    local = {
        f: -(-n // math.prod(grid.sizes[a] for a in s.split_axes(f))) for f, n in sizes.items()
    }
    return 2 * sum(math.prod(local.get(f, 1) for f in term) for term in products(op))


def products(op: Op) -> list[list[str]]:
    """Return the products of factors that an op multiplies out: from its rule, or its contraction."""
    if op.rule.flops:
        return [term.split() for term in op.rule.flops.split("+")]
    sig = op.signature
    counts = [
        sum(any(f in p for dim in dims for p in dim) for dims in sig.operands)
        for f in sig.factors()
        if sig.summed(f)
    ]
    return [sig.factors()] if any(n > 1 for n in counts) and not op.rule.split else []


STATE_COPIES = 2 + ADAMW_STATES
"""A trained parameter, its gradient and the optimizer's states."""

UPDATE_TRAFFIC = 2 * ADAMW_STATES + 3
"""Passes over a parameter's bytes in one AdamW step: read p, g and the states, write p and states."""


# Variables and their meeting ------------------------------------------------------------------------


def _add(b: _Builder, variable: Variable, seconds: np.ndarray) -> int:
    b.numbers[variable.kind, variable.name] = len(b.variables)
    b.variables.append(variable)
    b.unary.append(seconds)
    return len(b.unary) - 1


def _note_types(
    b: _Builder, value: str, layouts: list[Layout], readers: Sequence[tuple[int, int]]
) -> None:
    """Note the types that moves of a value may use: all that it may meet, whatever is pinned."""
    for n, position in readers:
        if n != OUTPUT:
            layouts += b.wide[n].operands[position]
    v = b.network.values[value]
    b.types[value] = axis_types(list(dict.fromkeys(layouts)), v.grad, len(b.grid.sizes))


def _add_source(
    b: _Builder, value: str, readers: Sequence[tuple[int, int]], tables: Sequence[Table]
) -> None:
    """Add a parameter's resting layout, and the copy that its readers share."""
    fixed = b.fixed_rest.get(value)
    _note_types(b, value, [fixed] if fixed else [], readers)
    v = b.network.values[value]
    layouts = (fixed,) if fixed else _resting_layouts(b, value, v)
    key = ("rest", v.shape, v.dtype, v.grad, layouts)
    if key not in b.op_tables:
        held = np.array([b.moves.local_bytes(v.shape, v.dtype, c) for c in layouts], dtype=float)
        traffic = UPDATE_TRAFFIC * held if v.grad else 0 * held
        seconds = np.array([float(op_s(0, int(t), v.dtype, b.cluster)) for t in traffic])
        states = STATE_COPIES if v.grad else 1
        b.op_tables[key] = Table((), (), (layouts,), seconds, states * held)
    table = b.op_tables[key]
    number = _add(b, Variable("rest", value, table), table.seconds)
    if len(readers) > 1:
        _add_copy(b, value, readers, tables, number, layouts)


def _resting_layouts(b: _Builder, value: str, v: Value) -> tuple[Layout, ...]:
    resting = [
        c
        for c in itertools.product(*b.types[value])
        if is_owned(c) and can_rest(c) and is_valid(v.shape, c, b.grid)
    ]
    return tuple(resting[k] for k in b.filter_rest(value, resting))


def can_rest(layout: Layout) -> bool:
    """A parameter rests in equal blocks only, on one axis: those DTensor can place."""
    blocks = [t.parts for t in layout if isinstance(t, Shard) and t.parts]
    return len(blocks) < 2 and all(len(set(parts)) == 1 for parts in blocks)


def _add_copy(
    b: _Builder,
    value: str,
    readers: Sequence[tuple[int, int]],
    tables: Sequence[Table],
    producer: int,
    made: tuple[Layout, ...],
) -> None:
    """Add the layout that the readers of `value` share, joined to what makes it."""
    wanted = [c for n, p in readers if n != OUTPUT for c in tables[n].operands[p]]
    layouts = tuple(dict.fromkeys([*made, *wanted]))
    v = b.network.values[value]
    key = ("copy", v.shape, v.dtype, v.grad, layouts)
    if key not in b.op_tables:
        zero = np.zeros(len(layouts))
        b.op_tables[key] = Table((), (), (layouts,), zero, zero)
    number = _add(b, Variable("copy", value, b.op_tables[key]), b.op_tables[key].seconds)
    b.pairs.append((producer, number, _pair(b, v, made, layouts)))


def _pair(
    b: _Builder, value: Value, before: tuple[Layout, ...], after: tuple[Layout, ...]
) -> np.ndarray:
    """Return the seconds of the cheapest moves from each layout to each."""
    key = (value.shape, value.dtype, value.grad, b.types[value.name], before, after)
    if key not in b.arrays:
        table = b.moves.table(value.shape, value.dtype, value.grad, b.types[value.name])
        rows = [table.number[c] for c in before]
        columns = [table.number[c] for c in after]
        b.arrays[key] = table.seconds[np.ix_(rows, columns)]
    return b.arrays[key]


def _join(
    b: _Builder,
    value: str,
    position: int,
    numbers: Mapping[int, int],
    n: int,
    made: Mapping[str, tuple[int, int]],
    tables: Sequence[Table],
    readers: Sequence[tuple[int, int]],
) -> None:
    """Charge an op for bringing one operand to the layout that it wants."""
    v, wanted = b.network.values[value], tables[n].operands[position]
    origin = _origin(b, value, made, numbers, tables)
    if origin is None:
        if value not in b.types:
            _note_types(b, value, [], readers)
        whole = ((I,) * len(b.grid.sizes),)
        b.unary[numbers[n]] = b.unary[numbers[n]] + _pair(b, v, whole, wanted)[0]
        return
    b.pairs.append((origin[0], numbers[n], _pair(b, v, origin[1], wanted)))


def _origin(
    b: _Builder,
    value: str,
    made: Mapping[str, tuple[int, int]],
    numbers: Mapping[int, int],
    tables: Sequence[Table],
) -> tuple[int, tuple[Layout, ...]] | None:
    """Return the variable that decides in which layout readers find a value, and its layouts."""
    if ("copy", value) not in b.numbers and value in made:
        n, k = made[value]
        return numbers[n], tables[n].results[k]
    number = b.numbers.get(("copy", value), b.numbers.get(("rest", value)))
    return None if number is None else (number, b.variables[number].table.results[0])


def _join_output(
    b: _Builder,
    value: str,
    made: Mapping[str, tuple[int, int]],
    numbers: Mapping[int, int],
    tables: Sequence[Table],
) -> None:
    """Charge the cheapest way to a layout in which the program may return a value."""
    origin = _origin(b, value, made, numbers, tables)
    if origin is None:
        return
    v = b.network.values[value]
    table = b.moves.table(v.shape, v.dtype, v.grad, b.types[value])
    allowed = tuple(c for c in table.layouts if b.output_layouts(c))
    best = _pair(b, v, origin[1], allowed).min(axis=1)
    b.unary[origin[0]] = b.unary[origin[0]] + best
