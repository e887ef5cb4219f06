"""The prices of all grids of a number of ranks: a value, and how a person reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from autotp.grid import Grid
from autotp.notation import bytes_text, seconds_text
from autotp.plan import gap_of

TIE_DIGITS = 9
"""Digits in which the times of two grids must differ for one to be the faster."""

CLOSE = 0.005
"""Share of its time by which a grid of fewer axes may be slower and be chosen.

Prices are off by more (docs/BENCHMARKS.md), and what several axes take is more, and more varied:
of four ranks, one axis was 5% faster than two that were predicted 0.04% ahead.
"""


@dataclass(frozen=True, slots=True)
class GridPrice:
    """What the best plan on one grid takes.

    places   per axis: "inside" a node, "between" nodes or "across" both
    splits   per axis: what it splits, such as ("batch",) or ("inner dims", "parameters")
    memory_bytes   of the plan; of the smallest that was found, where none fits
    step_time_s    inf where no plan fits the memory of a rank
    """

    grid: Grid
    places: tuple[str, ...]
    splits: tuple[tuple[str, ...], ...] = ()
    step_time_s: float = math.inf
    lower_bound_s: float = math.inf
    comm_bytes: Fraction = Fraction(0)
    memory_bytes: int = 0
    method: str = ""

    @property
    def fits(self) -> bool:
        """Say whether a plan fits the memory of a rank."""
        return math.isfinite(self.step_time_s)

    @property
    def gap(self) -> float:
        """How far the plan may be from the best on this grid, as a share of its own time."""
        return gap_of(self.lower_bound_s, self.step_time_s) if self.fits else 0.0

    def rank_key(self) -> tuple[object, ...]:
        """Order grids: the fastest, then the least bytes sent and held, then the fewest axes.

        This is the one place where ties between grids are broken.
        """
        time_s = float(f"{self.step_time_s:.{TIE_DIGITS}g}")
        sizes = self.grid.sizes
        return time_s, self.comm_bytes, self.memory_bytes, len(sizes), sizes


@dataclass(frozen=True, slots=True)
class Grids:
    """All grids of a number of ranks on one cluster, the fastest first."""

    cluster: str
    train: bool
    prices: tuple[GridPrice, ...]

    @property
    def best(self) -> Grid:
        """The grid that is chosen: of those about as fast as the fastest, that of fewest axes."""
        limit_s = self.prices[0].step_time_s * (1 + CLOSE)
        close = [row.grid for row in self.prices if row.step_time_s <= limit_s]
        return min(close, key=lambda grid: len(grid.sizes))

    def __iter__(self) -> Iterator[GridPrice]:
        return iter(self.prices)

    def __len__(self) -> int:
        return len(self.prices)

    def __getitem__(self, place: int) -> GridPrice:
        return self.prices[place]

    def __str__(self) -> str:
        mode = "training step" if self.train else "forward pass"
        head = (
            f"grids of {self.best.world_size} ranks for one {mode} on {self.cluster},"
            " per rank, the fastest first"
        )
        if self.best != self.prices[0].grid:
            head += f"; chosen is {self.best}: fewer axes, and within {CLOSE:.1%}"
        titles = ("grid", "time", "sent", "memory", "found", "axes")
        rows = [titles, *(_cells(row) for row in self)]
        widths = [max(len(row[k]) for row in rows) for k in range(len(titles))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        return "\n".join([head, "", *("  " + line.rstrip() for line in lines)])


def _cells(row: GridPrice) -> tuple[str, ...]:
    if not row.fits:
        least = f"{bytes_text(row.memory_bytes)} at least"
        return str(row.grid), "does not fit", "", least, "", _axes_text(row)
    found = f"gap {row.gap:.2%}" if row.gap > 0 else "optimal"
    sent, held = bytes_text(float(row.comm_bytes)), bytes_text(row.memory_bytes)
    return str(row.grid), seconds_text(row.step_time_s), sent, held, found, _axes_text(row)


def _axes_text(row: GridPrice) -> str:
    """Write what each axis splits, and where it runs: `row between: batch; col inside: ...`."""
    words = row.splits or ((),) * len(row.places)
    return "; ".join(
        f"{name} {place}" + (f": {', '.join(split) or 'nothing'}" if row.fits else "")
        for name, place, split in zip(row.grid.names, row.places, words, strict=True)
    )
