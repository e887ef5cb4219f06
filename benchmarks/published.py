"""Does the model keep the ratios that others have published?

Optimus beside Megatron, weak scaling on 4 to 64 GPUs (`autotp.cost_model.published`): both schemes
are planned on that machine, for a model that grows with the ranks, and set beside the figures: how
far throughput falls from 4 ranks on, and Optimus over Megatron. Ratios only: sizes, network and
batch are assumed (`SIZES`, `rtx_5000_nodes`, one batch for both). Two layers stand for all: they
repeat.

    OMP_NUM_THREADS=1 python benchmarks/published.py [--batch 24] [--out published.json]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shapes import GPT

import autotp
from autotp.cost_model.published import OPTIMUS_WEAK_SCALING, rtx_5000_nodes

SEQ, VOCAB, LAYERS = 512, 1024, 2
SIZES = {4: (2048, 32), 16: (4096, 64), 36: (6120, 72), 64: (8192, 128)}
"""Assumed hidden size and heads by ranks: about 1024 sqrt(ranks), heads that both schemes split."""


def sequences_per_s(scheme: str, ranks: int, batch: int) -> float:
    """Return what a scheme reaches by prediction, on a model that grows with the ranks."""
    q = math.isqrt(ranks)
    with torch.device("meta"):
        model = GPT(*SIZES[ranks], LAYERS, VOCAB, SEQ)
        tokens = torch.zeros(batch, SEQ, dtype=torch.long)
    inputs = {"tokens": tokens, "labels": tokens}
    grid = (1, ranks) if scheme == "megatron" else (q, q)
    pins = getattr(autotp.schemes, scheme)(model, grid, inputs)
    cluster = replace(rtx_5000_nodes(), memory_bytes=math.inf)
    plan = autotp.plan(model, grid, inputs, cluster=cluster, pins=pins)
    return batch / plan.step_time_s


def rows(batch: int) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for published in OPTIMUS_WEAK_SCALING:
        megatron = sequences_per_s("megatron", published.ranks, batch)
        optimus = sequences_per_s("summa_abt", published.ranks, batch)
        out.append(
            {
                "ranks": published.ranks,
                "published": {"megatron": published.megatron, "optimus": published.optimus},
                "predicted": {"megatron": megatron, "optimus": optimus},
            }
        )
    return out


def ratios(found: list[dict[str, Any]], of: str) -> list[tuple[float, float, float]]:
    """Return per row: both schemes over themselves on the fewest ranks, Optimus over Megatron."""
    first = found[0][of]
    return [
        (
            row[of]["megatron"] / first["megatron"],
            row[of]["optimus"] / first["optimus"],
            row[of]["optimus"] / row[of]["megatron"],
        )
        for row in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=48, help="sequences")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = rows(args.batch)
    print("weak scaling: published, predicted")
    print(
        f"{'ranks':>5}  {'Megatron / at 4':>18}  {'Optimus / at 4':>18}  {'Optimus / Megatron':>18}"
    )
    both = zip(found, ratios(found, "published"), ratios(found, "predicted"), strict=True)
    for row, published, predicted in both:
        pairs = zip(published, predicted, strict=True)
        print(f"{row['ranks']:>5}", *(f" {a:>10.2f} {b:>8.2f}" for a, b in pairs))
    if args.out:
        args.out.write_text(json.dumps({"rows": found, "batch": args.batch}, indent=1) + "\n")


if __name__ == "__main__":
    main()
