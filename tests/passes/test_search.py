"""The search against brute force and HiGHS, and how often it computes a repeated layer."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autotp.errors import BudgetError
from autotp.passes.search import elimination
from autotp.passes.search.dominance import contenders, factors_of, reduce_to_core, undominated
from autotp.passes.search.elimination import back_substitute, plan_elimination, run
from autotp.passes.search.ilp import solve_ilp
from autotp.passes.search.solve import Problem, Solver, solve


def random_problem(seed, variables=6, choices=4, density=0.5, unreachable=0.15):
    r = np.random.default_rng(seed)
    sizes = tuple(int(n) for n in r.integers(1, choices + 1, variables))
    ends = [p for p in itertools.permutations(range(variables), 2) if r.random() < density / 2]
    tables = [r.random((sizes[i], sizes[j])) for i, j in ends]
    for t in tables:
        t[r.random(t.shape) < unreachable] = np.inf
    pairs = tuple((i, j, t) for (i, j), t in zip(ends, tables, strict=True))
    memory = tuple(r.integers(0, 10, n).astype(float) for n in sizes)
    return Problem(sizes, tuple(r.random(n) for n in sizes), pairs, memory)


def brute_force(problem, budget=np.inf):
    every = itertools.product(*(range(n) for n in problem.sizes))
    costs = (problem.seconds(c) for c in every if problem.bytes(c) <= budget)
    return min(costs, default=np.inf)


def layered(layers, choices=36, seed=0):
    """Return `layers` equal layers: a residual stream with two branches, ops and parameters."""
    r = np.random.default_rng(seed)
    moves = [r.random((choices, choices)) for _ in range(8)]
    alone = [r.random(choices) for _ in range(4)]
    held = [r.integers(0, 100, choices).astype(float) for _ in range(4)]
    unary, memory, pairs, stream = [alone[0]], [held[0]], [], 0

    def add(kind, *origins):
        unary.append(alone[kind])
        memory.append(held[kind])
        pairs.extend((o, len(unary) - 1, moves[m]) for o, m in origins)
        return len(unary) - 1

    for _ in range(layers):
        for _ in range(2):
            norm = add(1, (stream, 0), (add(0), 1))
            q, k = (add(2, (norm, 2), (add(3), 3)) for _ in range(2))
            mix = add(1, (q, 4), (k, 4))
            for _ in range(20):
                mix = add(1, (mix, 5), (add(3), 6))
            stream = add(0, (mix, 5), (stream, 7))
    sizes = tuple(len(u) for u in unary)
    return Problem(sizes, tuple(unary), tuple(pairs), tuple(memory))


def operations(problem):
    factors, tables = factors_of(problem)
    plan = plan_elimination(problem.sizes, factors, [t.shape for t in tables], 2**24)
    assert plan.exact
    return plan


@pytest.mark.parametrize("seed", range(300))
def test_equals_brute_force(seed):
    problem = random_problem(seed, density=0.2 + 0.8 * (seed % 5) / 4)
    solution = solve(problem)
    assert solution.cost_s == pytest.approx(brute_force(problem), rel=1e-12)
    assert solution.lower_bound_s == solution.cost_s and solution.method == "elimination"
    if np.isfinite(solution.cost_s):
        assert problem.seconds(solution.choice) == solution.cost_s


@pytest.mark.parametrize("seed", range(20))
def test_first_choices_that_cost_least_are_taken_as_the_elimination_takes_them(seed):
    problem = random_problem(seed)
    for table in (*problem.unary, *(t for _, _, t in problem.pairs)):
        table.flat[0] = table.min()
    factors, leaves = factors_of(problem)
    plan = plan_elimination(problem.sizes, factors, [t.shape for t in leaves], 2**24)
    solution = solve(problem)
    assert solution.choice == back_substitute(plan, run(plan, leaves), len(problem.sizes))
    assert solution.lower_bound_s == solution.cost_s == problem.seconds(solution.choice)


@pytest.mark.parametrize(
    "shapes",
    [
        [(40,)],
        [(40, 130)],
        [(40, 1, 7), (40, 130, 1)],
        [(17, 1, 1), (17, 130, 1), (17, 1, 7), (17, 130, 7)],
        [
            (33, 1, 1, 1),
            (33, 5, 1, 1),
            (33, 1, 66, 1),
            (33, 5, 66, 1),
            (33, 5, 1, 3),
            (33, 1, 1, 3),
        ],
        [(20, 70, 9), (20, 1, 9), (20, 70, 1)],
    ],
)
def test_a_minimum_in_parts_is_that_of_the_whole_sum(shapes, monkeypatch):
    r = np.random.default_rng(0)
    views = [r.random(shape) for shape in shapes]
    views = [np.where(r.random(view.shape) < 0.1, np.inf, view) for view in views]
    whole = elimination._sum(views).min(axis=0)
    monkeypatch.setattr(elimination, "BLOCK", 0)
    assert np.array_equal(elimination._minimum(views, whole.size * len(views[0])), whole)


@pytest.mark.parametrize("seed", range(60))
def test_equals_brute_force_when_tables_must_stay_small(seed):
    problem = random_problem(seed, density=0.9, unreachable=0.1 * (seed % 2))
    solution, least = solve(problem, max_table=6), brute_force(problem)
    assert solution.cost_s == pytest.approx(least, rel=1e-9)
    assert solution.lower_bound_s == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_the_core_has_the_same_minimum(seed):
    problem = random_problem(seed, variables=7, density=0.8)
    core = reduce_to_core(problem)
    small, kept = undominated(core.problem)
    best = solve(small)
    choice = core.lift([k[c] for k, c in zip(kept, best.choice, strict=True)])
    assert problem.seconds(choice) == pytest.approx(brute_force(problem), rel=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_contenders_have_the_same_minimum_by_the_same_choice(seed):
    problem = random_problem(seed, variables=7, choices=6)
    problem = replace(problem, pairs=tuple((i, j, t / 16) for i, j, t in problem.pairs))
    small, kept = contenders(problem)
    best, plain = solve(small), solve(problem)
    assert best.cost_s == plain.cost_s
    if np.isfinite(plain.cost_s):
        assert tuple(k[c] for k, c in zip(kept, best.choice, strict=True)) == plain.choice


def test_a_choice_that_may_win_or_tie_is_a_contender():
    unary = (np.array([1.0, 1.0, 1.2, 1.6]), np.zeros(2))
    pairs = ((0, 1, np.array([[0.0, 0.5], [0.0, 0.5], [0.4, 0.2], [0.0, 0.0]])),)
    _, kept = contenders(Problem((4, 2), unary, pairs))
    assert kept[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(6))
def test_equals_highs(seed):
    problem = random_problem(seed, variables=25, choices=8, density=0.12, unreachable=0.05)
    answer = solve_ilp(problem)
    assert solve(problem).cost_s == pytest.approx(answer.lower_bound_s, rel=1e-6)


@pytest.mark.parametrize("seed", range(80))
def test_budget_equals_brute_force(seed):
    problem = random_problem(seed, unreachable=0.1 * (seed % 2))
    free = solve(problem)
    if not np.isfinite(free.cost_s):
        return
    budget = 0.75 * free.memory_bytes
    if (least := brute_force(problem, budget)) == np.inf:
        with pytest.raises(BudgetError):
            solve(problem, budget)
        return
    solution = solve(problem, budget)
    assert solution.memory_bytes <= budget
    assert solution.cost_s == pytest.approx(least, rel=1e-9)
    assert solution.lower_bound_s == pytest.approx(least, rel=1e-6)


def test_budget_that_cannot_be_met_says_which_can():
    problem = random_problem(3, unreachable=0)
    least = sum(m.min() for m in problem.memory)
    assert solve(problem, least).memory_bytes == least
    with pytest.raises(BudgetError, match=f"at least {int(least)} bytes"):
        solve(problem, least - 1)


def test_repeated_layers_are_computed_once():
    one, many, more = (operations(layered(n)) for n in (2, 48, 96))
    assert many.width == more.width == 2
    assert len(many.steps) < len(one.steps) + 40 < 120
    assert len(more.steps) <= len(many.steps) + 6
    assert more.work < 2 * many.work
    assert len(more.buckets) == len(layered(96).sizes) > 9_000


def test_near_is_as_near_as_asked():
    lost = []
    for seed in range(40):
        problem = random_problem(seed, unreachable=0)
        budget = 0.75 * solve(problem).memory_bytes
        if (least := brute_force(problem, budget)) < np.inf:
            near_s = 0.2 * least
            found = Solver(problem).solve(budget, near_s)
            assert found.memory_bytes <= budget
            assert found.lower_bound_s <= least * (1 + 1e-9)
            assert least * (1 - 1e-9) <= found.cost_s <= found.lower_bound_s + near_s
            lost.append(found.cost_s > least * (1 + 1e-6))
    assert any(lost) and not all(lost)


def test_budget_over_repeated_layers_is_nearly_closed():
    problem = layered(12, choices=12)
    free = solve(problem)
    solution = solve(problem, 0.8 * free.memory_bytes)
    assert solution.memory_bytes <= 0.8 * free.memory_bytes
    assert 0 <= solution.cost_s - solution.lower_bound_s < 0.01 * solution.cost_s


def test_of_equal_choices_the_lowest_is_taken():
    zero, pair = np.zeros(5), np.zeros((5, 5))
    pairs = tuple((i, i + 1, pair) for i in range(9))
    assert solve(Problem((5,) * 10, (zero,) * 10, pairs)).choice == (0,) * 10


def test_what_is_impossible_costs_inf():
    zero, never = np.zeros(2), np.full((2, 2), np.inf)
    problem = Problem((2, 2), (zero, zero), ((0, 1, never),), (zero, zero))
    assert solve(problem, 1.0).cost_s == np.inf
    assert solve(Problem((0, 2), (np.zeros(0), zero), ())).cost_s == np.inf


def test_same_answer_in_every_process():
    code = (
        "from tests.passes.test_search import *; p = layered(3, 8); f = solve(p);"
        "print(f.choice, f.cost_s.hex(), solve(p, 0.8 * f.memory_bytes).choice)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != ""
