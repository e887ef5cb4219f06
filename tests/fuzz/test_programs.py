"""A sample of the random programs; `python -m tests.fuzz.programs` runs as many as asked."""

from contextlib import nullcontext

import pytest
import torch

from autotp import simulate
from autotp.axis import run_ranks
from autotp.grid import as_grid
from tests.fuzz.grow import Growth, grow
from tests.fuzz.ops import FAMILIES, Skip
from tests.fuzz.program import Line, Program
from tests.fuzz.programs import BEST, Case, failure_of, hiding_cases_of, run, shrink
from tests.fuzz.schedules import KINDS, awaited


@pytest.mark.parametrize("seed", range(0, 40, 10))
def test_random_programs_under_random_plans(seed):
    failures, counts = run(range(seed, seed + 10))
    assert not failures, f"seed {failures[0][0]}\n{failures[0][1]}"
    assert counts["programs"] == 10 and counts["cases"] >= 40, counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 2000, 100))
def test_many_random_programs_under_random_plans(seed):
    failures, _ = run(range(seed, seed + 100))
    assert not failures, f"seed {failures[0][0]}\n{shrink(failures[0][1])}"


WITH_ALL = (111, 115, 136, 137, 141, 146)
"""Seeds whose plans have every kind of schedule."""


def test_every_kind_of_schedule_computes_what_the_program_does():
    failures, counts = run(WITH_ALL, cases_of=hiding_cases_of)
    assert not failures, f"seed {failures[0][0]}\n{failures[0][1]}"
    assert [kind for kind in KINDS if not counts[kind]] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1200, 20))
def test_many_random_programs_for_clusters_that_hide(seed):
    failures, _ = run(range(seed, seed + 20), cases_of=hiding_cases_of)
    assert not failures, f"seed {failures[0][0]}\n{shrink(failures[0][1])}"


def step(axis, changes_what_is_sent=False, waits=True):
    x = torch.ones(2)
    finish = axis.begin("all_reduce", x.clone()), axis.begin("all_gather", x)
    if changes_what_is_sent:
        x.add_(1)
    return [f() for f in finish] if waits else finish


@pytest.mark.parametrize("wrong", [{}, {"changes_what_is_sent": True}, {"waits": False}], ids=str)
def test_ranks_must_await_what_they_began_and_leave_it_alone(wrong):
    with (
        pytest.raises(AssertionError, match=r"sent|awaited") if wrong else nullcontext(),
        awaited(),
    ):
        run_ranks(as_grid((2,)), lambda rank, axes: step(*axes.values(), **wrong))


def test_what_an_all_reduce_began_with_is_used_up():
    def begun(rank, axes):
        x = torch.ones(2)
        (axis,) = axes.values()
        summed = axis.begin("all_reduce", x)()
        assert x.isnan().all() and summed.tolist() == [2, 2]

    with awaited():
        run_ranks(as_grid((2,)), begun)


def test_a_seed_is_a_program():
    assert str(grow(3)) == str(grow(3)) != str(grow(4))


def test_an_index_is_below_its_bound_whatever_is_drawn():
    g = Growth(0)
    name = g.input("torch.randint(9, [2])")
    assert g.below(name, 9) == name and g.below(name, 5) == f"({name} % 5)"


def test_every_family_can_be_written():
    unwritten, seed = set(FAMILIES), 0
    while unwritten and seed < 40:
        g = Growth(seed)
        g.input("torch.randn([2, 4, 6]).double()")
        g.input("torch.randn([2, 4, 6, 4]).double()")
        g.input("torch.randn([6]).double()")
        g.input("torch.randint(5, [4, 6])")
        g.line(lambda g: f"{g.inputs and 'x0'} * 0.5")
        for family in sorted(unwritten, key=list(FAMILIES).index):
            try:
                g.line(family)
                unwritten.discard(family)
            except Skip:
                continue
        seed += 1
    assert not unwritten


LONG = Program(
    inputs={"x0": "torch.randn([4, 6]).double()"},
    params={"p0": "nn.Parameter(torch.randn([6, 6]).double())"},
    lines=(
        Line(("v0",), "v0 = F.linear(x0, p0)"),
        Line(("v1", "v2"), "v1, v2 = v0.tanh().chunk(2, -1)"),
        Line(("v3",), "v3 = v1 @ v2.mT"),
        Line(("v4",), "v4 = F.relu(v3) + v3"),
        Line(("v5",), "v5 = v4.square().mean()"),
    ),
    outputs=("v5", "v0"),
)


def test_a_failure_is_shrunk_to_the_line_that_is_wrong(monkeypatch):
    emit = simulate.emit

    def wrong(*args):
        module = emit(*args)
        for node in module.graph.nodes:
            if "relu" in str(node.target):
                node.target = simulate.torch.sigmoid
        module.recompile()
        return module

    monkeypatch.setattr(simulate, "emit", wrong)
    found = shrink(failure_of([Case(LONG, (2, 2), BEST)])[0], tries=1, budget_s=40)
    (line,) = found.case.program.lines
    assert "relu" in line.text and found.case.grid == (2,)
