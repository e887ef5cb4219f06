"""Random programs on random grids, under random legal plans and the best one, beside the original.

    python -m tests.fuzz.programs --count 2000 --seed 0
    python -m tests.fuzz.programs --count 2000 --seed 0 --hiding

A case is one plan of one program on one grid: its loss or outputs, all gradients and one SGD step
must be the unsharded program's. What fails is made as small as it goes on failing, and printed.
With --hiding plans are for clusters that hide a part of what they send; ranks then begin and end
moves as real ones may, half of the steps add to gradients of a backward before, and what each
schedule was met in is counted (`tests.fuzz.schedules`).
"""

import argparse
import math
import random
import sys
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from autotp.check import between, prepare, take_step, type_problems
from autotp.errors import AutotpError, BudgetError
from autotp.grid import as_grid
from tests.fuzz.grow import grow
from tests.fuzz.schedules import awaited, bytes_problem, met, twice
from tests.random_plans import Plans

GRIDS = ((2,), (3,), (4,), (2, 2), (2, 2), (2, 3), (3, 2), (2, 4), (2, 1, 2), (2, 2, 2))
IN_NODES = ((2,), (2,), (3,), (4,), (4,), (2, 2), (2, 2), (2, 2), (2, 3), (2, 4))
"""Grids of plans that hide: some have an axis of two levels."""
PLANS = 4
"""Random plans per program, beside the best one."""
CLOSE = 1e-8
"""In float64 a bug is larger, rounding smaller."""
BEST = -1


@dataclass(frozen=True, slots=True)
class Case:
    """A program, a grid, and the seed of a plan or BEST; `way` is the method of Plans."""

    program: object
    grid: tuple
    seed: int
    way: str = "random"

    @property
    def call(self):
        """The plan, as it is asked for."""
        return "best()" if self.seed == BEST else f"{self.way}({self.seed})"

    def plan(self, plans):
        return plans.best() if self.seed == BEST else getattr(plans, self.way)(self.seed)


@dataclass(frozen=True, slots=True)
class Failure:
    """A case with what is wrong, and the plan in words."""

    case: Case
    kind: str
    fact: str
    plan: str = ""

    def __str__(self):
        c = self.case
        return "\n".join(
            [
                f"{self.kind}: {self.fact}",
                "",
                str(c.program),
                "",
                f"plans = Plans(prepare(model, (), inputs), as_grid({c.grid}), detours=True)",
                f"plan = plans.{c.call}",
                self.plan,
            ]
        )


def cases_of(seed):
    """Yield the cases of one seed, all of one program on one grid."""
    rng = random.Random(seed)
    program, grid = grow(seed), rng.choice(GRIDS)
    for plan in (BEST, *range(PLANS)):
        yield Case(program, grid, plan)


def hiding_cases_of(seed):
    """Yield the cases of one seed whose clusters hide: of layouts at random, and of those found."""
    program, grid = grow(seed), random.Random(seed).choice(IN_NODES)
    for k in range(PLANS):
        yield Case(program, grid, PLANS * seed + k, "hiding")
    for k in range(2):
        yield Case(program, grid, 2 * seed + k, "found")


def failure_of(cases, seen=None):
    """Return the first failure of cases that share a program and a grid, and how many ran.

    The schedules that their plans have are counted in `seen`.
    """
    count = 0
    first, *_ = cases
    try:
        model, inputs = first.program.build()
        model(**inputs)
    except Exception as error:
        return None, count, f"no program: {said(error)}"
    try:
        subject = prepare(model, (), inputs)
    except AutotpError as error:  # a refusal is no failure
        return None, count, error.what
    except Exception as error:
        return Failure(first, "capture", said(error)), count, ""
    wrong = [d for d in subject.captured if d.relative(subject.tolerance) > CLOSE]
    if wrong:
        return Failure(first, "capture", f"{wrong[0].kind} {wrong[0].name} differs"), count, ""
    plans = Plans(subject, as_grid(first.grid), detours=True)
    for case in cases:
        count += 1
        found = plan_failure(subject, plans, case, seen)
        if found:
            return found, count, ""
    return None, count, ""


def plan_failure(subject, plans, case, seen=None):
    """Return what is wrong with one plan of a prepared program, or None."""
    plan = None
    hides = case.way != "random"
    try:
        plan = case.plan(plans)
        with awaited() if hides else nullcontext():
            again = hides and case.seed % 4 > 1
            run = twice(subject, plan) if again else take_step(subject, plan)
        problems = type_problems(subject, plan, run)
    except BudgetError:  # a refusal is no failure
        return None
    except Exception as error:
        return Failure(case, "raised", said(error), str(plan))
    if problems:
        return Failure(case, "types", problems[0], str(plan))
    if hides and not again and (problem := bytes_problem(plan, run)):
        return Failure(case, "bytes", problem, str(plan))
    if seen is not None:
        seen.update(met(plan))
    for d in between(subject, plan, run):
        off = replace(d, jitter=subject.jitter[d.kind, d.name]).relative(subject.tolerance)
        if off > CLOSE and not (again and d.kind == "parameter"):
            return Failure(case, "differs", f"{d.kind} {d.name} by {off:.1e}", str(plan))
    return None


def said(error):
    return f"{type(error).__name__}: {str(error)[:400]}"


# Smaller -----------------------------------------------------------------------------------------


def shrink(failure, tries=4, budget_s=120):
    """Return the smallest failure found: of fewer lines, outputs and ranks, of the same kind.

    `budget_s` are seconds of this process.
    """
    until = time.process_time() + budget_s
    while time.process_time() < until:
        smaller = (
            found
            for program, grid in reductions(failure.case)
            if time.process_time() < until
            and extent(program, grid) < extent(failure.case.program, failure.case.grid)
            and (found := fails_alike(failure, program, grid, tries))
        )
        following = next(smaller, None)
        if following is None:
            break
        failure = following
    return failure


def extent(program, grid):
    """Return what a reduction must lessen."""
    return len(program.lines), len(program.outputs), math.prod(grid), len(str(program))


def fails_alike(failure, program, grid, tries):
    """Return the failure of a smaller case under some plan, if it is of the same kind."""
    if failure.kind == "capture":  # no grid and no plan has a part in it
        grid, tries = (1,), 0
    cases = [replace(failure.case, program=program, grid=grid)]
    if failure.case.way == "random":
        cases = [Case(program, grid, seed) for seed in (BEST, *range(tries))]
    try:
        found, _, _ = failure_of(cases)
    except Exception:  # no program any more
        return None
    return found if found and found.kind == failure.kind else None


def reductions(case):
    """Yield smaller programs and grids, the boldest first."""
    program, grid = case.program, case.grid
    for k in range(len(grid)):
        if len(grid) > 1:
            yield program, grid[:k] + grid[k + 1 :]
    for output in program.outputs:
        yield replace(program, outputs=(output,)).live(), grid
    for line in program.lines:
        for name in line.makes:
            yield replace(program, outputs=(name,)).live(), grid
    for name in program.outputs if len(program.outputs) > 1 else ():
        rest = tuple(o for o in program.outputs if o != name)
        yield replace(program, outputs=rest).live(), grid
    for line in program.lines:
        yield from ((cut, grid) for cut in program.without(line))
    for k, size in enumerate(grid):
        if size > 2:
            yield program, (*grid[:k], size - 1, *grid[k + 1 :])


# All ---------------------------------------------------------------------------------------------


def run(seeds, until=float("inf"), cases_of=cases_of):
    """Run the cases of these seeds; return the failures, and counts of what was done."""
    counts, failures = Counter(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in seeds:
            if time.monotonic() > until:
                break
            found, count, refused = failure_of(list(cases_of(seed)), counts)
            counts.update(programs=1, cases=count)
            counts.update({f"refused: {refused}": 1} if refused else {})
            if found:
                failures.append((seed, found))
    return failures, counts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="programs")
    parser.add_argument("--seed", type=int, default=0, help="the first program's seed")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    parser.add_argument("--hiding", action="store_true", help="for clusters that hide messages")
    options = parser.parse_args()
    torch.set_num_threads(1)
    totals, failed = Counter(), 0
    cases = hiding_cases_of if options.hiding else cases_of
    for seed in range(options.seed, options.seed + options.count):
        failures, counts = run([seed], cases_of=cases)
        totals += counts
        for _, failure in failures:
            failed += 1
            with warnings.catch_warnings(action="ignore"):
                print(f"seed {seed}\n{shrink(failure)}\n", flush=True)
        if failed and not options.keep_going:
            break
        if totals["programs"] % 100 == 0:
            print(f"seed {seed}: {dict(totals)}, {failed} failures", flush=True)
    print(f"{dict(totals)}, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
