"""Two hosts on one machine: does the planner put the axis that talks most inside a host?

Two network namespaces, two ranks in each: fast inside a host (loopback), and one slow wire between.
The grid is 2x2, its first axis between the hosts and its last inside each. The machine is measured
over both links, the step is planned for them, and two mappings of one scheme are set beside the
plan: batch between the hosts and tensor parallelism inside, and the other way round. Wall seconds
per step, medians of interleaved rounds, and the bytes that the wire has seen. One JSON.

It takes root on Linux, for the namespaces; elsewhere it says so and stops.

    OMP_NUM_THREADS=1 python benchmarks/two_hosts.py [--shape NAME] [--rounds 5] [--rate 300mbit]
        [--out two_hosts.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gauges import Step, spend
from links import ADDRESSES, WIRE, enter, missing, private_network, sent_bytes, two_hosts
from shapes import SHAPES
from variants import training_step

import autotp
from autotp.cost_model.calibration import fit
from autotp.cost_model.cluster import Cluster
from autotp.launch import launch
from autotp.measure import QUICK, measure
from autotp.schemes import scheme_pins

RANKS, PER_HOST = 4, 2
GRID = {"between": 2, "inside": 2}
SCHEME = "batch_x_tensor"
PICK = "what autotp picks"
MAPPINGS = ("batch between, tensor inside", "tensor between, batch inside")
Pins = dict[str, dict[str, str]]


@dataclass(slots=True)
class Row:
    """One mapping: what the plan says per rank, what each round took, and what the wire saw."""

    name: str
    predicted_s: float
    planned_bytes: dict[str, float]
    wall_s: list[float] = field(default_factory=list)
    wire_bytes: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def join(other_host: int) -> None:
    """Move this rank to its host, as torchrun would have started it there."""
    host = int(os.environ["RANK"]) // PER_HOST
    if host == 1:
        enter(other_host)
    os.environ.update(
        MASTER_ADDR=ADDRESSES[0], GLOO_SOCKET_IFNAME=WIRE[host], LOCAL_WORLD_SIZE=str(PER_HOST)
    )
    dist.init_process_group("gloo")


def measured(seconds: float) -> Cluster:
    """Return the two hosts as they are; every rank calls it.

    Each counts all cores as its own, and has to share them with the other.
    """
    found = measure(replace(QUICK, seconds=seconds), torch.device("cpu"))
    return fit(replace(found, cores=found.cores * PER_HOST / RANKS), "two_hosts")


def work(other_host: int, shape: str, rounds: int, seconds: float) -> tuple[list[Row], Cluster]:
    """Plan and run every mapping in turn; every rank calls it."""
    join(other_host)
    cluster = measured(seconds)
    rows: list[Row] = []
    steps: list[Step] = []
    for name in (PICK, *MAPPINGS):
        step, row = _build(name, shape, cluster)
        steps.append(step)
        rows.append(row)
    for _ in range(rounds):
        for step, row in zip(steps, rows, strict=True):
            before = sent_bytes(WIRE[0])
            row.wall_s.append(spend(step).wall_s)
            row.wire_bytes.append(sent_bytes(WIRE[0]) - before)
    return rows, cluster


def _build(name: str, shape: str, cluster: Cluster) -> tuple[Step, Row]:
    model, inputs = SHAPES[shape].build()
    pins: Pins | None = None
    if name != PICK:
        pins = dict(scheme_pins(SCHEME, model, GRID, inputs))  # type: ignore[arg-type]
    if name == MAPPINGS[1]:
        pins = swapped(pins or {})
    parallel: Any = autotp.parallelize(model, GRID, inputs, cluster=cluster, pins=pins)
    step = training_step(parallel, inputs)
    sent: dict[str, float] = dict.fromkeys(GRID, 0.0)
    for (_, axis), size in parallel.plan.sent().items():
        sent[axis] += float(size)
    return step, Row(name, parallel.plan.step_time_s, sent, losses=[step(), step()])


def swapped(pins: Pins) -> Pins:
    """Return the pins with the roles of the two axes exchanged."""
    other = dict(zip(GRID, reversed(GRID), strict=True))
    return {op: {other[axis]: word for axis, word in pin.items()} for op, pin in pins.items()}


def print_table(rows: list[Row]) -> None:
    head = ("predicted", "measured", "planned MB between, inside", "MB on the wire")
    print(f"{'':30}" + "".join(f"{text:>28}" for text in head))
    for row in rows:
        planned = ", ".join(f"{row.planned_bytes[axis] / 1e6:.2f}" for axis in GRID)
        wire = statistics.median(row.wire_bytes) / 1e6
        times = f"{row.predicted_s:26.3f} s{statistics.median(row.wall_s):26.3f} s"
        print(f"{row.name:<30}{times}{planned:>28}{wire:28.2f}")


def over_two_hosts(about: str | None, work: Callable[..., Any]) -> tuple[argparse.Namespace, Any]:
    """Return what the command asks for, and what `work` returned on a rank; ends where it cannot.

    `work` is given the other host, and the shape, rounds and seconds that are asked for.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--shape", choices=SHAPES, default="activation-heavy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", default="300mbit", help="of the wire, as tc spells it")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring the links")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if why_not := missing():
        print(f"skipped: two hosts on one machine take network namespaces, and {why_not}")
        raise SystemExit(0)
    private_network()
    with two_hosts(args.rate) as other:
        return args, launch(work, RANKS, other, args.shape, args.rounds, args.seconds)[0]


def write(args: argparse.Namespace, rows: Sequence[Any]) -> None:
    """Write the rows as JSON, if that is asked for."""
    if args.out:
        body = {"options": {**vars(args), "out": str(args.out)}, "rows": list(map(asdict, rows))}
        args.out.write_text(json.dumps(body, indent=1) + "\n")


def main() -> None:
    args, (rows, cluster) = over_two_hosts(__doc__, work)
    print(f"{args.shape}: {SHAPES[args.shape].about}; a wire of {args.rate} between two hosts")
    for place, link in (("inside", cluster.intra), ("between", cluster.inter)):
        print(f"measured {place}: {link.bandwidth_bytes_per_s / 1e6:.0f} MB/s, all_gather")
    print_table(rows)
    best = min(rows, key=lambda row: statistics.median(row.wall_s))
    print(f"the fastest: {best.name}")
    write(args, rows)


if __name__ == "__main__":
    main()
