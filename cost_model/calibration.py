"""From what was measured on a machine to a `Cluster`: pure functions of timings.

typical     one number from repeats on a noisy machine
Measured    the timings of a machine: collectives, compute, the optimizer, what overlaps
fit         Measured -> Cluster, on the wall clock or in CPU-seconds

Measuring is not done here: `autotp.measure` runs on a process group.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from autotp.cost_model.cluster import Cluster, Link
from autotp.cost_model.link_fit import FASTEST_BYTES_PER_S, Timing, fit_link, way_of

Clock = Literal["wall", "cpu"]

MAD_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, of normal noise."""

OUTLIER_SIGMAS = 3.0


@dataclass(frozen=True, slots=True)
class ProductTiming:
    """The seconds of the products of a linear of `shape` (rows, made, contracted), on two clocks.

    Forward, the gradient of the input, the gradient of the weight.
    """

    dtype: str
    shape: tuple[int, int, int]
    seconds: tuple[float, float, float]
    cpu_s: tuple[float, float, float]

    @property
    def narrowest(self) -> int:
        """The smallest of the three dims."""
        return min(self.shape)


@dataclass(frozen=True, slots=True)
class StreamTiming:
    """The seconds in which one op reads and writes `size_bytes` in all: "copy", "add", "gelu"."""

    name: str
    size_bytes: int
    seconds: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class AttentionTiming:
    """The seconds of attention, forward and backward, whose products take `flops` in all."""

    dtype: str
    flops: int
    seconds: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class UpdateTiming:
    """The seconds in which the optimizer updates so many parameters of `size_bytes` each."""

    parameters: int
    size_bytes: int
    seconds: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Seconds:
    """One duration on two clocks."""

    seconds: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Overlap:
    """A collective and a product, each alone, and both at once."""

    collective: Seconds
    product: Seconds
    both: Seconds

    @property
    def share(self) -> float:
        """The share of the shorter one that is hidden."""
        alone = self.collective.seconds, self.product.seconds
        return min(1.0, max(0.0, (sum(alone) - self.both.seconds) / min(alone)))


@dataclass(frozen=True, slots=True)
class Late:
    """A small collective behind another one, and behind products.

    alone     of collectives in a row, one
    after     of products and then the collective, what the collective takes
    product   of products in a row, as many
    turn      of products and then the collective, all
    """

    alone: Seconds
    after: Seconds
    product: Seconds
    turn: Seconds

    @property
    def more(self) -> Seconds:
        """What a collective takes more behind products than behind another one.

        Ranks come to it from compute one by one: those that wait, wait, and each that comes wakes
        the others.
        """
        waited_s = self.turn.seconds - self.product.seconds - self.alone.seconds
        woken_s = self.after.cpu_s - self.alone.cpu_s
        return Seconds(max(0.0, waited_s), max(0.0, woken_s))


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on the ranks of one process group.

    `cores` are those of a node for each of its ranks, 0 where ranks have devices of their own.
    """

    backend: str
    world_size: int
    ranks_per_node: int
    collectives: tuple[Timing, ...]
    products: tuple[ProductTiming, ...]
    streams: tuple[StreamTiming, ...]
    op_overhead: Seconds
    overlap: Overlap | None
    memory_bytes: float
    updates: tuple[UpdateTiming, ...] = ()
    attention: tuple[AttentionTiming, ...] = ()
    cores: float = 0.0
    late: Late | None = None


def typical(repeats: Sequence[float]) -> float:
    """Return the median of repeats, without those that are far from most.

    Far is three standard deviations, estimated from the median deviation, which half of the
    repeats may not move.

    >>> typical([1.0, 1.1, 0.9, 1.0, 40.0])
    1.0
    """
    middle = statistics.median(repeats)
    spread = MAD_TO_SIGMA * statistics.median(abs(x - middle) for x in repeats)
    return statistics.median(x for x in repeats if abs(x - middle) <= OUTLIER_SIGMAS * spread)


def fit(measured: Measured, name: str, clock: Clock = "wall") -> Cluster:
    """Return the cluster that these timings describe.

    Every rate is what a rank reaches while all others do the same. CPU-seconds add up: on that
    clock nothing is hidden.
    """
    links, measured = _links(measured, clock), _at_once(measured)
    ladders = _ladders(measured.products, clock)
    each_s, update_rate = _updates(measured.updates, clock)
    streams = _streams([t for t in measured.streams if t.name != "gelu"], clock)
    late_s = _of(measured.late.more, clock) if measured.late else 0.0
    links = {place: replace(link, call_s=late_s) for place, link in links.items()}
    inside = links.get("inside") or links["between"]
    return Cluster(
        name=name,
        backend=measured.backend,
        ranks_per_node=measured.ranks_per_node,
        intra=inside,
        inter=links.get("between", inside),
        flops_per_s=tuple((dtype, rates[-1][1]) for dtype, rates in ladders),
        memory_bandwidth_bytes_per_s=streams[-1][1],
        memory_bytes=measured.memory_bytes,
        op_overhead_s=_of(measured.op_overhead, clock),
        crossings=tuple((m, link) for m, link in links.items() if isinstance(m, int)),
        narrow_flops_per_s=tuple(pair for pair in ladders if len(pair[1]) > 1),
        stream_bytes_per_s=streams if len(streams) > 1 else (),
        function_bytes_per_s=_rate([t for t in measured.streams if t.name == "gelu"], clock),
        attention_flops_per_s=tuple((t.dtype, t.flops / _of(t, clock)) for t in measured.attention),
        overlap=measured.overlap.share if measured.overlap and clock == "wall" else 0.0,
        update_s=each_s,
        update_bytes_per_s=update_rate,
    )


def _at_once(measured: Measured) -> Measured:
    """Return the timings of compute as they are while all ranks of a node compute.

    Where ranks share cores, a sample shorter than the scheduler's slice runs while others wait: its
    wall clock does not see them. But no rank gets more than its share of the cores, so that a
    collective that keeps them busy hides nothing.
    """
    if not measured.cores:
        return measured

    def wall(seconds: float, cpu_s: float) -> float:
        return max(seconds, cpu_s / measured.cores)

    def slowed(timing: Any) -> Any:
        if isinstance(timing, ProductTiming):
            first, second, third = map(wall, timing.seconds, timing.cpu_s)
            return replace(timing, seconds=(first, second, third))
        return replace(timing, seconds=wall(timing.seconds, timing.cpu_s))

    together, late = measured.overlap, measured.late
    return replace(
        measured,
        products=tuple(map(slowed, measured.products)),
        streams=tuple(map(slowed, measured.streams)),
        updates=tuple(map(slowed, measured.updates)),
        attention=tuple(map(slowed, measured.attention)),
        overlap=together
        and Overlap(slowed(together.collective), slowed(together.product), slowed(together.both)),
        late=late and replace(late, product=slowed(late.product)),
        op_overhead=slowed(measured.op_overhead),
    )


Timed = Timing | StreamTiming | AttentionTiming | UpdateTiming | Seconds


def _of(timing: Timed, clock: Clock) -> float:
    return timing.seconds if clock == "wall" else timing.cpu_s


def _links(measured: Measured, clock: Clock) -> dict[str | int, Link]:
    """Return the link inside a node, that between nodes, and by members those of both."""
    points: dict[str | int, dict[tuple[str, int], list[tuple[float, float]]]] = {}
    for t in measured.collectives:
        cells = points.setdefault(_place(t), {})
        cell = (way_of(t.kind, t.by), t.ranks)
        cells.setdefault(cell, []).append((t.size_bytes, _of(t, clock)))
    return {place: fit_link(dict(cells)) for place, cells in points.items()}


def _place(t: Timing) -> str | int:
    if t.members == t.ranks:
        return "inside"
    return "between" if t.members == 1 else t.members


Ladder = tuple[tuple[int, float], ...]
"""Flops per second by the narrowest dim, both rising; or bytes per second by bytes."""


def _ladders(products: Sequence[ProductTiming], clock: Clock) -> list[tuple[str, Ladder]]:
    dtypes = dict.fromkeys(p.dtype for p in products)
    return [(d, _ladder([p for p in products if p.dtype == d], clock)) for d in dtypes]


def _ladder(products: Sequence[ProductTiming], clock: Clock) -> Ladder:
    """Return the rate at each narrowest dim: all flops over all seconds of its shapes.

    Where it would fall as dims grow, neighbours are pooled: that is the nearest rising ladder.

    Source: Ayer et al. 1955, "An empirical distribution function for sampling with incomplete
    information": pool adjacent violators.
    """
    pools: list[tuple[list[int], float, float]] = []
    for width in sorted({p.narrowest for p in products}):
        mine = [p for p in products if p.narrowest == width]
        flops = sum(2.0 * len(p.seconds) * math.prod(p.shape) for p in mine)
        pool = ([width], flops, sum(sum(_both(p, clock)) for p in mine))
        while pools and pools[-1][1] / pools[-1][2] > pool[1] / pool[2]:
            last = pools.pop()
            pool = (last[0] + pool[0], last[1] + pool[1], last[2] + pool[2])
        pools.append(pool)
    return tuple((w, flops / seconds) for widths, flops, seconds in pools for w in widths)


def _both(p: ProductTiming, clock: Clock) -> tuple[float, float, float]:
    return p.seconds if clock == "wall" else p.cpu_s


def _streams(streams: Sequence[StreamTiming], clock: Clock) -> Ladder:
    """Return bytes per second by the bytes that an op reads and writes, the rates falling.

    Ops of every kind over buffers of one size are one point: caches hold what is small.
    """
    by_name: dict[str, list[StreamTiming]] = {}
    for t in sorted(streams, key=lambda t: t.size_bytes):
        by_name.setdefault(t.name, []).append(t)
    out: list[tuple[int, float]] = []
    for alike in zip(*by_name.values(), strict=True):
        rate = _rate(alike, clock)
        size_bytes = sum(t.size_bytes for t in alike) // len(alike)
        out.append((size_bytes, min(rate, out[-1][1]) if out else rate))
    return tuple(out)


def _rate(streams: Sequence[StreamTiming], clock: Clock) -> float:
    return sum(s.size_bytes for s in streams) / sum(_of(s, clock) for s in streams)


def _updates(updates: Sequence[UpdateTiming], clock: Clock) -> tuple[float, float]:
    """Return the seconds per parameter and the bytes per second: the line through two sizes.

    Zeros where no updates were timed.
    """
    if not updates:
        return 0.0, 0.0
    small, large = sorted(updates, key=lambda t: t.size_bytes)
    each = [_of(t, clock) / t.parameters for t in (small, large)]
    slope = max(0.0, each[1] - each[0]) / (large.size_bytes - small.size_bytes)
    return max(0.0, each[0] - slope * small.size_bytes), 1 / max(slope, 1 / FASTEST_BYTES_PER_S)
