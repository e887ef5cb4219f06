"""From timings of collectives to a link: alpha and beta of each kind and group size, all at once.

A kind over a group of n ranks takes a + b N seconds for a buffer of N bytes. All a and b of a link
are found together, as one linear program: least absolute relative errors, so that an outlier pulls
no more than any other timing, under what holds of every real link and noise may hide:

    a, b >= 0                                    time grows with bytes
    a, b of n ranks <= those of more ranks       and with ranks
    all_reduce <= reduce_scatter + all_gather    no chain of moves is cheaper than the one move
    reduce_scatter, all_gather <= all_reduce     that it replaces: TRIANGLES
    all_to_all of N/n <= all_gather, reduce_scatter of N
    an algorithm made of others <= these         so that the same holds of the fastest of each kind

The inequalities are linear in a and b and hold for each of them alone, so they hold at every N.
Where timings contradict them, the fit moves both sides as little as it can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from autotp.cost_model.cluster import Link, Rate
from autotp.cost_model.collectives import ROUNDS
from autotp.cost_model.levels import members_of

FASTEST_BYTES_PER_S = 1e14
"""Far above any link: the bandwidth where timings do not grow with bytes at all."""

TRIANGLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("all_reduce", ("reduce_scatter", "all_gather")),
    ("reduce_scatter", ("all_reduce",)),
    ("all_gather", ("all_reduce",)),
    ("all_to_all", ("all_gather",)),
    ("all_to_all", ("reduce_scatter",)),
    ("all_to_all", ("all_gather by exchange",)),
    ("all_to_all", ("all_gather by ring",)),
    ("all_reduce", ("reduce_scatter by all_reduce",)),
    ("all_reduce", ("reduce_scatter by exchange", "all_gather")),
    ("all_reduce", ("reduce_scatter by exchange", "all_gather by exchange")),
    ("all_reduce", ("reduce_scatter by exchange", "all_gather by ring")),
    ("all_to_all", ("reduce_scatter by all_reduce",)),
    ("all_to_all", ("reduce_scatter by exchange",)),
    ("all_reduce by scatter_gather", ("reduce_scatter", "all_gather")),
    ("all_reduce by scatter_exchange", ("reduce_scatter", "all_gather by exchange")),
    ("all_reduce by scatter_ring", ("reduce_scatter", "all_gather by ring")),
    ("reduce_scatter", ("all_reduce by scatter_gather",)),
    ("reduce_scatter", ("all_reduce by scatter_exchange",)),
    ("reduce_scatter", ("all_reduce by scatter_ring",)),
    ("all_gather", ("all_reduce by scatter_gather",)),
    ("all_gather by exchange", ("all_reduce by scatter_exchange",)),
    ("all_gather by ring", ("all_reduce by scatter_ring",)),
)
"""A way, and the chain that does the same work: slices and zeros around it cost nothing here.

Over one axis these imply every triangle of `autotp.layouts.MOVES`, forward and backward together.
"""

TWO_LEVELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reduce_scatter by {}", ("all_reduce by {}",)),
    ("all_gather by {}", ("all_reduce by {}",)),
    ("all_reduce by {}", ("reduce_scatter by {}", "all_gather by {}")),
    ("all_reduce by {}", ("reduce_scatter by {}", "all_gather")),
    ("all_reduce by {}", ("reduce_scatter by {}", "all_gather by exchange")),
    ("all_reduce by {}", ("reduce_scatter by {}", "all_gather by ring")),
    ("all_reduce by {}", ("reduce_scatter", "all_gather by {}")),
    ("all_reduce by {}", ("reduce_scatter by exchange", "all_gather by {}")),
)
"""The same for each algorithm of two levels, such as `nodes_of_2`.

Not of an exchange: it sends a message to every rank, which two gathers and slices may really beat.
"""


def way_of(kind: str, by: str = "") -> str:
    """Write a kind and its algorithm as one way: `all_gather by ring`, `all_gather`."""
    return f"{kind} by {by}" if by else kind


@dataclass(frozen=True, slots=True)
class Timing:
    """The typical seconds of one collective over whole buffers of `size_bytes`, on two clocks.

    `members` of its `ranks` are in each node. `by` is the algorithm, none for the plain one.
    """

    kind: str
    ranks: int
    members: int
    size_bytes: int
    seconds: float
    cpu_s: float
    by: str = ""

    def __post_init__(self) -> None:
        assert self.ranks >= 2 and self.seconds > 0 and self.cpu_s >= 0, self


Points = Sequence[tuple[float, float]]
"""Bytes and seconds."""

Line = tuple[float, float]
"""a and b of one kind and group size."""

Term = tuple[int, float]
"""The number of a variable and its factor."""


def fit_link(points: dict[tuple[str, int], Points]) -> Link:
    """Return the link that fits the points of each way and group size best."""
    lines = fit_lines(points)
    rates = tuple(_rate(way, n, *line) for (way, n), line in sorted(lines.items()))
    usual = next((r for r in rates if r.kind == "all_gather"), rates[0])
    return Link(usual.latency_s, usual.bandwidth_bytes_per_s, rates=rates)


def _rate(way: str, ranks: int, a: float, b: float) -> Rate:
    """Return seconds per step and bytes per second: `autotp.cost_model.collectives` reads them.

    Every algorithm is given the steps and the bytes of its kind's plain one.
    """
    kind, _, by = way.partition(" by ")
    steps, share = (1, 1.0) if kind == "permute" else (ranks - 1, 1 / ranks)
    steps *= ROUNDS.get(kind, 1)
    return Rate(kind, a / steps, steps * share / b, ranks, by)


def fit_lines(points: dict[tuple[str, int], Points]) -> dict[tuple[str, int], Line]:
    """Return a and b of every kind and group size: the linear program of this module."""
    cells = sorted(points)
    number = {cell: 2 * k for k, cell in enumerate(cells)}
    errors = [(number[c], x, y) for c in cells for x, y in points[c]]
    scale = max((x for _, x, _ in errors), default=1.0) or 1.0  # b in seconds per `scale` bytes
    count = 2 * len(cells)
    rows: list[list[Term]] = []
    limits: list[float] = []
    for k, (at, x, y) in enumerate(errors):
        over = [(at, 1 / y), (at + 1, x / scale / y)]
        rows += [[*over, (count + k, -1.0)], [(i, -f) for i, f in over] + [(count + k, -1.0)]]
        limits += [1.0, -1.0]
    for terms in _orders(number):
        rows.append(terms)
        limits.append(0.0)
    found = _least([0.0] * count + [1.0] * len(errors), rows, limits)
    floor = 1 / FASTEST_BYTES_PER_S
    return {c: (max(0.0, found[k]), max(floor, found[k + 1] / scale)) for c, k in number.items()}


def _orders(number: dict[tuple[str, int], int]) -> Iterator[list[Term]]:
    """Yield sums of a (and of b) that may not be above zero: monotone in ranks, and triangles."""
    for kind, n in number:
        more = [m for k, m in number if k == kind and m > n]
        if more:
            yield from _below((kind, n), [(kind, min(more))], number, share=1.0)
    for kind, chain in triangles({way for way, _ in number}):
        for n in [n for k, n in number if k == kind]:
            parts = [(k, n) for k in chain]
            if all(p in number for p in parts):
                share = 1.0 / n if kind == "all_to_all" else 1.0
                yield from _below((kind, n), parts, number, share)


def triangles(ways: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Return TRIANGLES, and those of the algorithms of two levels that stand among `ways`."""
    levels = sorted({by for way in ways if members_of(by := way.partition(" by ")[2])})
    each = [
        (way.format(by), tuple(part.format(by) for part in chain))
        for by in levels
        for way, chain in TWO_LEVELS
    ]
    return [*TRIANGLES, *each]


def _below(
    cell: tuple[str, int],
    parts: Iterable[tuple[str, int]],
    number: dict[tuple[str, int], int],
    share: float,
) -> Iterator[list[Term]]:
    """Yield a <= the sum of a of the parts, and the same of b, of which `share` is sent."""
    parts = list(parts)
    for slope, factor in ((0, 1.0), (1, share)):
        yield [(number[cell] + slope, factor), *((number[p] + slope, -1.0) for p in parts)]


def _least(costs: list[float], rows: list[list[Term]], limits: list[float]) -> list[float]:
    """Return x >= 0 with least costs of which no row's sum is above its limit."""
    matrix = np.zeros((len(rows), len(costs)))
    for k, terms in enumerate(rows):
        for column, factor in terms:
            matrix[k, column] += factor
    found = linprog(costs, A_ub=matrix, b_ub=limits, method="highs")
    assert found.status == 0, found.message  # all lines at zero fit within errors of one
    return [float(x) for x in found.x]
