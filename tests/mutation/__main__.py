"""Damage one thing at a time, and see that the proofs notice.

    python -m tests.mutation [--only NAME]

    rule      a row of the table: a `+` dropped, a factor unbracketed or two swapped, a fact changed
    custom    a user's rule with a wrong sentence
    move      a collective: its forward or its backward replaced by another of the same shapes
    codegen   a step of the code generation left out
    program   a local program: one of its sums over ranks left out
    routing   exchanges of rows: lookups in split tables, experts
    ring      attention with its sequence split
    random    programs that draw, and the seeds of their sites
    gradient  what makes the gradients of parameters complete, once

A mutant that nothing notices is equivalent where tests/mutation/equivalents.py says why, else it
has survived: the exit status says whether any has.
"""

import argparse
import sys
import time
from collections import Counter

import torch

from tests.mutation.mutants import KINDS, mutants, verdict


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose kind and name contain this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scores, seconds = Counter(), Counter()
    for mutant in mutants(options.only):
        start = time.perf_counter()
        said = verdict(mutant)
        scores[mutant.kind, said] += 1
        seconds[mutant.kind] += time.perf_counter() - start
        if said != "killed":
            print(said, mutant.kind, mutant.name, flush=True)
    print(f"\n{'':10}{'killed':>10}{'equivalent':>12}{'SURVIVED':>10}{'seconds':>10}")
    for kind in KINDS:
        killed, same, alive = (scores[kind, s] for s in ("killed", "equivalent", "SURVIVED"))
        print(f"{kind:10}{killed:10}{same:12}{alive:10}{seconds[kind]:10.0f}")
    sys.exit(any(scores[kind, "SURVIVED"] for kind in KINDS))


if __name__ == "__main__":
    main()
