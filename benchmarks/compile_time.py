"""How long does compiling take as layers are added, and in which stage?

GPT-2 at the width of XL on the meta device, batch 8 of 1,024 tokens, for each number of layers and
each grid. Prints a table of CPU-seconds per stage, the least of three runs (capture runs once), and
writes one JSON. Growth is the time at the most layers over the time at half as many: 2 is linear.

    OMP_NUM_THREADS=1 python benchmarks/compile_time.py [--all] [--layers 2 6 12] [--out PATH]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn

from autotp.axis import Axis
from autotp.cost_model.cluster import dgx_a100
from autotp.grid import Grid, as_grid
from autotp.passes.capture.model import capture
from autotp.passes.emit.codegen import emit
from autotp.passes.factors import Factors, infer_factors
from autotp.passes.network import Network, read_network
from autotp.passes.planning import read_plan
from autotp.passes.program import Program
from autotp.passes.search.solve import solve
from autotp.passes.strategies import build_model

LAYERS = (2, 6, 12)
ALL_LAYERS = (2, 6, 12, 24, 48, 96)
GRIDS = ((2, 2), (8, 8))
BATCH, SEQ, HIDDEN, HEADS = 8, 1024, 1600, 25
REPEATS = 3
STAGES = ("capture", "factors", "strategies", "search", "schedule", "codegen")

T = TypeVar("T")
Times = dict[str, float]


class Named(Axis):
    """An axis of a program that is emitted and never run."""

    def _refuse(self, *args: object) -> torch.Tensor:
        raise NotImplementedError

    def _levels(self, members: int) -> tuple[Axis, Axis]:
        raise NotImplementedError

    _all_gather = _reduce_scatter = _all_reduce = _all_to_all = _refuse


def timed(times: Times, stage: str, run: Callable[[], T], repeats: int = REPEATS) -> T:
    """Note the least CPU-seconds of `repeats` runs: the one that other work disturbed least."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        result = run()
        spent.append(time.process_time() - start)
    times[stage] = min(spent)
    return result


def gpt2(layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.GPT2Config(
        n_layer=layers,
        n_embd=HIDDEN,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config).train()
        tokens = torch.zeros(BATCH, SEQ, dtype=torch.int64)
    return model, {"input_ids": tokens, "labels": tokens}


def compile_on(
    program: Program, network: Network, factors: Factors, grid: Grid, times: Times
) -> dict[str, Any]:
    """Time the stages that depend on the grid; return a row of the table."""
    cluster = dgx_a100()
    model = timed(
        times, "strategies", lambda: build_model(network, factors, grid, cluster, program.params)
    )
    solution = timed(times, "search", lambda: solve(model.problem))
    plan = timed(
        times,
        "schedule",
        lambda: read_plan(program, network, factors, model, solution, grid, cluster),
    )
    axes = {name: Named(name, n, 0) for name, n in zip(grid.names, grid.sizes, strict=True)}
    first = (0,) * len(grid.sizes)
    timed(times, "codegen", lambda: emit(program, network, plan, first, axes))
    return {
        "ops": len(network.ops),
        "variables": len(model.problem.sizes),
        "width": solution.width,
        "method": solution.method,
        "step_time_s": solution.cost_s,
        "cpu_s": times,
    }


def measure(layers: int) -> list[dict[str, Any]]:
    model, inputs = gpt2(layers)
    shared: Times = {}
    program = timed(shared, "capture", lambda: capture(model, (), inputs, train=True), 1)

    def read() -> tuple[Network, Factors]:
        network = read_network(program)
        return network, infer_factors(network, program.inputs)

    network, factors = timed(shared, "factors", read)
    rows = []
    for sizes in GRIDS:
        found = compile_on(program, network, factors, as_grid(sizes), dict(shared))
        rows.append({"layers": layers, "grid": list(sizes), **found})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    times = row["cpu_s"]
    cells = " ".join(f"{times[s]:10.2f}" for s in STAGES)
    planned = sum(times[s] for s in STAGES[1:])
    grid = "x".join(map(str, row["grid"]))
    return f"{row['layers']:6} {grid:>5} {row['ops']:6} {cells} {planned:13.2f}"


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return, per grid, the time without capture at the most layers over that at half of them."""
    planned = {
        (r["layers"], tuple(r["grid"])): sum(r["cpu_s"][s] for s in STAGES[1:]) for r in rows
    }
    most = max(n for n, _ in planned)
    return {
        "x".join(map(str, g)): planned[most, g] / planned[most // 2, g]
        for g in GRIDS
        if (most // 2, g) in planned
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--all", action="store_true", help="up to 96 layers")
    parser.add_argument("--out", type=Path, default=Path("compile_time.json"))
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    titles = " ".join(f"{s:>10}" for s in STAGES)
    print("CPU-seconds, one thread")
    print(f"layers  grid    ops {titles} {'all but first':>13}")
    measure(1)  # imports and caches are no part of any size
    rows = [
        row for layers in (ALL_LAYERS if chosen.all else chosen.layers) for row in measure(layers)
    ]
    grown = growth(rows)
    print("growth from half the layers:", {g: round(x, 2) for g, x in grown.items()})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"cpu": platform.processor() or platform.machine(), **versions}
    chosen.out.write_text(json.dumps({"machine": machine, "rows": rows, "growth": grown}, indent=1))
    print(f"written to {chosen.out}")


if __name__ == "__main__":
    main()
