"""What it costs to bring a value from one layout to another, and by which moves.

A value's layouts form a graph whose edges change the type of one axis (`layouts.MOVES`), each
priced forward and backward; `Moves.table` holds the cheapest way between any two of them, and
`path` spells it out. Prices are those of one rank, the largest.

    move_s    the collectives of one move, and a copy for each end whose chunks lie apart in memory
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from autotp.cost_model.cluster import Cluster, Link
from autotp.cost_model.collectives import FREE, collective_s, fastest, hops_s, plain_s
from autotp.cost_model.compute import op_s
from autotp.grid import Grid
from autotp.layouts import (
    AxisType,
    I,
    Layout,
    P,
    R,
    Shape,
    Shard,
    largest_shape,
    move_of,
)
from autotp.passes.move_table import Column, MoveTable, closed
from autotp.passes.sharing import Best, Seen, best_s, may_ring
from autotp.passes.spaces import AxisTypes, Space, elements, legal, picks_of, space

FULL = 3
"""How much longer than its latency a full call's bytes take."""
LARGE_BYTES = 2**26
"""Where the bytes of a call are all its time, and the largest buffer of several tensors."""


@dataclass(frozen=True, slots=True)
class Step:
    """One move of one axis: the types before and after, and the collectives' full size in bytes."""

    axis: int
    before: AxisType
    after: AxisType
    forward: str
    backward: str
    size_bytes: int


Kind = tuple[str, str, str]
"""What moves, a parameter or an activation, and the collectives forward and backward."""

ENDS = (0, 1, 2)
"""How many ends of a move may lie apart in memory."""

IN_ORDER = frozenset(["all_gather", "all_to_all", "reduce_scatter"])
"""Collectives over buffers that number the ranks first: chunks of inner dims are copied there."""


class Ways(NamedTuple):
    """How the moves of a value are priced: see `Moves.table`."""

    again: bool = False
    best: Best | None = None
    is_put: bool = False


def apart_in(shape: Shape, t: AxisType) -> bool:
    """Say whether the chunks that ranks hold of a tensor, each whole, would lie apart in it."""
    if not isinstance(t, Shard):
        return False
    return bool(t.parts) or math.prod(int(n) for n in shape[: t.dim]) > 1


Seconds = Callable[[str, int, int, Link, str], float]
"""What a collective takes: its kind, size, ranks, link and backend."""


@dataclass(slots=True)
class Moves:
    """Price the moves of values on one grid of one cluster; tables are computed once per shape.

    `shared_bytes` are those of all values that may share calls, the parameters; `seen` is what
    plans pay of moves.
    """

    grid: Grid
    cluster: Cluster
    shared_bytes: int = 0
    params: Collection[str] = ()
    seen: Mapping[Kind, Seen] | None = None
    _tables: dict[tuple[object, ...], tuple[AxisTypes, MoveTable]] = field(default_factory=dict)
    _columns: dict[tuple[tuple[Layout, ...], bytes], Column] = field(default_factory=dict)
    _prices: dict[tuple[str, int, int], float] = field(default_factory=dict)
    _spaces: dict[tuple[AxisTypes, bytes], Space] = field(default_factory=dict)
    _places: dict[tuple[Space, Column], np.ndarray] = field(default_factory=dict)
    _elements: dict[tuple[Shape, Layout], int] = field(default_factory=dict)
    _between: dict[tuple[MoveTable, Column, Column], np.ndarray] = field(default_factory=dict)
    _closed: dict[bytes, np.ndarray] = field(default_factory=dict)
    _paths: dict[tuple[MoveTable, Layout, Layout], list[Step]] = field(default_factory=dict)
    _algorithms: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def as_seen(self, seen: Mapping[Kind, Seen]) -> Moves:
        """Return these prices with moves as some plan pays them; nothing priced is kept."""
        given = self.grid, self.cluster, self.shared_bytes, self.params, seen
        return Moves(*given, _columns=self._columns)

    def column(self, layouts: Iterable[Layout]) -> Column:
        """Return the one column of these layouts."""
        layouts = tuple(layouts)
        number = {c: k for k, c in enumerate(dict.fromkeys(layouts))}
        return self.column_of(tuple(number), np.array([number[c] for c in layouts], dtype=np.intp))

    def column_of(self, distinct: tuple[Layout, ...], which: np.ndarray) -> Column:
        """Return the one column whose choice k has the layout `distinct[which[k]]`."""
        key = (distinct, which.tobytes())
        return self._columns.setdefault(key, Column(distinct, which))

    def between(self, table: MoveTable, before: Column, after: Column) -> np.ndarray:
        """Return the seconds [from, to] of the cheapest ways between the layouts of two columns."""
        key = (table, before, after)
        if key not in self._between:
            rows, columns = (self._places_of(side, table.space) for side in (before, after))
            self._between[key] = table.seconds[np.ix_(rows, columns)]
        return self._between[key]

    def _places_of(self, column: Column, space: Space) -> np.ndarray:
        """Return the number of its layout in a space, per choice of a column."""
        key = (space, column)
        if key not in self._places:
            self._places[key] = np.array([space.number[c] for c in column.distinct])[column.which]
        return self._places[key]

    def table(
        self,
        shape: Shape,
        dtype: torch.dtype,
        grad: bool,
        types: AxisTypes,
        again: bool = False,
        best: Best | None = None,
        is_put: bool = False,
    ) -> MoveTable:
        """Return the table of a value whose axes may have these types.

        `again` says that what is sent forward is sent once more when backward recomputes it;
        `best` that it is priced at the least that moves of such a value may take; `is_put` that
        chunks that lie apart are put side by side for each move alone (`apart_in`).
        """
        key = (shape, dtype, grad, id(types), again, best, is_put)  # to hash all types takes longer
        if key not in self._tables:
            made = self._compute(shape, dtype, grad, types, Ways(again, best, is_put))
            self._tables[key] = types, made
        return self._tables[key][1]

    def _compute(
        self,
        shape: Shape,
        dtype: torch.dtype,
        grad: bool,
        types: AxisTypes,
        ways: Ways,
    ) -> MoveTable:
        space = self._space(shape, types)
        seconds = np.full((len(space.layouts),) * 2, np.inf)
        np.fill_diagonal(seconds, 0.0)
        held = elements(shape, space.types, space.picks, self.grid) * dtype.itemsize
        apart = np.array([apart_in(shape, t) for t in space.types]) * ways.is_put
        for c in space.changes:
            ranks = self.grid.sizes[c.axis]
            size = wire_bytes(c.before, c.after, held[c.starts], held[c.ends], ranks)
            put = sum(apart[space.picks[end, c.axis]] for end in (c.starts, c.ends))
            edge = c.axis, c.before, c.after, size, put
            seconds[c.starts, c.ends] = self._edge_s(*edge, grad, ways)
        key = hashlib.blake2b(seconds.tobytes()).digest()  # values of other dims may move alike
        if key not in self._closed:
            self._closed[key] = closed(seconds)
        return MoveTable(space, seconds, self._closed[key])

    def _space(self, shape: Shape, options: AxisTypes) -> Space:
        """Return the legal layouts of a shape, the same for all shapes that have the same."""
        types = tuple(dict.fromkeys(itertools.chain(*options)))
        every = picks_of(types, options)
        picks = every[legal(shape, types, every, self.grid)]
        key = (options, picks.tobytes())
        if key not in self._spaces:
            self._spaces[key] = space(types, picks)
        return self._spaces[key]

    def local_bytes(self, shape: Shape, dtype: torch.dtype, layout: Layout) -> int:
        """Return what the largest rank holds of a tensor."""
        key = (shape, layout)
        if key not in self._elements:
            self._elements[key] = math.prod(largest_shape(shape, layout, self.grid))
        return self._elements[key] * dtype.itemsize

    def _edge_s(
        self,
        axis: int,
        before: AxisType,
        after: AxisType,
        sizes: np.ndarray,
        apart: np.ndarray,
        grad: bool,
        ways: Ways,
    ) -> np.ndarray:
        """Return the seconds of one change of type for buffers of each of these sizes."""
        move = move_of(before, after)
        assert move is not None
        backward = move.backward if grad else "none"
        kinds = [move.forward] * (1 + ways.again) + [backward]
        distinct, which = np.unique(sizes * len(ENDS) + apart, return_inverse=True)
        edges = [divmod(n, len(ENDS)) for n in distinct.tolist()]
        return np.array([self.move_s(kinds, n, axis, k, ways.best) for n, k in edges])[which]

    def move_s(
        self,
        kinds: Sequence[str],
        size_bytes: int,
        axis: int,
        apart: int = 0,
        best: Best | None = None,
    ) -> float:
        """Return the seconds of a move by these collectives, forward and backward.

        `apart` of its ends lie apart in memory. At `best`, nothing is put in order where a ring may
        make the move: it puts blocks where they belong.
        """
        if best is None:
            seconds = self.kinds_s(kinds, size_bytes, axis)
        else:
            seconds = best_s(self, kinds, size_bytes, axis, best)
            if not self.seen and may_ring(kinds, best):
                return seconds
        return seconds + self.put_s(kinds, size_bytes, axis, apart)

    def put_s(self, kinds: Sequence[str], size_bytes: int, axis: int, apart: int) -> float:
        """Return the seconds of the copies that put ends in order, one for each call."""
        copies = apart * sum(kind in IN_ORDER for kind in kinds)
        return copies * self.kind_s("pad", size_bytes, axis) if copies else 0.0

    def apart(self, value: str, shape: Shape, step: tuple[AxisType, AxisType]) -> int:
        """Return how many ends of a move of a value lie apart; parameters share a buffer."""
        return 0 if value in self.params else sum(apart_in(shape, t) for t in step)

    def kinds_s(self, kinds: Sequence[str], size_bytes: int, axis: int) -> float:
        """Return the seconds of calls of their own, each after the other."""
        return sum(self.kind_s(kind, size_bytes, axis) for kind in kinds)

    def kind_s(self, kind: str, size_bytes: int, axis: int) -> float:
        """Return the seconds of one collective by its fastest algorithm, or of a local copy."""
        if kind == "none":
            return 0.0
        key = (kind, size_bytes, axis)
        if key not in self._prices:
            self._prices[key] = self._price(kind, size_bytes, axis, collective_s)
        return self._prices[key]

    def plain_s(self, kind: str, size_bytes: int, axis: int) -> float:
        """Return the seconds of one collective as the backend runs it, or of a local copy."""
        return 0.0 if kind == "none" else self._price(kind, size_bytes, axis, plain_s)

    def hops_s(self, kind: str, size_bytes: int, axis: int) -> float:
        """Return the seconds of a collective as messages that go round; of "none", nothing."""
        if kind == "none" or self.grid.sizes[axis] == 1:
            return 0.0
        link = self.cluster.link(self.grid.sizes, axis)
        return float(hops_s(kind, size_bytes, self.grid.sizes[axis], link))

    def algorithm(self, kind: str, size_bytes: int, axis: int) -> str:
        """Return the algorithm that `kind_s` is the price of, "" for the plain one."""
        key = (kind, size_bytes, axis)
        if key not in self._algorithms:
            link, ranks = self.cluster.link(self.grid.sizes, axis), self.grid.sizes[axis]
            found = fastest(kind, size_bytes, ranks, link, self.cluster.backend)
            self._algorithms[key] = found
        return self._algorithms[key]

    def share_s(self, kind: str, size_bytes: int, axis: int) -> float:
        """Return the seconds of one collective that others may share: its part of a full one.

        No call takes less per byte, as long as none of several is over `full_bytes`.
        """
        full = self.full_bytes(kind, axis)
        if size_bytes >= full:
            return self.kind_s(kind, size_bytes, axis)
        return self.kind_s(kind, full, axis) * size_bytes / full

    def full_bytes(self, kind: str, axis: int) -> int:
        """Return the largest call that several tensors may share; 0 if there is no latency.

        A call's latency is then a quarter of its time, or it sends all that there is.
        """
        if kind in FREE or self.grid.sizes[axis] == 1:
            return 0
        latency_s = self.kind_s(kind, 0, axis)
        per_byte_s = (self.kind_s(kind, LARGE_BYTES, axis) - latency_s) / LARGE_BYTES
        saves_bytes = FULL * latency_s / per_byte_s if per_byte_s else LARGE_BYTES
        return int(min(saves_bytes, LARGE_BYTES, self.shared_bytes))

    def _price(self, kind: str, size_bytes: int, axis: int, seconds: Seconds) -> float:
        if kind in FREE:
            return float(op_s(0, 2 * size_bytes, torch.float32, self.cluster))
        link = self.cluster.link(self.grid.sizes, axis)
        return float(seconds(kind, size_bytes, self.grid.sizes[axis], link, self.cluster.backend))

    def path(
        self, table: MoveTable, before: Layout, after: Layout, shape: Shape, dtype: torch.dtype
    ) -> list[Step]:
        """Return the steps of the cheapest way between two layouts of the value of a table."""
        key = (table, before, after)
        if key not in self._paths:
            self._paths[key] = self._find_path(*key, shape, dtype)
        return self._paths[key]

    def _find_path(
        self, table: MoveTable, before: Layout, after: Layout, shape: Shape, dtype: torch.dtype
    ) -> list[Step]:
        steps = []
        at, end = table.number[before], table.number[after]
        while at != end:
            following = table.following(at, end)
            steps.append(self._step(table.layouts[at], table.layouts[following], shape, dtype))
            at = following
        return steps

    def _step(self, before: Layout, after: Layout, shape: Shape, dtype: torch.dtype) -> Step:
        (axis,) = [a for a in range(len(before)) if before[a] != after[a]]
        move = move_of(before[axis], after[axis])
        assert move is not None
        held = [self.local_bytes(shape, dtype, c) for c in (before, after)]
        size = wire_bytes(before[axis], after[axis], held[0], held[1], self.grid.sizes[axis])
        if isinstance(t := after[axis], Shard) and move.forward == "all_to_all":
            local = largest_shape(shape, before, self.grid)
            size = exchange_bytes(local, before[axis], t, self.grid.sizes[axis]) * dtype.itemsize
        return Step(axis, before[axis], after[axis], move.forward, move.backward, size)


Bytes = TypeVar("Bytes", int, np.ndarray)
"""Of one buffer, or of many."""


def wire_bytes(
    before: AxisType, after: AxisType, before_bytes: Bytes, after_bytes: Bytes, ranks: int
) -> Bytes:
    """Return the full size of a move's buffer: the largest chunk for every rank."""
    if isinstance(before, Shard) and isinstance(after, Shard):
        if isinstance(before_bytes, int):
            return max(before_bytes, after_bytes)
        larger: np.ndarray = np.maximum(before_bytes, after_bytes)
        return larger
    if isinstance(before, Shard):
        return before_bytes * ranks
    return after_bytes * ranks if isinstance(after, Shard) else before_bytes


def exchange_bytes(local: Shape, before: AxisType, after: Shard, ranks: int) -> int:
    """Return the elements of an all-to-all's buffer: the new dim filled to a multiple of ranks."""
    filled = list(local)
    if isinstance(before, Shard) and before.dim != after.dim:
        filled[after.dim] = -(-local[after.dim] // ranks) * ranks
    return math.prod(filled)


def axis_types(layouts: Sequence[Layout], grad: bool, axes: int) -> AxisTypes:
    """Return the types that these layouts use on each axis, with the whole types added."""
    always: list[AxisType] = [I, R] if grad else [I]
    shards: dict[Shard, None] = {}
    partial = False
    for layout in layouts:
        for t in layout:
            if isinstance(t, Shard):
                shards[t] = None
            partial = partial or t is P
    types = (*always, *([P] if partial else []), *sorted(shards))
    used = [any(layout[a] is not I for layout in layouts) for a in range(axes)]
    return tuple(types if used[a] else (I,) for a in range(axes))
