"""Random legal plans: every op, copy and parameter takes a choice at random among those that meet.

The optimum visits few of the strategies and moves that the compiler may emit; these visit them all.
"""

import random

import numpy as np

from autotp.cost_model.cluster import bandwidth_bound
from autotp.passes.planning import read_plan
from autotp.passes.search import Solution
from autotp.passes.strategies import build_model

TRIES = 100


def random_plan(subject, grid, seed):
    """Return a legal plan of a prepared model, the same for the same seed."""
    cluster = bandwidth_bound()
    program, network, factors = subject.program, subject.network, subject.factors
    model = build_model(network, factors, grid, cluster, program.params)
    choice = random_choice(model.problem, random.Random(seed))
    cost = model.problem.seconds(choice)
    solution = Solution(choice, cost, 0.0, 0.0, 0, "random", 0.0)
    return read_plan(program, network, factors, model, solution, grid, cluster)


def random_choice(problem, rng):
    """Choose variable by variable in graph order, among what is finite beside those chosen."""
    for _ in range(TRIES):
        chosen = []
        for costs in conditioned(problem, chosen):
            finite = np.flatnonzero(np.isfinite(costs))
            if not len(finite):
                break
            chosen.append(int(rng.choice(list(finite))))
        if len(chosen) == len(problem.sizes):
            return tuple(chosen)
    raise AssertionError("no legal plan was met")


def conditioned(problem, chosen):
    """Yield the costs of each next variable, given the variables chosen so far."""
    earlier = {n: [] for n in range(len(problem.sizes))}
    for i, j, table in problem.pairs:
        earlier[max(i, j)].append((min(i, j), table if i < j else table.T))
    for n, alone in enumerate(problem.unary):
        yield alone + sum(table[chosen[i]] for i, table in earlier[n])
