"""Every rule proved by arithmetic on generated calls and grids.

    python -m tests.fuzz.rules --examples 100 --seed 0

A call that refutes its rule is made small by hypothesis and printed.
"""

import argparse
import sys
import time
import warnings
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from autotp.passes.check_rule import check_rule
from tests.rules.varied import FIXED, grids, varied


def prove(op, examples, seed=None):
    """Prove the rule of `op` on so many calls; return the counts of calls and strategies.

    Without a seed the calls are always the same.
    """
    counts = Counter()

    @settings(
        max_examples=examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(varied(op), grids())
    def holds(call, grid):
        with warnings.catch_warnings(action="ignore"):
            counts.update(calls=1, strategies=len(check_rule(op, *call, grids=[grid])))

    (holds if seed is None else seeded(seed)(holds))()
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=50, help="calls per op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="ops whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    totals, failed, start = Counter(), 0, time.monotonic()
    for op in (op for op in FIXED if options.only in str(op)):
        try:
            totals += prove(op, options.examples, options.seed) + Counter(ops=1)
        except Exception as error:
            failed += 1
            notes = "\n".join(getattr(error, "__notes__", ()))
            print(f"{op}\n{error}\n{notes}\n", flush=True)
    print(f"{dict(totals)}, {failed} ops failed, {time.monotonic() - start:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
