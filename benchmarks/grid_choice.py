"""How long does it take to choose a grid, and which is chosen?

Prices every grid of a number of ranks for a model of full size on the meta device, from the start
of the process. Prints the seconds of each stage and the table of grids, and writes one JSON. CPU
seconds are those of this process and of the processes that it shares the grids out to.
`--ways` prices the grids again one after another, and on threads.

    OMP_NUM_THREADS=1 python benchmarks/grid_choice.py [MODEL] [--all] [--ranks 16] [--ways]
"""

from __future__ import annotations

import time

START_S = time.perf_counter()

import argparse  # noqa: E402 - the time that imports take counts
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
from collections.abc import Callable  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TypeVar  # noqa: E402

import torch  # noqa: E402

from autotp.cost_model.cluster import CLUSTERS, by_name  # noqa: E402
from autotp.grid_table import Grids  # noqa: E402
from autotp.options import Options  # noqa: E402
from autotp.passes.grids import factorisations, price_grids  # noqa: E402
from autotp.passes.planning import search_plan  # noqa: E402
from autotp.reading import inferred  # noqa: E402
from autotp.zoo import ZOO, build  # noqa: E402

TARGET_S = 30.0

T = TypeVar("T")
Stages = dict[str, dict[str, float]]


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def timed(stages: Stages, name: str, run: Callable[[], T], since: tuple[float, float]) -> T:
    """Note the seconds since a wall clock and a CPU clock stood so, after `run`."""
    wall, cpu = since
    result = run()
    stages[name] = {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_s() - cpu}
    print(f"{name:<28} {stages[name]['wall_s']:8.2f} {stages[name]['cpu_s']:8.2f}", flush=True)
    return result


def now() -> tuple[float, float]:
    return time.perf_counter(), cpu_s()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="llama-3-8b", choices=sorted(ZOO))
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--all", action="store_true", help="1,024 ranks")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--cluster", default="dgx_h100", choices=sorted(CLUSTERS))
    parser.add_argument("--ways", action="store_true", help="also one after another, and threads")
    parser.add_argument("--out", type=Path, default=Path("grid_choice.json"))
    args = parser.parse_args()
    args.ranks = 1024 if args.all else args.ranks
    stages: Stages = {}
    print(f"{'':28} {'wall s':>8} {'CPU s':>8}")
    timed(stages, "imports", lambda: None, (START_S, 0.0))
    model, inputs = timed(
        stages, "build", lambda: build(args.model, batch=args.batch, seq=args.seq), now()
    )
    read = timed(stages, "capture and read", lambda: inferred(model, (), inputs, Options()), now())
    cluster = by_name(args.cluster)
    found: Grids = timed(
        stages, "price the grids", lambda: price_grids(*read, args.ranks, cluster), now()
    )
    timed(stages, "all", lambda: None, (START_S, 0.0))
    print(f"target: {TARGET_S:.0f} s in all on two idle cores")
    if args.ways:
        grids = factorisations(args.ranks)

        def plan(grid: object) -> float:
            return search_plan(*read, grid, cluster, quick="best").plan.step_time_s

        timed(stages, "one after another", lambda: [plan(grid) for grid in grids], now())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            timed(stages, "on threads", lambda: list(pool.map(plan, grids)), now())
    print(f"\n{found}")
    rows = [
        {
            "grid": list(row.grid.sizes),
            "places": row.places,
            "splits": row.splits,
            "step_time_s": row.step_time_s,
            "lower_bound_s": row.lower_bound_s,
            "comm_bytes": float(row.comm_bytes),
            "memory_bytes": row.memory_bytes,
        }
        for row in found
    ]
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
    }
    given = {k: str(v) for k, v in vars(args).items()}
    args.out.write_text(
        json.dumps({"machine": machine, "given": given, "stages": stages, "rows": rows}, indent=1)
    )
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
