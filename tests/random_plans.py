"""Random legal plans: every op, copy and parameter takes a choice at random among those that meet.

So does every collective among its algorithms. The optimum visits few of the strategies and moves
that the compiler may emit; these visit them all.
"""

import random
from dataclasses import replace
from unittest import mock

import numpy as np

from autotp.cost_model.cluster import bandwidth_bound
from autotp.cost_model.collectives import algorithms
from autotp.passes import strategies
from autotp.passes.moves import Moves
from autotp.passes.planning import read_plan
from autotp.passes.products import ONCE
from autotp.passes.search.solve import Solution, solve
from autotp.passes.strategies import build_model

TRIES = 100


class AnyAlgorithm(Moves):
    """Moves whose collectives take any algorithm, the same for the same move."""

    def algorithm(self, kind, size_bytes, axis):
        rng = random.Random(f"{kind} {size_bytes} {axis}")
        return rng.choice(("", *algorithms(kind, self.grid.sizes[axis])))


class DetourMoves(AnyAlgorithm):
    """Moves whose prices are arbitrary, so that the ways between layouts are as well."""

    def _edge_s(self, layout, axis, after, *_):
        return random.Random(f"{layout} {axis} {after}").uniform(0.1, 1)


class Plans:
    """The plans of a prepared model on one grid: random ones by seed, the best, or a given one."""

    def __init__(self, subject, grid, *, detours=False):
        self.subject, self.grid = subject, grid
        self.cluster = bandwidth_bound(1e9, latency_s=1e-6, flops_per_s=1e9)  # small buckets
        with mock.patch.object(strategies, "Moves", DetourMoves if detours else AnyAlgorithm):
            self.model = build_model(
                subject.network, subject.factors, grid, self.cluster, subject.program.params
            )

    def random(self, seed, backward=None):
        """Return a legal plan, the same for the same seed; `backward` pins what it makes again."""
        choice = random_choice(self.model.problem, random.Random(seed))
        wanted = any_schedule if seed % 3 == 2 else None
        return self.of(choice, seed % 2 / 2, backward, wanted)

    def best(self):
        """Return the cheapest plan."""
        return self.of(solve(self.model.problem).choice)

    def of(self, choice, overlap=0.0, backward=None, wanted=None):
        """Return the plan in which every variable takes the numbered choice."""
        moves = replace(self.model.moves, cluster=replace(self.cluster, overlap=overlap))
        model = replace(self.model, moves=moves)
        cost = self.model.problem.seconds(choice)
        solution = Solution(choice, cost, 0.0, 0.0, 0, "random", 0.0)
        program, network, factors = (
            self.subject.program,
            self.subject.network,
            self.subject.factors,
        )
        found = program, network, factors, model, solution
        return read_plan(*found, self.grid, self.cluster, backward, wanted)


def any_schedule(name, axis, legal):
    """Ask for any legal schedule of a product, the same for the same one."""
    return random.Random(f"{name} {axis}").choice((ONCE, *legal))


def random_plan(subject, grid, seed):
    """Return a legal plan of a prepared model, the same for the same seed."""
    return Plans(subject, grid).random(seed)


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
