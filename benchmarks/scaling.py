"""How does a training step scale to 1,024 ranks, by prediction, per scheme and for what is picked?

Strong scaling: one global batch on more and more ranks. Weak scaling: as many sequences per rank.
Every scheme of `autotp.schemes`, and what the search finds, on the grid of nodes x ranks per node
of `dgx_h100`; tokens per second and rank, and the share of a step that is compute. What cannot be
planned, or does not fit the memory of a rank, is left empty. Prints tables and writes one JSON.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--all] [--out scaling.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import autotp
from autotp.cost_model.cluster import Cluster, by_name
from autotp.grid import as_grid
from autotp.options import Options
from autotp.passes.planning import search_plan
from autotp.reading import inferred
from autotp.schemes import SCHEMES, pins_of
from autotp.zoo import build

PICK = "what autotp picks"
SEQ = {"gpt2-xl": 1024, "llama-3-8b": 2048}
SHORT = ("batch_x_tensor", "fsdp", PICK)


@dataclass(frozen=True)
class Point:
    """One scheme on so many ranks: a step's seconds, and those of its sending, None if refused."""

    model: str
    scaling: str
    ranks: int
    batch: int
    scheme: str
    step_s: float | None
    sent_s: float | None = None
    memory_bytes: int | None = None
    refused: str = ""


def points(
    name: str, scaling: str, ranks: list[int], per_rank: float, schemes: list[str]
) -> Iterator[Point]:
    """Yield every scheme on every number of ranks; strong scaling keeps the largest's batch."""
    cluster, found = by_name("dgx_h100"), None
    for count in ranks:
        batch = max(1, round(per_rank * (count if scaling == "weak" else max(ranks))))
        if found is None or scaling == "weak":
            model, inputs = build(name, batch=batch, seq=SEQ[name])
            found = inferred(model.to(torch.bfloat16), (), inputs, Options())
        for scheme in schemes:
            yield point(name, scaling, count, batch, scheme, found, cluster)


def point(
    name: str,
    scaling: str,
    ranks: int,
    batch: int,
    scheme: str,
    found: Any,
    cluster: Cluster,
) -> Point:
    inside = min(ranks, cluster.ranks_per_node)
    grid = as_grid((ranks // inside, inside))
    try:
        pins = None if scheme == PICK else pins_of(SCHEMES[scheme], *found, grid)
        plan = search_plan(*found, grid, cluster, pins).plan
    except autotp.AutotpError as error:
        return Point(name, scaling, ranks, batch, scheme, None, refused=error.what)
    sent_s = sum(move.seconds for move in plan.moves)
    step_s, held = plan.step_time_s, plan.memory.total
    return Point(name, scaling, ranks, batch, scheme, step_s, sent_s, held)


def print_table(rows: list[Point], schemes: list[str]) -> None:
    first = rows[0]
    print(f"\n{first.model}, {first.scaling} scaling, tokens per second and rank, compute's share")
    print(f"{'ranks':>6} {'batch':>7}", *(f"{s:>18}" for s in schemes))
    by_ranks = {r.ranks: [x for x in rows if x.ranks == r.ranks] for r in rows}
    for ranks, mine in by_ranks.items():
        print(f"{ranks:>6} {mine[0].batch:>7}", *(f"{cell(p):>18}" for p in mine), flush=True)


def cell(p: Point) -> str:
    if p.step_s is None or p.sent_s is None:
        return "-"
    rate = p.batch * SEQ[p.model] / p.step_s / p.ranks
    return f"{rate:,.0f} {1 - p.sent_s / p.step_s:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="both models, all schemes and ranks")
    parser.add_argument("--models", nargs="+", choices=SEQ, default=["llama-3-8b"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 1024])
    parser.add_argument("--per-rank", type=float, default=1.0, help="sequences")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    models = list(SEQ) if args.all else args.models
    ranks = [8, 16, 32, 64, 128, 256, 512, 1024] if args.all else args.ranks
    schemes = [*SCHEMES, PICK] if args.all else list(SHORT)
    rows = []
    for name in models:
        for scaling in ("strong", "weak"):
            mine = list(points(name, scaling, ranks, args.per_rank, schemes))
            print_table(mine, schemes)
            rows += mine
    if args.out:
        about = {"torch": torch.__version__, "cluster": "dgx_h100", "dtype": "bfloat16"}
        body = {"about": about, "points": [asdict(p) for p in rows]}
        args.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
