"""How long is a training step: autotp against every scheme, torch's own parallelism, one process.

For each shape every variant trains the same model on the same batch, forward, backward and AdamW,
on four gloo ranks. All are run in turn, round after round, each round in an order of its own, and
each column is compared with torch's 1D tensor parallelism by the median of the ratios within a
round, with its standard error:

    CPU s      CPU-seconds, summed over ranks
    wall       seconds on loopback
    link       seconds with all traffic through one link of --rate
    sent       bytes sent per rank, by the kernel's own counters
    memory     the peak of one rank over what it held before the model was built

Columns that take a private network (root on Linux) are left out elsewhere. autotp plans for
loopback by CPU-seconds, and anew for the link by the wall clock; both are measured here, not taken
from the cache. The losses of all variants must agree. Two rows by themselves: autotp on a grid of
one against the unmodified module, and its `megatron` against torch's, which splits the same way.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py [--all] [--shapes NAME ...]
        [--variants NAME ...] [--rounds 9] [--link-rounds 3] [--layers 12] [--rate 1gbit]
        [--out step_time.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from gauges import (
    Ratio,
    Spent,
    Step,
    in_turns,
    keep_memory,
    peak_bytes,
    reset_peak,
    resident_bytes,
    spend,
)
from links import GIGABIT, limit, missing, private_network
from shapes import MEASURED, SHAPES
from variants import PLANNED, REFERENCE, VARIANTS, Refused, sets_of, training_step

import autotp
from autotp.cost_model.calibration import Clock, fit
from autotp.cost_model.cluster import Cluster
from autotp.launch import launch
from autotp.measure import QUICK, measure

RANKS = 4
LOOPBACK, LINK = "loopback", "link"
CLOCKS: dict[str, Clock] = {LOOPBACK: "cpu", LINK: "wall"}
SHORT_SHAPES = ("activation-heavy", "weight-heavy")
SHORT_VARIANTS = (REFERENCE, PLANNED, "autotp megatron", "autotp batch_x_tensor", "torch TP+SP")
SAME_LOSS = 1e-3
"""Relative: float32 sums in another order, over the first two steps."""


@dataclass(frozen=True, slots=True)
class Options:
    """What every rank is told: how many rounds, how deep, how slow, and whom to give up early."""

    rounds: Mapping[str, int]
    layers: int
    links: tuple[str, ...]
    rate: str
    cutoff: float
    seconds: float


@dataclass(slots=True)
class Row:
    """One variant on one shape: what each round took on each link, and what was true once."""

    shape: str
    variant: str
    spent: dict[str, list[Spent]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    peak_bytes: float = 0.0
    plan: dict[str, str] = field(default_factory=dict)
    predicted_s: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    figures: dict[str, tuple[float, Ratio]] = field(default_factory=dict)
    loss_off_by: float = 0.0


# On the ranks ------------------------------------------------------------------------------------


def work(shapes: Sequence[str], names: Sequence[str], options: Options) -> list[list[Row]]:
    """Run all shapes, and print each as it is done; every rank calls it."""
    dist.init_process_group("gloo")
    keep_memory()
    clusters = {link: _measured(link, options) for link in options.links}
    out = []
    for shape in shapes:
        chosen = sets_of(names, REFERENCE, SHAPES[shape].together)
        sets = [train(shape, some, clusters, options) for some in chosen]
        out.append(compared(sets))
        if dist.get_rank() == 0:
            about, layers = SHAPES[shape].about, options.layers or SHAPES[shape].layers
            print(f"\n{shape}: {about}, {layers} layers")
            print_table(out[-1])
    return out


def _measured(link: str, options: Options) -> Cluster:
    """Return this machine as it is on a link, by the clock of its column."""
    with _limited(link, options):
        found = measure(replace(QUICK, seconds=options.seconds), torch.device("cpu"))
    return fit(found, link, CLOCKS[link])


def train(
    shape: str, names: Sequence[str], clusters: Mapping[str, Cluster], options: Options
) -> list[Row]:
    """Run these variants in turn, on every link that was measured."""
    rows = {name: Row(shape, name) for name in names}
    steps: dict[str, Step] = {}
    for link, cluster in clusters.items():
        for name in names:
            if link == LOOPBACK or name == PLANNED:
                steps.pop(name, None)
                _build(rows[name], steps, link, cluster, options)
        with _limited(link, options):
            _rounds(rows, steps, link, options)
    return list(rows.values())


def _build(row: Row, steps: dict[str, Step], link: str, cluster: Cluster, options: Options) -> None:
    """Make a variant's step, and take its first two: their losses, and the second one's peak."""
    before = resident_bytes()
    try:
        step, plan = VARIANTS[row.variant](SHAPES[row.shape].build(options.layers), cluster)
    except Refused as refusal:
        row.refused = str(refusal)
        return
    steps[row.variant] = step
    row.losses = [step()]
    resident_bytes()
    reset_peak()
    row.losses.append(step())
    row.peak_bytes = row.peak_bytes or peak_bytes() - before
    if plan is not None:
        row.plan[link] = f"{plan.grid}, {plan.step_time_s:.3g} s predicted"
        row.predicted_s[link] = plan.step_time_s


@contextmanager
def _limited(link: str, options: Options) -> Iterator[None]:
    """Let all traffic pass one link of the given rate meanwhile, where the link counts."""
    if link != LINK:
        yield
        return
    for rate in (options.rate, None):
        dist.barrier()
        if dist.get_rank() == 0:
            limit("lo", rate)
        dist.barrier()
        if rate is not None:
            yield


def _rounds(rows: dict[str, Row], steps: dict[str, Step], link: str, options: Options) -> None:
    """Take a step of every variant in each round; what is far behind is timed once only."""
    tried = {name: spend(step) for name, step in steps.items()}
    bound = options.cutoff * tried[REFERENCE].wall_s
    for name, first in tried.items():
        rows[name].spent[link] = [first] if first.wall_s > bound else []
    going = {name: step for name, step in steps.items() if not rows[name].spent[link]}
    for name, spent in in_turns(going, options.rounds[link]).items():
        rows[name].spent[link] = spent


def compared(sets: Sequence[Sequence[Row]]) -> list[Row]:
    """Return all rows with their figures beside those of the reference that ran with them."""
    true = sets[0][0].losses
    for rows in sets:
        for row in rows:
            row.figures = figures(row, rows[0])
            pairs = zip(row.losses, true, strict=False)
            row.loss_off_by = max((abs(a / b - 1) for a, b in pairs), default=0.0)
    return [*sets[0], *(row for rows in sets[1:] for row in rows[1:])]


# From rounds to a table --------------------------------------------------------------------------

COLUMNS = {
    "CPU s": (LOOPBACK, "cpu_s", 1.0),
    "wall": (LOOPBACK, "wall_s", 1.0),
    "link": (LINK, "wall_s", 1.0),
    "sent MB": (LOOPBACK, "sent_bytes", 1e6),
}
MEMORY = "memory MB"


def figures(row: Row, reference: Row) -> dict[str, tuple[float, Ratio]]:
    """Return the median of each column, and its ratio to the reference, round by round."""
    out = {}
    for column, (link, name, unit) in COLUMNS.items():
        mine, theirs = ([getattr(s, name) for s in r.spent.get(link, [])] for r in (row, reference))
        if any(mine):
            out[column] = statistics.median(mine) / unit, Ratio.of(mine, theirs)
    if row.peak_bytes:
        out[MEMORY] = row.peak_bytes / 1e6, Ratio.of([row.peak_bytes], [reference.peak_bytes])
    return out


def print_table(rows: Sequence[Row]) -> None:
    """Print a line per variant: each column and, in brackets, its ratio to the reference."""
    columns = [*COLUMNS, MEMORY]
    print(f"{'':26}" + "".join(f"{column:>20}" for column in columns) + "  loss off by")
    for row in rows:
        if row.refused:
            print(f"{row.variant:<26}  refused: {row.refused}")
            continue
        found = row.figures
        cells = [f"{found[c][0]:.3f} ({found[c][1]})" if c in found else "-" for c in columns]
        once = ", once" if any(len(spent) == 1 for spent in row.spent.values()) else ""
        text = "; ".join(row.plan.values()) + once
        print(f"{row.variant:<26}" + "".join(f"{cell:>20}" for cell in cells), end="")
        print(f"  {row.loss_off_by:11.1e}  {text}", flush=True)


# A grid of one -----------------------------------------------------------------------------------


def one_rank(rounds: int, shape: str) -> Ratio:
    """Return autotp on a grid of one over the unmodified module, in CPU-seconds."""
    dist.init_process_group("gloo")
    model, inputs = SHAPES[shape].build()
    ours = autotp.parallelize(copy.deepcopy(model), grid=(1, 1), example_inputs=inputs)
    steps = {"ours": training_step(ours, inputs), "theirs": training_step(model, inputs)}
    for step in steps.values():
        step()
    spent = in_turns(steps, rounds)
    return Ratio.of(*([s.cpu_s for s in spent[name]] for name in steps))


# The command -------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every shape and every variant")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHORT_SHAPES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=SHORT_VARIANTS)
    parser.add_argument("--rounds", type=int, default=5, help="on loopback")
    parser.add_argument("--link-rounds", type=int, default=3, help="waiting is less noisy")
    parser.add_argument("--layers", type=int, default=0, help="12 for all of GPT-2 small")
    parser.add_argument("--rate", default=GIGABIT, help="of the slow link, as tc spells it")
    parser.add_argument("--no-link", action="store_true", help="loopback only")
    parser.add_argument("--cutoff", type=float, default=3.0, help="times the reference: time once")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring the machine")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    shapes = MEASURED if args.all else tuple(args.shapes)
    names = tuple(VARIANTS) if args.all else tuple(args.variants)
    why_not = "--no-link" if args.no_link else missing()
    if why_not:
        print(f"without a private network, its link and its counters: {why_not}")
    else:
        private_network()
    links = (LOOPBACK,) if why_not else (LOOPBACK, LINK)
    rounds = {LOOPBACK: args.rounds, LINK: args.link_rounds}
    options = Options(rounds, args.layers, links, args.rate, args.cutoff, args.seconds)
    rows = [row for found in launch(work, RANKS, shapes, names, options)[0] for row in found]
    alone = launch(one_rank, 1, args.rounds, shapes[0])[0]
    print(f"\nautotp on a grid of one over the unmodified module, CPU-seconds: {alone}")
    if args.out:
        about = {"torch": torch.__version__, "machine": platform.processor()}
        body = {"about": about, "options": asdict(options), "one_rank": asdict(alone)}
        args.out.write_text(json.dumps({**body, "rows": list(map(asdict, rows))}, indent=1) + "\n")
    wrong = [f"{row.variant} on {row.shape}" for row in rows if row.loss_off_by > SAME_LOSS]
    if wrong:
        raise SystemExit(f"other losses than {REFERENCE}'s: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
