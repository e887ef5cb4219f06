"""Is torch.compile worth it: the emitted program under it, against the same program in eager mode.

Four gloo ranks on a 2x2 grid, batch over one axis, tensors over the other: CPU-seconds of forward,
backward and AdamW, summed over ranks, interleaved (A B A B). Compiled, a program begins nothing
early.

Run: python benchmarks/compiled.py [--shape activation-heavy] [--layers 1] [--rounds 5]
     [--backend inductor] [--out compiled.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from gauges import Spent, spend
from shapes import SHAPES
from variants import training_step

import autotp
from autotp import schemes
from autotp.launch import launch

GRID = (2, 2)


def case(shape: str, layers: int, rounds: int, backend: str) -> dict[str, float]:
    """Return medians of both, their ratio, how the losses differ, and what compiling took."""
    model, inputs = SHAPES[shape].build(layers)
    other = copy.deepcopy(model)
    pins = schemes.batch_x_tensor(model, GRID, inputs)
    for m in (model, other):
        autotp.parallelize(m, GRID, inputs, pins=pins, cluster="gloo_loopback")
    eager = training_step(model, inputs)
    compiled = training_step(torch.compile(other, backend=backend), inputs)
    dist.barrier()
    start_s = time.perf_counter()
    losses = [abs(eager() - compiled())]
    first_s = time.perf_counter() - start_s
    losses += [abs(eager() - compiled()) for _ in range(2)]
    pairs: list[tuple[Spent, Spent]] = [(spend(eager), spend(compiled)) for _ in range(rounds)]
    return {
        "eager_cpu_s": statistics.median(a.cpu_s for a, _ in pairs),
        "compiled_cpu_s": statistics.median(b.cpu_s for _, b in pairs),
        "compiled_over_eager": statistics.median(b.cpu_s / a.cpu_s for a, b in pairs),
        "compiled_over_eager_wall": statistics.median(b.wall_s / a.wall_s for a, b in pairs),
        "loss_difference": max(losses),
        "first_step_s": first_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="activation-heavy")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    row = launch(case, 4, args.shape, args.layers, args.rounds, args.backend)[0]
    for name, value in row.items():
        print(f"{name:<26} {value:10.4g}")
    if args.out:
        args.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
