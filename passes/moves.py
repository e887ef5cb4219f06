"""What it costs to bring a value from one layout to another, and by which moves.

A value's layouts form a graph whose edges change the type of one axis (`layouts.MOVES`), each
priced forward and backward; `Moves.table` holds the cheapest way between any two of them, and
`path` spells it out. Prices are those of one rank, the largest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch

from autotp.cost_model.cluster import Cluster
from autotp.cost_model.collectives import FREE, collective_s, sent_bytes
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
    is_valid,
    largest_shape,
    may_change,
    move_of,
)

AxisTypes = tuple[tuple[AxisType, ...], ...]
"""The types that a value may have on each axis."""


@dataclass(frozen=True, slots=True)
class Step:
    """One move of one axis: the types before and after, and the collectives' full size in bytes."""

    axis: int
    before: AxisType
    after: AxisType
    forward: str
    backward: str
    size_bytes: int

    def sent_by(self, kind: str, ranks: int) -> Fraction:
        """Return the bytes that a rank sends for one of the two collectives."""
        return sent_bytes(kind, self.size_bytes, ranks)


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """The layouts of one operand or result under each choice: long, and so compared by identity."""

    layouts: tuple[Layout, ...]

    def __len__(self) -> int:
        return len(self.layouts)

    def __iter__(self) -> Iterator[Layout]:
        return iter(self.layouts)

    def __getitem__(self, choice: int) -> Layout:
        return self.layouts[choice]


@dataclass(frozen=True, slots=True, eq=False)
class MoveTable:
    """The cheapest ways between all layouts of one value.

    seconds   [from, to], inf where there is no way
    via       [from, to], the layout after the first step
    """

    layouts: tuple[Layout, ...]
    number: dict[Layout, int]
    seconds: np.ndarray
    via: np.ndarray


@dataclass(slots=True)
class Moves:
    """Price the moves of values on one grid of one cluster; tables are computed once per shape."""

    grid: Grid
    cluster: Cluster
    _tables: dict[tuple[object, ...], MoveTable] = field(default_factory=dict)
    _columns: dict[tuple[Layout, ...], Column] = field(default_factory=dict)
    _prices: dict[tuple[str, int, int], float] = field(default_factory=dict)
    _between: dict[tuple[MoveTable, Column, Column], np.ndarray] = field(default_factory=dict)

    def column(self, layouts: Iterable[Layout]) -> Column:
        """Return the one column of these layouts."""
        layouts = tuple(layouts)
        return self._columns.setdefault(layouts, Column(layouts))

    def between(self, table: MoveTable, before: Column, after: Column) -> np.ndarray:
        """Return the seconds [from, to] of the cheapest ways between the layouts of two columns."""
        key = (table, before, after)
        if key not in self._between:
            rows, columns = ([table.number[c] for c in side] for side in (before, after))
            self._between[key] = table.seconds[np.ix_(rows, columns)]
        return self._between[key]

    def table(
        self,
        shape: Shape,
        dtype: torch.dtype,
        grad: bool,
        types: AxisTypes,
        again: bool = False,
    ) -> MoveTable:
        """Return the table of a value whose axes may have these types.

        `again` says that what is sent forward is sent once more when backward recomputes it.
        """
        key = (shape, dtype, grad, types, again)
        if key not in self._tables:
            self._tables[key] = self._compute(shape, dtype, grad, types, again)
        return self._tables[key]

    def _compute(
        self, shape: Shape, dtype: torch.dtype, grad: bool, types: AxisTypes, again: bool
    ) -> MoveTable:
        layouts = tuple(c for c in itertools.product(*types) if is_valid(shape, c, self.grid))
        number = {layout: k for k, layout in enumerate(layouts)}
        seconds = np.full((len(layouts), len(layouts)), np.inf)
        np.fill_diagonal(seconds, 0.0)
        via = np.tile(np.arange(len(layouts)), (len(layouts), 1))
        sizes = [self.local_bytes(shape, dtype, c) for c in layouts]
        for k, layout in enumerate(layouts):
            for axis, after in _changes(layout, types):
                j = number.get((*layout[:axis], after, *layout[axis + 1 :]))
                if j is not None:
                    edge = self._edge_s(layout, axis, after, (sizes[k], sizes[j]), grad, again)
                    seconds[k, j] = edge
        _close(seconds, via)
        return MoveTable(layouts, number, seconds, via)

    def local_bytes(self, shape: Shape, dtype: torch.dtype, layout: Layout) -> int:
        """Return what the largest rank holds of a tensor."""
        return math.prod(largest_shape(shape, layout, self.grid)) * dtype.itemsize

    def _edge_s(
        self,
        layout: Layout,
        axis: int,
        after: AxisType,
        sizes: tuple[int, int],
        grad: bool,
        again: bool,
    ) -> float:
        move = move_of(layout[axis], after)
        assert move is not None
        kinds = [move.forward] * (1 + again) + ([move.backward] if grad else [])
        size = wire_bytes(layout[axis], after, *sizes, self.grid.sizes[axis])
        return sum(self.kind_s(kind, size, axis) for kind in kinds)

    def kind_s(self, kind: str, size_bytes: int, axis: int) -> float:
        """Return the seconds of one collective, or of a local copy, over one axis."""
        if kind == "none":
            return 0.0
        key = (kind, size_bytes, axis)
        if key not in self._prices:
            self._prices[key] = self._price(kind, size_bytes, axis)
        return self._prices[key]

    def _price(self, kind: str, size_bytes: int, axis: int) -> float:
        if kind in FREE:
            return float(op_s(0, 2 * size_bytes, torch.float32, self.cluster))
        link = self.cluster.link(self.grid.sizes, axis)
        ranks = self.grid.sizes[axis]
        return float(collective_s(kind, size_bytes, ranks, link, self.cluster.backend))

    def path(
        self, table: MoveTable, before: Layout, after: Layout, shape: Shape, dtype: torch.dtype
    ) -> list[Step]:
        """Return the steps of the cheapest way between two layouts."""
        steps = []
        at, end = table.number[before], table.number[after]
        while at != end:
            following = int(table.via[at, end])
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


TIE = 1e-12
"""Share by which a longer way must be cheaper to be taken."""


def _close(seconds: np.ndarray, via: np.ndarray) -> None:
    """Replace the seconds of single moves by those of the cheapest ways, in place.

    Source: Floyd 1962, "Algorithm 97: Shortest path".
    """
    through, limit = np.empty_like(seconds), np.empty_like(seconds)
    better = np.empty(seconds.shape, dtype=bool)
    for mid in range(len(seconds)):
        np.add(seconds[:, mid : mid + 1], seconds[mid : mid + 1, :], out=through)
        np.multiply(seconds, 1 - TIE, out=limit)
        np.less(through, limit, out=better)
        np.copyto(seconds, through, where=better)
        np.copyto(via, via[:, mid : mid + 1].copy(), where=better)


def wire_bytes(
    before: AxisType, after: AxisType, before_bytes: int, after_bytes: int, ranks: int
) -> int:
    """Return the full size of a move's buffer: the largest chunk for every rank."""
    if isinstance(before, Shard) and isinstance(after, Shard):
        return max(before_bytes, after_bytes)
    if isinstance(before, Shard):
        return before_bytes * ranks
    return after_bytes * ranks if isinstance(after, Shard) else before_bytes


def exchange_bytes(local: Shape, before: AxisType, after: Shard, ranks: int) -> int:
    """Return the elements of an all-to-all's buffer: the new dim filled to a multiple of ranks."""
    filled = list(local)
    if isinstance(before, Shard) and before.dim != after.dim:
        filled[after.dim] = -(-local[after.dim] // ranks) * ranks
    return math.prod(filled)


def _changes(layout: Layout, types: AxisTypes) -> list[tuple[int, AxisType]]:
    return [
        (axis, after)
        for axis, options in enumerate(types)
        for after in options
        if move_of(layout[axis], after) and may_change(layout, axis, after)
    ]


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
