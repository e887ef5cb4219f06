"""Is torch.compile worth it: the emitted program under it, against the same program in eager mode.

Four gloo ranks, what autotp picks on a grid: forward, backward and AdamW of both, in turns, in
CPU-seconds summed over ranks and in wall seconds; medians of the ratios within a round. Compiled, a
program begins nothing early.

Run: python benchmarks/compiled.py [--shapes activation-heavy balanced] [--grid 2 2] [--layers 1]
     [--rounds 7] [--backend inductor] [--out compiled.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from gauges import Ratio, in_turns, keep_memory
from shapes import SHAPES
from variants import training_step

import autotp
from autotp.launch import launch


@dataclass(frozen=True, slots=True)
class Row:
    """The compiled step over the eager one, how their losses differ, and what their first took."""

    shape: str
    cpu: Ratio
    wall: Ratio
    loss_difference: float
    first_step_s: float


def case(shape: str, grid: Sequence[int], layers: int, rounds: int, backend: str) -> Row:
    """Train what autotp picks for a shape on a grid, in eager and compiled."""
    keep_memory()
    model, inputs = SHAPES[shape].build(layers)
    other = copy.deepcopy(model)
    for m in (model, other):
        autotp.parallelize(m, tuple(grid), inputs, cluster="gloo_loopback")
    eager = training_step(model, inputs)
    compiled = training_step(torch.compile(other, backend=backend), inputs)
    dist.barrier()
    start_s = time.perf_counter()
    losses = [abs(eager() - compiled())]
    first_s = time.perf_counter() - start_s
    losses += [abs(eager() - compiled()) for _ in range(2)]
    spent = in_turns({"eager": eager, "compiled": compiled}, rounds)
    cpu, wall = (
        Ratio.of(*([getattr(s, clock) for s in spent[name]] for name in ("compiled", "eager")))
        for clock in ("cpu_s", "wall_s")
    )
    return Row(shape, cpu, wall, max(losses), first_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["activation-heavy"])
    parser.add_argument("--grid", nargs="+", type=int, default=[2, 2])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(f"{'compiled over eager':<20} CPU         wall        losses differ by   first step s")
    rows = []
    for shape in args.shapes:
        ranks = math.prod(args.grid)
        row = launch(case, ranks, shape, args.grid, args.layers, args.rounds, args.backend)[0]
        ratios = f"{row.cpu!s:<11} {row.wall!s:<11}"
        told = f"{row.loss_difference:<18.2g} {row.first_step_s:.0f}"
        print(f"{shape:<20} {ratios} {told}", flush=True)
        rows.append(row)
    if args.out:
        args.out.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
