"""The grid: named axes of ranks, numbered row-major. Knows no process group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotp.errors import GridError

Coords = tuple[int, ...]
"""A rank's index on every axis of its grid."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Name the axes of a mesh of ranks and their sizes.

    >>> grid = Grid(("row", "col"), (2, 3))
    >>> grid.world_size, grid.coords(4), grid.rank((1, 1))
    (6, (1, 1), 4)
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes):
            raise GridError(
                f"{len(self.names)} names for {len(self.sizes)} axes of a grid",
                at=[("names", str(self.names)), ("sizes", str(self.sizes))],
                remedy="name each axis once, such as grid=dict(row=2, col=2)",
            )
        bad = [
            (f"axis {n!r}", w)
            for n, s in zip(self.names, self.sizes, strict=True)
            if (w := _wrong(s))
        ]
        bad += [
            (f"axis {n!r}", "is no name that Python could give an attribute")
            for n in self.names
            if not (isinstance(n, str) and n.isidentifier())
        ]
        twice = [n for k, n in enumerate(self.names) if n in self.names[:k]]
        bad += [(f"axis {n!r}", "is named twice") for n in twice]
        if bad or not self.sizes:
            raise GridError(
                f"grid {self.sizes} is not a grid of ranks",
                at=bad or [("grid", "has no axis")],
                remedy="give one integer of at least 1 per axis, such as grid=(2, 2)",
            )

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return math.prod(self.sizes)

    def coords(self, rank: int) -> Coords:
        """Return the index of `rank` on every axis; the last axis is the fastest."""
        out = []
        for size in reversed(self.sizes):
            rank, index = divmod(rank, size)
            out.append(index)
        return tuple(reversed(out))

    def rank(self, coords: Coords) -> int:
        """Return the rank that stands at `coords`."""
        number = 0
        for size, index in zip(self.sizes, coords, strict=True):
            number = number * size + index
        return number

    def all_coords(self) -> list[Coords]:
        """Return the coordinates of every rank, in rank order."""
        return [self.coords(r) for r in range(self.world_size)]

    def axis(self, name: str) -> int:
        """Return the position of the axis called `name`."""
        return self.names.index(name)

    def __str__(self) -> str:
        return "x".join(str(s) for s in self.sizes)


DEFAULT_NAMES = {1: ("col",), 2: ("row", "col")}


def _wrong(size: object) -> str:
    """Say what is wrong with the size of an axis, if anything is."""
    if isinstance(size, bool) or not isinstance(size, int):
        return f"{size!r} is a {type(size).__name__}, not an integer"
    return "" if size >= 1 else f"{size} ranks: at least 1 is needed"


def as_grid(grid: Grid | int | tuple[int, ...] | Mapping[str, int] | Any) -> Grid:
    """Return `grid` as a Grid: from a tuple, a dict of named axes, or a DeviceMesh.

    Raises GridError, with every axis that is wrong.
    """
    if isinstance(grid, Grid):
        return grid
    if isinstance(grid, Mapping):
        return Grid(tuple(grid), tuple(grid.values()))
    names = getattr(grid, "mesh_dim_names", ())
    given = getattr(grid, "shape", grid)  # a torch DeviceMesh has a shape
    sizes = tuple(given) if isinstance(given, tuple | list) else (given,)
    return Grid(tuple(names or default_names(len(sizes))), sizes)


def default_names(axes: int) -> tuple[str, ...]:
    """Name `axes` axes: two are row and col, other counts are numbered."""
    return DEFAULT_NAMES.get(axes) or tuple(f"axis{i}" for i in range(axes))


AUTO = "auto"
"""The grid of a call that leaves it to the planner: of all ranks of the process group."""


def is_open(grid: object) -> bool:
    """Say whether a grid is a number of ranks, or "auto": then the planner chooses its axes.

    >>> is_open(4), is_open("auto"), is_open((4,)), is_open({"dp": 4})
    (True, True, False, False)
    """
    if isinstance(grid, str):
        return grid == AUTO
    return isinstance(grid, int) and not isinstance(grid, bool)
