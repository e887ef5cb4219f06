"""What do gloo's collectives and one CPU thread cost here?

Four ranks on loopback, one thread each. Prints a table of median seconds per collective, group
size and message size, the fitted latency and bandwidth of each, and the compute rates; one JSON.

    OMP_NUM_THREADS=1 python benchmarks/measure_gloo.py [path.json]

Groups of two run as two pairs at once, because that is what a 2x2 grid does. Medians over
interleaved rounds: robust against other work on the machine, not free of it.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from autotp.cost_model.collectives import ROUNDS as STEP_ROUNDS
from autotp.cost_model.collectives import sent_bytes

WORLD = 4
SIZES = [4 * 4**k * 1024 for k in range(7)]  # 4 KiB .. 16 MiB
KINDS = ("all_reduce", "all_gather", "all_to_all", "reduce_scatter")
ROUNDS = 5

Run = Callable[[], object]


def collective(kind: str, size: int, ranks: int, group: dist.ProcessGroup) -> Run:
    """Return a call of `kind` on a whole buffer of `size` bytes of float32."""
    whole, other = torch.ones(size // 4), torch.empty(size // 4)
    piece = torch.ones(size // 4 // ranks)

    def scatter_sum() -> torch.Tensor:
        dist.all_to_all_single(other, whole, group=group)
        return other.view(ranks, -1).sum(0)

    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(other, piece, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "reduce_scatter": scatter_sum,
    }[kind]


def seconds(run: Run, calls: int, barrier: Run) -> float:
    """Return the seconds per call of `calls` calls in a row, all ranks starting together."""
    barrier()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def time_collectives(groups: dict[int, dist.ProcessGroup]) -> list[dict[str, Any]]:
    """Return the median seconds of each collective, group size and message size."""
    cells = [(k, p, s) for k in KINDS for p in groups for s in SIZES]
    times: dict[tuple[str, int, int], list[float]] = {cell: [] for cell in cells}
    for _ in range(ROUNDS):
        for kind, ranks, size in cells:
            run = collective(kind, size, ranks, groups[ranks])
            run()
            calls = max(2, min(20, 2**21 // size))
            times[kind, ranks, size].append(seconds(run, calls, dist.barrier))
    return [
        {"kind": k, "ranks": p, "size_bytes": s, "seconds": statistics.median(t)}
        for (k, p, s), t in times.items()
    ]


def time_compute(barrier: Run) -> dict[str, float]:
    """Return matmul rates, the copy and sum rates of memory, and the cost of a tiny op."""
    out: dict[str, float] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        out[f"matmul_{name}_flops_per_s"] = 2 * 512**3 / best(partial(torch.mm, a, b), 4, barrier)
    big, to, tiny = torch.ones(2**22), torch.empty(2**22), torch.ones(8, requires_grad=True)
    out["copy_bytes_per_s"] = 2 * 2**24 / best(lambda: to.copy_(big), 4, barrier)
    out["sum4_bytes_per_s"] = 2**24 / best(lambda: big.view(4, -1).sum(0), 4, barrier)
    out["tiny_op_s"] = best(lambda: tiny + tiny, 200, barrier)
    return out


def best(run: Run, calls: int, barrier: Run) -> float:
    """Return the median seconds of `run` over interleaved rounds, after one warm call."""
    run()
    return statistics.median(seconds(run, calls, barrier) for _ in range(2 * ROUNDS))


def fit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fit seconds = steps * latency_s + sent / bandwidth per kind, all relative errors alike.

    A ring or pairwise exchange over p ranks takes p - 1 steps, an all-reduce two rounds of them.
    """
    out = []
    for kind in KINDS:
        mine = [r for r in rows if r["kind"] == kind]
        t = np.array([r["seconds"] for r in mine])
        steps = np.array([STEP_ROUNDS[kind] * (r["ranks"] - 1) for r in mine])
        sent = np.array([float(sent_bytes(kind, r["size_bytes"], r["ranks"])) for r in mine])
        terms = np.stack([steps, sent], 1)
        (latency_s, s_per_byte), *_ = np.linalg.lstsq(terms / t[:, None], t / t, rcond=None)
        ratio = terms @ (latency_s, s_per_byte) / t
        out.append(
            {
                "kind": kind,
                "latency_s": float(latency_s),
                "bandwidth_bytes_per_s": float(1 / s_per_byte),
                "worst_ratio": float(np.exp(np.abs(np.log(ratio)).max())),
            }
        )
    return out


def work(rank: int, port: int, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    pairs, everyone = [dist.new_group([0, 1]), dist.new_group([2, 3])], dist.new_group()
    together = time_compute(dist.barrier)
    dist.barrier()
    alone = time_compute(lambda: None) if rank == 0 else {}
    dist.barrier()
    rows = time_collectives({2: pairs[rank // 2], 4: everyone})
    dist.barrier()
    if rank == 0:
        result = {"collectives": rows, "fit": fit(rows), "together": together, "alone": alone}
        report(result, path)
    dist.destroy_process_group()


def report(result: dict[str, Any], path: str) -> None:
    for row in result["collectives"]:
        print(f"{row['kind']:15} p={row['ranks']} {row['size_bytes']:>9} B {row['seconds']:.3e} s")
    for row in result["fit"]:
        line = f"{row['kind']:15} latency {row['latency_s']:.2e} s"
        print(f"{line}  {row['bandwidth_bytes_per_s']:.2e} B/s  worst x{row['worst_ratio']:.2f}")
    for name in result["together"]:
        values = result["together"][name], result["alone"][name]
        print(f"{name:30} 4 ranks {values[0]:.3e}   alone {values[1]:.3e}")
    machine = {"cores": os.cpu_count(), "torch": torch.__version__, "arch": platform.machine()}
    with open(path, "w") as file:
        json.dump({"machine": machine, **result}, file, indent=1)


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_suffix(".json"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start_processes(work, args=(port, path), nprocs=WORLD, start_method="spawn")


if __name__ == "__main__":
    main()
