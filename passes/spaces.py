"""Many layouts of one value at once, as numbers: which are legal, and which turn into which.

A layout is a row of `picks`: on each axis the number of a type. What depends only on the axes that
split one dim is asked once for each way in which they do, however many layouts have it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autotp.grid import Grid
from autotp.layouts import MOVES, AxisType, I, Layout, Shard, is_valid, kind, largest_shape

AxisTypes = tuple[tuple[AxisType, ...], ...]
"""The types that a value may have on each axis."""


@dataclass(frozen=True, slots=True)
class Change:
    """All single moves on one axis between types of two kinds, of which two types stand for all.

    starts, ends   the numbers of the layouts from which and to which each leads
    """

    axis: int
    before: AxisType
    after: AxisType
    starts: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """The legal layouts of values that may have the same types on each axis."""

    types: tuple[AxisType, ...]
    picks: np.ndarray
    layouts: tuple[Layout, ...]
    number: Mapping[Layout, int]
    changes: tuple[Change, ...]


def picks_of(types: Sequence[AxisType], options: AxisTypes) -> np.ndarray:
    """Return every combination of the axes' types, the last axis the fastest."""
    number = {t: k for k, t in enumerate(types)}
    every = np.meshgrid(*([number[t] for t in on] for on in options), indexing="ij")
    return np.stack(every, axis=-1).reshape(-1, len(options)).astype(np.intp)


def legal(
    shape: Sequence[int], types: Sequence[AxisType], picks: np.ndarray, grid: Grid
) -> np.ndarray:
    """Say of each layout whether a tensor of `shape` can have it, as `is_valid` does."""
    found = np.ones(len(picks), dtype=bool)
    for dim in _dims(types):
        found &= _by_dim(types, picks, dim, lambda c: is_valid(shape, c, grid)).astype(bool)
    return found


def elements(
    shape: Sequence[int], types: Sequence[AxisType], picks: np.ndarray, grid: Grid
) -> np.ndarray:
    """Return how many elements the largest rank holds in each legal layout."""
    split = _dims(types)
    whole = math.prod(int(n) for d, n in enumerate(shape) if d not in split)
    held = np.full(len(picks), whole, dtype=np.int64)
    for dim in (d for d in split if d < len(shape)):
        held *= _by_dim(types, picks, dim, lambda c: largest_shape(shape, c, grid)[dim])  # noqa: B023
    return held


def _dims(types: Sequence[AxisType]) -> list[int]:
    return sorted({t.dim for t in types if isinstance(t, Shard)})


def _by_dim(
    types: Sequence[AxisType], picks: np.ndarray, dim: int, fact: Callable[[Layout], int]
) -> np.ndarray:
    """Return of each layout a fact that depends on the axes that split `dim`."""
    own = [t if isinstance(t, Shard) and t.dim == dim else I for t in types]
    distinct = list(dict.fromkeys(own))
    place = {t: k for k, t in enumerate(distinct)}
    base = (len(distinct),) * picks.shape[1]
    codes = np.array([place[t] for t in own])[picks] @ _radix(len(distinct), len(base))
    facts = np.zeros(math.prod(base), dtype=np.int64)  # by code
    used = np.flatnonzero(np.bincount(codes, minlength=len(facts)))
    rows = np.stack(np.unravel_index(used, base), axis=-1).tolist()
    facts[used] = [fact(tuple(distinct[k] for k in row)) for row in rows]
    return np.asarray(facts[codes])


def _radix(base: int, axes: int) -> np.ndarray:
    return np.asarray(base ** np.arange(axes)[::-1])


def space(types: tuple[AxisType, ...], picks: np.ndarray) -> Space:
    """Return the space of these layouts."""
    layouts = tuple(tuple(types[k] for k in row) for row in picks.tolist())
    number = {layout: k for k, layout in enumerate(layouts)}
    changes = (_changes(types, picks, axis) for axis in range(picks.shape[1]))
    return Space(types, picks, layouts, number, tuple(itertools.chain(*changes)))


def _changes(types: Sequence[AxisType], picks: np.ndarray, axis: int) -> Iterator[Change]:
    """Yield the changes of one axis that `may_change` allows: no inner axis splits its dims."""
    dims = np.array([t.dim if isinstance(t, Shard) else -1 for t in types])
    inner = dims[picks[:, axis + 1 :]]
    free = np.array([(d < 0) | (inner != d).all(axis=1) for d in dims])  # [type, layout]
    radix = _radix(len(types), picks.shape[1])
    codes, at = picks @ radix, picks[:, axis]
    number = np.full(len(types) ** picks.shape[1], -1)  # of the layout that has a code
    number[codes] = np.arange(len(codes))
    for before, after in MOVES:
        ends = [np.array([kind(t) == letter for t in types]) for letter in (before, after)]
        starts = np.flatnonzero(ends[0][at] & free[at, np.arange(len(at))])
        found = [
            (starts[allowed], reached[allowed])
            for u in np.flatnonzero(ends[1]).tolist()
            for reached in [number[codes[starts] + (u - at[starts]) * radix[axis]]]
            for allowed in [(reached >= 0) & free[u][starts] & (at[starts] != u)]
        ]
        k, j = (np.concatenate([pair[n] for pair in found] or [starts[:0]]) for n in (0, 1))
        if len(k):
            yield Change(axis, types[at[k[0]]], types[at[j[0]]], k, j)
