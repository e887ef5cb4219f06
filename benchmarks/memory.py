"""How much does one rank hold at once: the plan's count beside the tensors that live?

For every shape and scheme (`autotp.schemes`), and for what the search picks, rank 0's program runs
alone, as `autotp dryrun` runs it: two steps, the second watched. Its peak counts parameters, the
optimizer's states and every tensor that lives between operators; what an operator takes inside
while it runs is not seen. A scheme has its own grid of four ranks (`variants.GRIDS`), the pick 2x2,
once more in a share of the memory that it would take (`variants.SHARE`).

The last figures are activations: the peak without parameters and the optimizer's states, and that
over the same of `megatron`, which is 1D. Prints one line each, and per shape the median error.
Writes one JSON.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--all] [--out memory.json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from shapes import SHAPES
from variants import GRIDS, SHARE, SQUARE_GRID

import autotp
from autotp.cost_model.cluster import gloo_loopback
from autotp.grid import Coords, as_grid
from autotp.notation import memory_text
from autotp.options import Options
from autotp.passes.planning import search_plan
from autotp.rank_program import alone, peak
from autotp.reading import inferred
from autotp.schemes import SCHEMES, pins_of
from autotp.silent_axis import CopyClock, silent_axes

PICK, LESS = "what autotp picks", f"picked in {SHARE:.0%}"
ROWS = [*SCHEMES, PICK, LESS]
SHORT = ("weight-heavy", "balanced", "wide MLP")
ONE_D = "megatron"
ORIGIN: Coords = (0, 0)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """The bytes of one scheme on one shape; `activations` are measured, gradients among them."""

    shape: str
    scheme: str
    grid: str
    predicted: int
    measured: int
    activations: int
    by_kind: str

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def rows_of(shape: str, schemes: list[str]) -> Iterator[Row]:
    model, inputs = SHAPES[shape].build()
    found = inferred(model.train(), (), inputs, Options())
    cluster = replace(gloo_loopback(), memory_bytes=math.inf)
    values = found[0].flatten_inputs((), inputs)
    for scheme in schemes:
        grid = as_grid(GRIDS.get(scheme, SQUARE_GRID))
        try:
            pins = pins_of(SCHEMES[scheme], *found, grid) if scheme in SCHEMES else None
            plan = search_plan(*found, grid, cluster, pins).plan
            if scheme == LESS:
                less = replace(cluster, memory_bytes=SHARE * plan.memory.total)
                plan = search_plan(*found, grid, less).plan
        except autotp.AutotpError as error:
            print(f"{shape:<17} {scheme:<18} refused: {error.what}")
            continue
        axes = silent_axes(grid, ORIGIN, CopyClock(CPU))
        rank = alone(found, plan, ORIGIN, axes, dict(model.named_buffers()), values, CPU)
        rank.step()
        in_all, _ = peak(rank)
        held, activations = in_all - sum(x.nbytes for x in values), in_all - rank.at_rest
        by_kind = memory_text(plan.memory)
        yield Row(shape, scheme, str(grid), plan.memory.at_once, held, activations, by_kind)


def line(row: Row) -> str:
    both = f"{row.predicted / 1e6:9.1f} {row.measured / 1e6:9.1f}"
    kept = f"{row.activations / 1e6:9.1f}"
    name = f"{row.shape:<17} {row.scheme:<18} {row.grid}"
    return f"{name} {both} {row.error:+7.1%} {kept}   {row.by_kind}"


def over_one_d(rows: list[Row]) -> str:
    """Say each scheme's activations over those of 1D on the same ranks, where that was run."""
    base = next((row.activations for row in rows if row.scheme == ONE_D), 0)
    if not base:
        return ""
    ratios = (f"{row.scheme} {row.activations / base:.2f}" for row in rows)
    return f"activations over {ONE_D}'s: {', '.join(ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="all shapes, not three")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHORT)
    parser.add_argument("--schemes", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    print(f"{'MB of rank 0':<40} predicted  measured   error  activations   all by kind")
    for shape in [s for s in SHAPES if s != "tiny"] if args.all else args.shapes:
        mine = []
        for row in rows_of(shape, list(args.schemes)):
            print(line(row), flush=True)
            mine.append(row)
        median = statistics.median(abs(r.error) for r in mine)
        print(f"{shape:<17} median error {median:.1%}  {over_one_d(mine)}\n")
        rows += mine
    print(f"median error of all {statistics.median(abs(r.error) for r in rows):.1%}")
    if args.out:
        about = {"torch": torch.__version__, "pick_on": SQUARE_GRID}
        body = {"about": about, "rows": [asdict(r) for r in rows]}
        args.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
