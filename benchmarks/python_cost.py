"""What an emitted program costs beside its kernels: seconds of Python per layer and pass.

A GPT so small that kernels take no time, on axes that send nothing. From each program's forward
and backward those of the original module are taken, interleaved with it: what is left is what the
program adds, divided by its layers. Moves, local tensors and the collectives' own Python count.

Run: python benchmarks/python_cost.py [--layers 8] [--rounds 30] [--out python_cost.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from shapes import GPT
from torch import Tensor, nn

from autotp import schemes
from autotp.cost_model.cluster import gloo_loopback
from autotp.grid import as_grid
from autotp.options import Options
from autotp.passes.planning import search_plan
from autotp.rank_program import alone
from autotp.reading import inferred
from autotp.silent_axis import CopyClock, silent_axes

CASES = {
    "1x1": (None, (1, 1)),
    "1x4 megatron": (schemes.megatron, (1, 4)),
    "1x4 megatron_sp": (schemes.megatron_sp, (1, 4)),
    "2x2 batch_x_tensor": (schemes.batch_x_tensor, (2, 2)),
    "4x1 data_parallel": (schemes.data_parallel, (4, 1)),
    "4x1 fsdp": (schemes.fsdp, (4, 1)),
}
"""Scheme and grid of each row."""

Phases = Callable[[], tuple[float, float]]
"""Runs one step without its optimizer; returns the seconds of forward and of backward."""


def small(layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 32, (4, 8))
    return GPT(32, 4, layers, 32, 8), {"tokens": tokens, "labels": tokens.roll(-1, 1)}


def both_ways(forward: Callable[[], Tensor], forget: Callable[[], None]) -> Phases:
    """Return what runs a forward and the backward of its loss, timed apart in CPU-seconds."""

    def run() -> tuple[float, float]:
        forget()
        start = time.process_time()
        loss = forward()
        middle = time.process_time()
        loss.backward()  # type: ignore[no-untyped-call]
        return middle - start, time.process_time() - middle

    return run


def original(layers: int) -> Phases:
    model, inputs = small(layers)
    return both_ways(lambda: model(**inputs), model.zero_grad)


def emitted(name: str, layers: int) -> Phases:
    """Return the steps of rank 0's program."""
    scheme, sizes = CASES[name]
    model, inputs = small(layers)
    pins = scheme(model, sizes, inputs) if scheme else None
    found, grid = inferred(model, (), inputs, Options()), as_grid(sizes)
    plan = search_plan(*found, grid, gloo_loopback(), pins).plan
    coords, device = grid.coords(0), torch.device("cpu")
    axes = silent_axes(grid, coords, CopyClock(device))
    flat = found[0].flatten_inputs((), inputs)
    rank = alone(found, plan, coords, axes, {}, flat, device)
    return both_ways(lambda: rank.module(*rank.arguments)[0], rank.forget_gradients)


def measure(layers: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return, by case, the milliseconds that a layer adds to each pass."""
    steps = {"": original(layers), **{name: emitted(name, layers) for name in CASES}}
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 3):  # three to warm up
        for name, step in steps.items():
            spent = step()
            if number >= 3:
                rows[name].append(spent)
    typical = {
        name: [statistics.median(row[k] for row in found) for k in (0, 1)]
        for name, found in rows.items()
    }
    own = typical.pop("")
    return {
        name: {
            way: 1e3 * (spent[k] - own[k]) / layers for k, way in enumerate(("forward", "backward"))
        }
        for name, spent in typical.items()
    } | {"original": {"forward": 1e3 * own[0] / layers, "backward": 1e3 * own[1] / layers}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = measure(args.layers, args.rounds)
    print(f"{'milliseconds per layer':<24} {'forward':>9} {'backward':>9}")
    for name, row in rows.items():
        print(f"{name:<24} {row['forward']:>9.3f} {row['backward']:>9.3f}")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
