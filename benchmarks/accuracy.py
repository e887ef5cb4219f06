"""How far is the prediction from the step: time, bytes and memory, for every published scheme?

Four gloo ranks. For each shape the machine is measured, on the CPU clock; then each scheme of
`autotp.schemes`, and what the search picks by itself, is planned, run and compared with its plan:
CPU-seconds per rank and step (AdamW included), bytes sent, and the most bytes that live at once on
rank 0: parameters, the optimizer's states and all that operators made. All steps are taken in turn,
round after round, each in an order of its own, and in each round the machine is measured once more:
its speed drifts, and plans are priced again by all that was measured while they ran. Shapes too
large for that run in sets, each in processes of its own; the pick is in each, and a set's seconds,
predicted and measured, are scaled to those of the pick in the first. Prints one line per scheme,
and per shape the rank correlation, the median errors and the regret: the measured time of the pick
over the best measured. Writes one JSON.

With `--link` all traffic passes one link of --rate, in a private network, and seconds are those of
the wall: measured, planned by and compared.

    OMP_NUM_THREADS=1 python benchmarks/accuracy.py [--all] [--steps 7] [--link] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from gauges import Spent, Step, in_turns, keep_memory
from links import GIGABIT, limit, missing, private_network
from scipy.stats import spearmanr
from shapes import MEASURED, SHAPES
from variants import sets_of, training_step

import autotp
from autotp.cost_model.calibration import Clock, fit
from autotp.cost_model.cluster import Cluster, gloo_loopback
from autotp.launch import launch
from autotp.live_bytes import LiveBytes
from autotp.measure import QUICK, Measuring
from autotp.module import ParallelModule
from autotp.options import Options
from autotp.passes.planning import search_plan
from autotp.reading import inferred
from autotp.schemes import SCHEMES, scheme_pins

RANKS, GRID = 4, (2, 2)
PICK = "what autotp picks"
WARM = "tiny"
SHORT = ("balanced",)
NAMES: dict[Clock, str] = {"cpu": "measured_cpu_clock", "wall": "measured_wall_clock"}


@dataclass(frozen=True)
class Row:
    """One scheme on one shape, predicted and measured by one clock, per rank and step."""

    shape: str
    scheme: str
    predicted_s: float
    measured_s: float
    predicted_bytes: float
    sent_bytes: float
    predicted_memory: float
    live_memory: float

    def scaled(self, by: float) -> Row:
        """Return this row on a machine that takes so many times as long."""
        return replace(self, predicted_s=by * self.predicted_s, measured_s=by * self.measured_s)


Refusal = tuple[str, str, str]
"""A shape, a scheme, and why the shape has no plan of it."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a set of schemes came to, and the cluster that it was planned for; rows on rank 0."""

    rows: list[Row]
    refused: list[Refusal]
    measured: dict[str, Any]
    cluster: Cluster


@dataclass(slots=True)
class Ready:
    """A scheme that is ready to step on this rank, and what its steps took so far."""

    scheme: str
    plan: autotp.Plan
    step: Step
    sent_bytes: float
    live_bytes: float
    spent: list[Spent] = field(default_factory=list)


def ready(shape: str, scheme: str, cluster: Cluster) -> Ready | str:
    """Plan a scheme, take its first steps and watch the last; say why where it is refused."""
    model, inputs = SHAPES[shape].build()
    try:
        pins = None if scheme == PICK else scheme_pins(scheme, model, GRID, inputs)
        autotp.parallelize(model, GRID, inputs, cluster=cluster, pins=pins)
    except autotp.AutotpError as error:
        return error.what
    parallel = cast(ParallelModule, model)
    plan, axes = parallel.plan, parallel._autotp.axes.values()
    step = training_step(model, inputs)
    step()
    model.zero_grad()
    for axis in axes:
        axis.reset_sent()
    with LiveBytes() as live:
        step()
    sent = float(sum(sum(axis.sent.values()) for axis in axes))
    rests = plan.memory.parameters + plan.memory.optimizer
    return Ready(scheme, plan, step, sent, rests + live.peak)


def run_set(
    shape: str, schemes: Sequence[str], cluster: Cluster, steps: int, between: Callable[[], None]
) -> tuple[list[Ready], list[Refusal]]:
    """Return what the steps of these schemes took, all in turn, and which were refused.

    `between` is called before each round.
    """
    found = {scheme: ready(shape, scheme, cluster) for scheme in schemes}
    refused = [(shape, scheme, why) for scheme, why in found.items() if isinstance(why, str)]
    going = {r.scheme: r for r in found.values() if isinstance(r, Ready)}
    spent = in_turns({name: r.step for name, r in going.items()}, steps, between)
    return [replace(r, spent=spent[name]) for name, r in going.items()], refused


def priced_again(shape: str, plans: Sequence[autotp.Plan], cluster: Cluster) -> list[autotp.Plan]:
    """Return plans with the same layouts, and as much made again, priced for another cluster."""
    model, inputs = SHAPES[shape].build()
    found, out = inferred(model, (), inputs, Options()), []
    for plan in plans:
        rest = {name: r.layout for name, r in plan.params.items()}
        out.append(search_plan(*found, plan.grid, cluster, _pins(plan), rest).plan)
    return out


def _pins(plan: autotp.Plan) -> dict[str, dict[str, str]]:
    pins = {d.name: dict(zip(d.axes, d.choices, strict=True)) for d in plan}
    again = {m.value for m in plan.moves if m.again}
    names = [name for name, r in plan.params.items() if r.value in again]
    for name in [*names, *(d.name for d in plan if d.again)]:
        pins.setdefault(name, {})["backward"] = "again"
    return pins


def rows_of(shape: str, going: Sequence[Ready], cluster: Cluster, clock: Clock) -> list[Row]:
    """Return a row per scheme, its plan priced for a cluster."""
    priced = priced_again(shape, [r.plan for r in going], cluster)
    return [
        Row(
            shape,
            r.scheme,
            plan.step_time_s,
            _seconds(r, clock),
            float(r.plan.comm_bytes),
            r.sent_bytes,
            r.plan.memory.at_once,
            r.live_bytes,
        )
        for r, plan in zip(going, priced, strict=True)
    ]


def _seconds(r: Ready, clock: Clock) -> float:
    """Return the median seconds of a step: wall, or CPU-seconds per rank."""
    if clock == "wall":
        return statistics.median(s.wall_s for s in r.spent)
    return statistics.median(s.cpu_s for s in r.spent) / RANKS


def work(
    shape: str,
    schemes: Sequence[str],
    steps: int,
    seconds: float,
    rate: str,
    cluster: Cluster | None,
) -> Work:
    """Measure the machine and a set of schemes of a shape, planned for `cluster` if it is given."""
    dist.init_process_group("gloo")
    keep_memory()
    run_set(WARM, ["megatron"], gloo_loopback(), 1, _done)  # what is imported late counts for none
    clock: Clock = "wall" if rate else "cpu"
    if rate and dist.get_rank() == 0:
        limit("lo", rate)
    measuring = Measuring(QUICK.sizes, torch.device("cpu"))
    measuring.repeat(replace(QUICK, seconds=seconds))
    cluster = cluster or fit(measuring.found(), NAMES[clock], clock)
    going, refused = run_set(shape, schemes, cluster, steps, measuring.again)
    found = measuring.found()
    is_first = dist.get_rank() == 0
    rows = rows_of(shape, going, fit(found, NAMES[clock], clock), clock) if is_first else []
    return Work(rows, refused, asdict(found), cluster)


def rows_in_sets(
    shape: str, schemes: Sequence[str], *how: Any
) -> tuple[list[Row], list[Refusal], list[dict[str, Any]]]:
    """Return a row per scheme, which were refused, and what was measured of the machine per set."""
    rows: dict[str, Row] = {}
    refused: list[Refusal] = []
    measured, cluster = [], None
    for names in sets_of(schemes, PICK, SHAPES[shape].together):
        found = launch(work, RANKS, shape, names, *how, cluster)[0]
        mine = {r.scheme: r for r in found.rows}
        scale = rows.get(PICK, mine[PICK]).measured_s / mine[PICK].measured_s
        rows |= {name: r.scaled(scale) for name, r in mine.items() if name not in rows}
        refused += found.refused
        measured.append(found.measured)
        cluster = found.cluster
    return list(rows.values()), refused, measured


def _done() -> Any:
    return 0.0


def line(row: Row) -> str:
    ratio = row.predicted_s / row.measured_s
    times = f"{row.predicted_s:8.3f} s {row.measured_s:8.3f} s {ratio:6.2f}"
    sent = f"{row.predicted_bytes / 1e6:8.2f} {row.sent_bytes / 1e6:8.2f} MB"
    memory = f"{row.predicted_memory / 1e6:7.0f} {row.live_memory / 1e6:7.0f} MB"
    return f"{row.shape:<17} {row.scheme:<18} {times}  {sent}  {memory}"


def summary(rows: list[Row]) -> dict[str, float]:
    """Return how well one shape's schemes are ordered and met, and the regret of the pick."""
    predicted, measured = [r.predicted_s for r in rows], [r.measured_s for r in rows]
    pick = next((r for r in rows if r.scheme == PICK), min(rows, key=lambda r: r.predicted_s))
    return {
        "spearman": float(spearmanr(predicted, measured).statistic),
        "time_error": statistics.median(abs(r.predicted_s / r.measured_s - 1) for r in rows),
        "memory_error": statistics.median(
            abs(r.predicted_memory / r.live_memory - 1) for r in rows
        ),
        "bytes_error": max(
            abs(r.predicted_bytes - r.sent_bytes) / max(1.0, r.sent_bytes) for r in rows
        ),
        "regret": pick.measured_s / min(measured) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="all shapes, not one")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHORT)
    parser.add_argument("--schemes", nargs="+", choices=[*SCHEMES, PICK], default=[*SCHEMES, PICK])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of measuring the machine first, per shape"
    )
    parser.add_argument("--link", action="store_true", help="wall seconds on a limited link")
    parser.add_argument("--rate", default=GIGABIT, help="of that link, as tc spells it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shapes = MEASURED if args.all else tuple(args.shapes)
    if args.link:
        if why_not := missing():
            raise SystemExit(f"there can be no limited link: {why_not}")
        private_network()
    rate = args.rate if args.link else ""
    print(f"{'':36} predicted   measured  ratio    bytes sent: both      memory: both")
    how = args.steps, args.seconds, rate
    rows: list[Row] = []
    measured, summaries = {}, {}
    for shape in shapes:  # in processes of their own, as they keep their memory
        mine, refused, measured[shape] = rows_in_sets(shape, tuple(args.schemes), *how)
        print(*map(line, mine), sep="\n")
        for _, scheme, why in refused:
            print(f"{shape:<17} {scheme:<18} refused: {why}")
        rows += mine
        if mine:
            summaries[shape] = summary(mine)
            told = (f"{name} {x:.3f}" for name, x in summaries[shape].items())
            print(f"{shape:<17}", "  ".join(told), flush=True)
    if args.out:
        about = {"torch": torch.__version__, "machine": platform.processor()}
        body = {"about": about, "rows": [asdict(r) for r in rows], "summary": summaries}
        args.out.write_text(json.dumps({**body, "measured": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
