"""What do calls save that parameters share, and gradients that are awaited late?

The same plan twice, as planned and with every parameter's move a call of its own: the median ratio
of interleaved steps (A B A B) in CPU-seconds summed over ranks and in wall seconds, on gloo.

    data parallel   every weight whole on every rank, 4x1
    auto 4x1, 2x2   what the planner chooses on these grids

Run: python benchmarks/shared_calls.py [--rounds 7] [--out shared_calls.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from shapes import GPT
from torch import Tensor, nn
from variants import training_step

import autotp
from autotp import schemes
from autotp.launch import launch

BATCH, SEQ, HIDDEN, HEADS, LAYERS, VOCAB = 8, 512, 256, 4, 6, 1024
"""A GPT-2-like model of six layers under 4,096 tokens."""

CASES = {
    "data parallel 4x1": ((4, 1), True),
    "auto 4x1": ((4, 1), False),
    "auto 2x2": ((2, 2), False),
}


def build() -> tuple[GPT, dict[str, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))
    model = GPT(HIDDEN, HEADS, LAYERS, VOCAB, SEQ)
    return model, {"tokens": tokens, "labels": tokens.roll(-1, 1)}


def seconds(step: Callable[[], float]) -> tuple[float, float]:
    """Return CPU-seconds summed over ranks, and wall seconds, of one step."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    spent = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
    dist.all_reduce(spent)
    return float(spent), time.perf_counter() - wall


def calls(model: nn.Module, step: Callable[[], float]) -> int:
    axes = model._autotp.axes.values()  # type: ignore[union-attr]
    for axis in axes:
        axis.reset_sent()
    step()
    return sum(n for axis in axes for n in axis.calls.values())


def case(grid: tuple[int, int], data_parallel: bool, rounds: int) -> dict[str, float]:
    model, inputs = build()
    pins = schemes.data_parallel(model, grid, inputs) if data_parallel else None
    shared = autotp.plan(model, grid, inputs, cluster="gloo_loopback", pins=pins)
    apart = replace(shared, buckets=())
    steps, counts = [], []
    for plan in (shared, apart):
        one = autotp.parallelize(copy.deepcopy(model), grid, inputs, plan=plan)
        steps.append(training_step(one, inputs))
        counts.append(calls(one, steps[-1]))
    for step in steps:
        step()
    pairs = [(seconds(steps[0]), seconds(steps[1])) for _ in range(rounds)]
    medians = {
        f"{name}_{what}_s": statistics.median(p[k][j] for p in pairs)
        for k, name in enumerate(("shared", "apart"))
        for j, what in enumerate(("cpu", "wall"))
    }
    ratios = [statistics.median(a[j] / b[j] for a, b in pairs) for j in range(2)]
    return {
        **medians,
        "cpu_ratio": ratios[0],
        "wall_ratio": ratios[1],
        "shared_calls": counts[0],
        "apart_calls": counts[1],
        "predicted_shared_s": shared.step_time_s,
        "buckets": len(shared.buckets),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = {name: launch(case, 4, *what, args.rounds)[0] for name, what in CASES.items()}
    print(f"{BATCH}x{SEQ} tokens, hidden {HIDDEN}, {LAYERS} layers; load {os.getloadavg()[0]:.1f}")
    for name, r in rows.items():
        print(
            f"{name:<20} calls {r['shared_calls']:.0f} / {r['apart_calls']:.0f}"
            f"   CPU {r['shared_cpu_s']:.2f} / {r['apart_cpu_s']:.2f} s, ratio {r['cpu_ratio']:.3f}"
            f"   wall {r['shared_wall_s']:.2f} / {r['apart_wall_s']:.2f} s,"
            f" ratio {r['wall_ratio']:.3f}"
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
