"""Random legal plans: every op, copy and parameter takes a choice at random among those that meet.

So does every collective among its algorithms. The optimum visits few of the strategies and moves
that the compiler may emit; these visit them all. Their moves are scheduled for a cluster that hides
nothing, or half; those of `Plans.hiding` and `Plans.found` for random clusters, whose plans begin
moves early, make rings, run over two levels, and make again what a budget leaves no room for.
"""

import random
from dataclasses import replace
from unittest import mock

import numpy as np

from autotp.cost_model.cluster import Link, bandwidth_bound
from autotp.cost_model.collectives import algorithms
from autotp.passes import strategies
from autotp.passes.moves import Moves
from autotp.passes.planning import read_plan, search_plan
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


def any_cluster(seed):
    """Return a cluster that hides a part of what it sends: slow links or fast, small nodes."""
    rng = random.Random(seed)
    link = Link(rng.choice((0.0, 1e-7, 2e-6)), rng.choice((1e8, 1e9, 1e10)))
    slower = rng.choice((1, 4, 20))
    inter = Link(link.latency_s * slower, link.bandwidth_bytes_per_s / slower)
    return replace(
        bandwidth_bound(flops_per_s=rng.choice((1e8, 1e9, 1e10))),
        intra=link,
        inter=inter,
        ranks_per_node=rng.choice((2, 2, 4, 64)),
        overlap=rng.uniform(0.3, 0.95),
        op_overhead_s=rng.choice((0.0, 1e-9)),
        memory_bandwidth_bytes_per_s=rng.choice((1e10, 1e12)),
    )


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

    def hiding(self, seed):
        """Return a legal plan for a random cluster: random layouts, moves by price or as drawn."""
        rng = random.Random(f"hiding {seed}")
        choice = random_choice(self.model.problem, rng)
        wanted = any_schedule if rng.random() < 0.3 else None
        backward = {f"{n[:-1]}?": "again" for n in self._names() if rng.random() < 0.3}
        moves = self.model.moves
        moves = type(moves)(self.grid, any_cluster(seed), moves.shared_bytes)
        given = choice, moves, backward if rng.random() < 0.4 else None, wanted
        plan = self._read(*given)
        if rng.random() < 0.4:
            plan = self._read(*given, limit=plan.memory.total * rng.uniform(0.6, 1))
        return plan

    def found(self, seed):
        """Return the plan that the search finds for a random cluster, of an odd seed in a budget.

        Raises BudgetError where it finds none in that.
        """
        cluster = any_cluster(seed)
        plan = search_plan(*self._parts, self.grid, cluster).plan
        if seed % 2:
            share = random.Random(seed).uniform(0.6, 1)
            less = replace(cluster, memory_bytes=int(plan.memory.total * share))
            plan = search_plan(*self._parts, self.grid, less).plan
            assert plan.memory.total <= less.memory_bytes, f"over its budget: {plan.memory}"
        assert plan.lower_bound_s <= plan.step_time_s * (1 + 1e-9), "faster than its bound"
        return plan

    def best(self):
        """Return the cheapest plan."""
        return self.of(solve(self.model.problem).choice)

    def of(self, choice, overlap=0.0, backward=None, wanted=None):
        """Return the plan in which every variable takes the numbered choice."""
        moves = replace(self.model.moves, cluster=replace(self.cluster, overlap=overlap))
        return self._read(choice, moves, backward, wanted)

    def _read(self, choice, moves, backward, wanted, limit=float("inf")):
        model = replace(self.model, moves=moves)
        cost = self.model.problem.seconds(choice)
        solution = Solution(choice, cost, 0.0, 0.0, 0, "random", 0.0)
        less = replace(moves.cluster, memory_bytes=limit)
        return read_plan(*self._parts, model, solution, self.grid, less, backward, wanted)

    @property
    def _parts(self):
        return self.subject.program, self.subject.network, self.subject.factors

    def _names(self):
        """Return what pins of backward may name."""
        program, network, _ = self._parts
        return [*(program.names[op.name] for op in network.ops), *program.params.values()]


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
