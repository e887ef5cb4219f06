"""What an emitted program costs beside its kernels: seconds of Python per layer and pass.

A GPT so small that kernels take no time, on axes that send nothing, as the last rank of its grid.
From each program's forward and backward those of the original module are taken, interleaved with
it: what is left is what the program adds. Of two depths: what grows is the layers', what does not
(split embeddings and losses, calls that begin sums of gradients) comes once. Moves and their own
Python count; process groups, and what hands out local tensors, do not.

Run: python benchmarks/python_cost.py [--layers 12] [--rounds 30] [--out python_cost.json]
"""

from __future__ import annotations

import argparse
import functools
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

SHALLOW = 2
"""The layers of the model whose cost is taken off that of the deep one."""

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
    """Return the steps of the last rank's program."""
    scheme, sizes = CASES[name]
    model, inputs = small(layers)
    pins = scheme(model, sizes, inputs) if scheme else None
    found, grid = inferred(model, (), inputs, Options()), as_grid(sizes)
    plan = search_plan(*found, grid, gloo_loopback(), pins).plan
    coords, device = grid.coords(grid.world_size - 1), torch.device("cpu")
    axes = silent_axes(grid, coords, CopyClock(device))
    flat = found[0].flatten_inputs((), inputs)
    rank = alone(found, plan, coords, axes, {}, flat, device)
    return both_ways(lambda: rank.module(*rank.arguments)[0], rank.forget_gradients)


def measure(layers: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return, by case, the milliseconds that a layer adds to each pass, and those once."""
    made = {"": original, **{name: functools.partial(emitted, name) for name in CASES}}
    steps = {(name, n): make(n) for name, make in made.items() for n in (SHALLOW, layers)}
    rows: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in steps}
    for number in range(rounds + 3):  # three to warm up
        for key, step in steps.items():
            spent = step()
            if number >= 3:
                rows[key].append(spent)
    typical = {
        key: [1e3 * statistics.median(way) for way in zip(*found, strict=True)]
        for key, found in rows.items()
    }
    found = {"original": _by_layer(typical["", SHALLOW], typical["", layers], layers)}
    for name in CASES:
        added = [
            [mine - own for mine, own in zip(typical[name, n], typical["", n], strict=True)]
            for n in (SHALLOW, layers)
        ]
        found[name] = _by_layer(*added, layers)
    return found


def _by_layer(shallow: list[float], deep: list[float], layers: int) -> dict[str, float]:
    """Tell what each layer takes from what comes once."""
    out = {}
    for way, few, many in zip(("forward", "backward"), shallow, deep, strict=True):
        out[way] = (many - few) / (layers - SHALLOW)
        out[f"{way} once"] = few - SHALLOW * out[way]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = measure(args.layers, args.rounds)
    print(f"{'milliseconds':<20} a layer: {'forward':>8} {'backward':>8}   once: forward backward")
    for name, row in rows.items():
        layer, once = (
            f"{row['forward' + k]:>8.3f} {row['backward' + k]:>8.3f}" for k in ("", " once")
        )
        print(f"{name:<29} {layer} {once:>23}")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
