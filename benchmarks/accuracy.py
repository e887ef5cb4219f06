"""How far is the prediction from the step: time, bytes and memory, for every published scheme?

Four gloo ranks. The machine is measured first, on the CPU clock; then each scheme of
`autotp.schemes`, and what the search picks by itself, is planned, run and compared with its plan:
CPU-seconds per rank and step (AdamW included), bytes sent, and the peak memory of the
step: parameters and all that was taken since the program was ready.
Prints one line per scheme, and per shape the rank correlation, the median errors and the regret:
the measured time of the pick over the best measured. Writes one JSON.

    OMP_NUM_THREADS=1 python benchmarks/accuracy.py [--all] [--steps 3] [--out accuracy.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from gauges import peak_bytes, reset_peak, resident_bytes, spend
from scipy.stats import spearmanr
from shapes import MEASURED, SHAPES
from variants import training_step

import autotp
from autotp.cost_model.calibration import fit
from autotp.cost_model.cluster import Cluster
from autotp.launch import launch
from autotp.measure import QUICK, measure
from autotp.module import ParallelModule
from autotp.schemes import SCHEMES, scheme_pins

RANKS, GRID = 4, (2, 2)
PICK = "what autotp picks"
WARM = "tiny"
SHORT = ("balanced",)


@dataclass(frozen=True)
class Row:
    """One scheme on one shape, predicted and measured, per rank and step."""

    shape: str
    scheme: str
    predicted_s: float
    cpu_s: float
    wall_s: float
    predicted_bytes: float
    sent_bytes: float
    predicted_memory: float
    peak_memory: float


def run_scheme(shape: str, scheme: str, cluster: Cluster, steps: int) -> Row | str:
    """Plan, run and measure one scheme on this rank; say why where it is refused."""
    model, inputs = SHAPES[shape].build()
    try:
        pins = None if scheme == PICK else scheme_pins(scheme, model, GRID, inputs)
        autotp.parallelize(model, GRID, inputs, cluster=cluster, pins=pins)
    except autotp.AutotpError as error:
        return error.what
    parallel = cast(ParallelModule, model)
    plan, axes = parallel.plan, parallel._autotp.axes.values()
    before = resident_bytes() - plan.memory.parameters
    step = training_step(model, inputs)
    step()
    for axis in axes:
        axis.reset_sent()
    resident_bytes()
    reset_peak()
    spent = [spend(step) for _ in range(steps)]
    sent = float(sum(sum(axis.sent.values()) for axis in axes)) / steps
    return Row(
        shape,
        scheme,
        plan.step_time_s,
        statistics.median(s.cpu_s for s in spent) / RANKS,
        statistics.median(s.wall_s for s in spent),
        float(plan.comm_bytes),
        sent,
        plan.memory.total,
        peak_bytes() - before,
    )


def work(
    shapes: Sequence[str], schemes: Sequence[str], steps: int, seconds: float
) -> tuple[list[Row], list[tuple[str, str, str]], dict[str, Any]]:
    """Measure the machine, then every scheme on every shape; every rank calls it."""
    dist.init_process_group("gloo")
    measured = measure(replace(QUICK, seconds=seconds), torch.device("cpu"))
    cluster = fit(measured, "measured_cpu_clock", "cpu")
    run_scheme(WARM, "megatron", cluster, steps=1)  # what is imported late counts for no scheme
    rows: list[Row] = []
    refused = []
    for shape in shapes:
        for scheme in schemes:
            found = run_scheme(shape, scheme, cluster, steps)
            if isinstance(found, str):
                refused.append((shape, scheme, found))
                continue
            rows.append(found)
            if dist.get_rank() == 0:
                print(line(found), flush=True)
    return rows, refused, asdict(measured)


def line(row: Row) -> str:
    times = f"{row.predicted_s:8.3f} s {row.cpu_s:8.3f} s {row.predicted_s / row.cpu_s:6.2f}"
    sent = f"{row.predicted_bytes / 1e6:8.2f} {row.sent_bytes / 1e6:8.2f} MB"
    memory = f"{row.predicted_memory / 1e6:7.0f} {row.peak_memory / 1e6:7.0f} MB"
    return f"{row.shape:<17} {row.scheme:<18} {times}  {sent}  {memory}"


def summary(rows: list[Row]) -> dict[str, float]:
    """Return how well one shape's schemes are ordered and met, and the regret of the pick."""
    predicted, measured = [r.predicted_s for r in rows], [r.cpu_s for r in rows]
    pick = next((r for r in rows if r.scheme == PICK), min(rows, key=lambda r: r.predicted_s))
    return {
        "spearman": float(spearmanr(predicted, measured).statistic),
        "time_error": statistics.median(abs(r.predicted_s / r.cpu_s - 1) for r in rows),
        "memory_error": statistics.median(
            abs(r.predicted_memory / r.peak_memory - 1) for r in rows
        ),
        "bytes_error": max(abs(r.predicted_bytes / r.sent_bytes - 1) for r in rows),
        "regret": pick.cpu_s / min(measured) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="all shapes, not one")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHORT)
    parser.add_argument("--schemes", nargs="+", choices=[*SCHEMES, PICK], default=[*SCHEMES, PICK])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of measuring the machine")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shapes = MEASURED if args.all else tuple(args.shapes)
    print(f"{'':36} predicted   measured  ratio    bytes sent: both      memory: both")
    found = launch(work, RANKS, shapes, tuple(args.schemes), args.steps, args.seconds)
    rows, refused, measured = found[0]
    for shape, scheme, why in refused:
        print(f"{shape:<17} {scheme:<18} refused: {why}")
    summaries = {s: summary(mine) for s in shapes if (mine := [r for r in rows if r.shape == s])}
    for shape, values in summaries.items():
        print(f"{shape:<17}", "  ".join(f"{name} {x:.3f}" for name, x in values.items()))
    if args.out:
        about = {"torch": torch.__version__, "machine": platform.processor()}
        body = {"about": about, "rows": [asdict(r) for r in rows], "summary": summaries}
        args.out.write_text(json.dumps({**body, "measured": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
