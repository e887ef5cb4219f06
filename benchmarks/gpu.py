"""What does one GPU reach, and how far is the prediction from one rank's program on it?

Rates: products of every dtype by their narrowest dim, streams, the cost of one op; and the
roofline that they make. Programs: a dry run (`autotp.dryrun`) of one rank of GPT-2 XL and of
Llama-3-8B on (2, 2) and (8, 8), planned for `dgx_h100` and for that cluster with the rates just
measured. Compute and peak memory, predicted and measured; a program that does not fit is named.
Prints tables and writes one JSON. Needs no network and runs unattended; without a GPU it says so
and stops, unless it is asked for `--tiny` sizes on the CPU.

    python benchmarks/gpu.py [--tiny] [--steps 10] [--out gpu.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import autotp
from autotp.cost_model.cluster import Cluster, by_name
from autotp.measure_jobs import CHAIN, Job, compute_jobs
from autotp.zoo import build

REPEATS = 20
BASE = "dgx_h100"
GRIDS = ((2, 2), (8, 8))
PASSES = 3
"""Ops that the chain of tiny ones runs per link: one forward, two backward."""


@dataclass(frozen=True)
class Case:
    """A model, its batch and sequence, and the dtype of its weights."""

    model: str
    batch: int
    seq: int
    dtype: str


CASES = (
    Case("gpt2-xl", 8, 1024, "bfloat16"),
    Case("llama-3-8b", 8, 2048, "bfloat16"),
)
TINY = (Case("gpt2", 8, 32, "float32"), Case("llama-3-8b", 8, 32, "float32"))


# Rates --------------------------------------------------------------------------------------------


def seconds_of(job: Job, device: torch.device, repeats: int) -> float:
    """Return the median seconds of one call of a job."""
    samples = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(job.calls):
            job.run()
        synchronize(device)
        samples.append((time.perf_counter() - start) / job.calls)
    return statistics.median(samples[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_rates(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return flops per second by dtype and narrowest dim, bytes per second, seconds of an op."""
    fast = ("float32",) if tiny else ("float32", "bfloat16", "float16")
    spent: dict[str, dict[int, list[float]]] = {}
    streams: dict[str, float] = {}
    attention: dict[str, float] = {}
    overhead_s = 0.0
    for job in compute_jobs(device, fast):
        seconds = seconds_of(job, device, 3 if tiny else REPEATS)
        match job.key:
            case (str(dtype), (int(m), int(n), int(k)), int()):
                rates = spent.setdefault(dtype, {}).setdefault(min(m, n, k), [])
                rates.append(2 * m * n * k / seconds)
            case ("attention", str(dtype), int(flops)):
                attention[dtype] = flops / seconds
            case (str(stream), int(size_bytes)):
                streams[stream] = size_bytes / seconds  # the last is of the largest buffers
            case _:
                overhead_s = seconds / (CHAIN * PASSES)
    products = {d: {n: statistics.median(r) for n, r in by.items()} for d, by in spent.items()}
    rates = {"products": products, "streams": streams, "attention": attention}
    return {**rates, "op_overhead_s": overhead_s}


def with_rates(cluster: Cluster, rates: dict[str, Any]) -> Cluster:
    """Return a cluster whose ranks compute as measured."""
    ladders = {d: rising(by) for d, by in rates["products"].items()}
    streams = rates["streams"]
    return replace(
        cluster,
        name=f"{cluster.name} with measured rates",
        flops_per_s=tuple((d, ladder[-1][1]) for d, ladder in ladders.items()),
        narrow_flops_per_s=tuple((d, ladder) for d, ladder in ladders.items() if len(ladder) > 1),
        memory_bandwidth_bytes_per_s=2 / (1 / streams["copy"] + 1 / streams["add"]),
        function_bytes_per_s=streams["gelu"],
        attention_flops_per_s=tuple(rates["attention"].items()),
        op_overhead_s=rates["op_overhead_s"],
    )


def rising(by_narrowest: dict[int, float]) -> tuple[tuple[int, float], ...]:
    """Return rates by narrowest dim, none below that of a narrower one."""
    best, out = 0.0, []
    for narrow, rate in sorted(by_narrowest.items()):
        best = max(best, rate)
        out.append((narrow, best))
    return tuple(out)


def print_rates(rates: dict[str, Any], base: Cluster) -> None:
    bandwidth = rates["streams"]["copy"]
    print(f"{'products':<12} {'narrowest':>9} {'TFLOP/s':>10}  of peak, ridge in flops/byte")
    for dtype, by in rates["products"].items():
        for narrow, rate in sorted(by.items()):
            share, ridge = rate / base.matmul_flops_per_s(dtype), rate / bandwidth
            print(f"{dtype:<12} {narrow:>9} {rate / 1e12:>10.3g}  {share:6.1%} {ridge:8.1f}")
    for dtype, rate in rates["attention"].items():
        print(f"attention, {dtype:<11} {rate / 1e12:>10.3g}")
    for stream, rate in rates["streams"].items():
        print(f"{stream:<12} {rate / 1e9:>20.4g} GB/s")
    print(f"{'one op':<12} {rates['op_overhead_s'] * 1e6:>20.3g} us\n")


# Programs -----------------------------------------------------------------------------------------


def programs(
    cases: tuple[Case, ...], clusters: list[Cluster], args: Any
) -> Iterator[dict[str, Any]]:
    """Yield the dry run of every model, grid and cluster: its figures, or why there are none."""
    for case in cases:
        model, inputs = build(case.model, small=args.tiny, batch=case.batch, seq=case.seq)
        model = model.to(getattr(torch, case.dtype))
        for grid in GRIDS:
            for cluster in clusters:
                about = {**vars(case), "grid": list(grid), "cluster": cluster.name}
                try:
                    found = autotp.dryrun(model, grid, inputs, cluster=cluster, steps=args.steps)
                except autotp.AutotpError as error:
                    yield {**about, "refused": str(error)}
                else:
                    yield {**about, **found.to_json()}


def line(row: dict[str, Any]) -> str:
    head = f"{row['model']:<18} {'x'.join(map(str, row['grid'].values())):<5} {row['cluster']:<28}"
    p, m = row["predicted"], row["measured"]
    spent = p["compute_s"], m["compute_s"]
    seconds = f"{spent[0]:10.4g} {spent[1]:10.4g} {spent[0] / spent[1]:6.2f}"
    held, peak = p["memory"]["peak"], m["peak_bytes"]
    memory = f"{held / 1e9:9.4g} {peak / 1e9:9.4g} {held / peak:6.2f}"
    return f"{head} {seconds}  {memory}  {m['flops'] / m['compute_s'] / 1e12:8.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small models, on a CPU if need be")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.tiny):
        print("there is no GPU: skipped (--tiny runs small models on the CPU)")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}\n")
    base, rates = by_name(BASE), measured_rates(device, args.tiny)
    print_rates(rates, base)
    titles = f"{'model':<18} {'grid':<5} {'cluster':<28}"
    print(f"{titles} compute s: predicted, measured   GB: predicted, measured    TFLOP/s")
    rows = []
    for row in programs(TINY if args.tiny else CASES, [base, with_rates(base, rates)], args):
        rows.append(row)
        print(line(row) if "measured" in row else f"{row['model']} {row['grid']} {row['refused']}")
    if args.out:
        about = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
        args.out.write_text(json.dumps({"about": about, "rates": rates, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
