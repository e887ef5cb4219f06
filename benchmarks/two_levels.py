"""One axis of four ranks over two hosts: collectives of one level against those of two.

In the two namespaces of `two_hosts.py`, the axis crosses the wire with two ranks on each side.
Every kind over buffers of several sizes, by the backend's plain algorithm and by `nodes_of_2`, and
steps of two schemes planned with the two levels and without: seconds as fitted to the measured
links and as measured again after, and what one host has put on the wire. Medians of interleaved
rounds. One JSON.

It takes root on Linux, for the namespaces; elsewhere it says so and stops.

    OMP_NUM_THREADS=1 python benchmarks/two_levels.py [--shape NAME] [--rounds 5] [--rate 300mbit]
        [--out two_levels.json]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from gauges import spend
from links import WIRE, sent_bytes
from shapes import SHAPES
from two_hosts import PER_HOST, RANKS, join, measured, over_two_hosts, write
from variants import training_step

import autotp
from autotp.cost_model.cluster import Cluster
from autotp.cost_model.collectives import ROUNDS, level_bytes
from autotp.cost_model.levels import STAGES, members_of, nodes_of
from autotp.dist_axis import dist_axes
from autotp.ranks import make_mesh
from autotp.schemes import scheme_pins

GRID = {"across": RANKS}
SIZES = (2**12, 2**17, 2**20, 2**22)
SCHEMES = ("megatron", "fsdp")
TWO_LEVELS = nodes_of(PER_HOST)
Run = Callable[[], Any]


@dataclass(slots=True)
class Row:
    """A collective or a step by one algorithm: what is predicted, and what each round took.

    `planned_wire_bytes` are what two levels send from one host to the other, 0 for one level.
    """

    name: str
    by: str
    predicted_s: float
    planned_wire_bytes: float
    wall_s: list[float] = field(default_factory=list)
    wire_bytes: list[float] = field(default_factory=list)


def work(other_host: int, shape: str, rounds: int, seconds: float) -> list[Row]:
    """Run every row in turn, round after round, the first to warm up; every rank calls it."""
    join(other_host)
    cluster = measured(seconds)
    runs = [*_collectives(cluster), *_steps(shape, cluster)]
    for number in range(rounds + 1):
        for row, run in runs:
            before = sent_bytes(WIRE[0])
            wall_s = spend(run).wall_s
            if number:
                row.wall_s.append(wall_s)
                row.wire_bytes.append(sent_bytes(WIRE[0]) - before)
    return [row for row, _ in runs]


def _collectives(cluster: Cluster) -> Iterator[tuple[Row, Run]]:
    grid = autotp.Grid(tuple(GRID), tuple(GRID.values()))
    (axis,) = dist_axes(make_mesh(grid, "cpu")).values()
    link = cluster.link(grid.sizes, 0)
    for kind in STAGES:
        for size in SIZES:
            wire = torch.ones(RANKS, size // 4 // RANKS)
            given = wire[0] if kind == "all_gather" else wire
            for by in ("", TWO_LEVELS):
                rate = link.rate(kind, RANKS, by)
                step_s = rate.latency_s + size / RANKS / rate.bandwidth_bytes_per_s
                between = float(level_bytes(kind, size, RANKS, PER_HOST)[1]) if by else 0.0
                predicted_s = ROUNDS[kind] * (RANKS - 1) * step_s
                row = Row(f"{kind} of {size} bytes", by, predicted_s, PER_HOST * between)
                yield row, partial(getattr(axis, kind), given, by=by)


def _steps(shape: str, cluster: Cluster) -> Iterator[tuple[Row, Run]]:
    for scheme in SCHEMES:
        for by, chosen in (("", one_level(cluster)), (TWO_LEVELS, cluster)):
            model, inputs = SHAPES[shape].build()
            pins: Any = scheme_pins(scheme, model, GRID, inputs)  # type: ignore[arg-type]
            made: Any = autotp.parallelize(model, GRID, inputs, cluster=chosen, pins=pins)
            between = PER_HOST * float(sum(made.plan.sent_between().values()))
            row = Row(f"step of {scheme}", by, made.plan.step_time_s, between)
            yield row, training_step(made, inputs)


def one_level(cluster: Cluster) -> Cluster:
    """Return a cluster without what was measured of two levels."""
    crossings = tuple(
        (m, replace(link, rates=tuple(r for r in link.rates if not members_of(r.by))))
        for m, link in cluster.crossings
    )
    return replace(cluster, crossings=crossings)


def print_table(rows: list[Row]) -> None:
    head = ("predicted ms", "measured ms", "planned MB on the wire", "MB on the wire")
    print(f"{'':28}{'by':>12}" + "".join(f"{text:>24}" for text in head))
    for row in rows:
        wall, wire = statistics.median(row.wall_s), statistics.median(row.wire_bytes)
        planned = f"{row.planned_wire_bytes / 1e6:.3f}" if row.planned_wire_bytes else ""
        times = f"{1e3 * row.predicted_s:24.1f}{1e3 * wall:24.1f}"
        print(f"{row.name:<28}{row.by or 'plain':>12}{times}{planned:>24}{wire / 1e6:24.3f}")


def main() -> None:
    args, rows = over_two_hosts(__doc__, work)
    print(f"{args.shape}: one axis of {RANKS} ranks over two hosts, a wire of {args.rate}")
    print_table(rows)
    write(args, rows)


if __name__ == "__main__":
    main()
