"""Collectives with another kernel forward or backward, and steps of the code generation left out.

Both are judged by random plans of small programs.
"""

from unittest import mock

import torch

from autotp import collectives
from autotp.check import prepare
from autotp.grid import as_grid
from autotp.passes.emit import codegen, move_calls
from tests.fuzz.program import Line, Program
from tests.fuzz.programs import Case, plan_failure
from tests.mutation.mutant import Mutant
from tests.random_plans import Plans

ALIKE = (
    (collectives._nothing, collectives._all_reduce, collectives._keep_one),
    (collectives._slice, collectives._reduce_scatter),
    (collectives._gather, collectives._pad),
)
"""Kernels that take and give the same shapes."""
PAIRS = (
    ("P->I", collectives._all_reduce, collectives._nothing),
    ("P->R", collectives._all_reduce, collectives._all_reduce),
    ("I->R", collectives._nothing, collectives._all_reduce),
    ("R->I", collectives._nothing, collectives._keep_one),
    ("P->S", collectives._reduce_scatter, collectives._gather),
    ("S->R", collectives._gather, collectives._reduce_scatter),
    ("S->I", collectives._gather, collectives._slice),
    ("I->S", collectives._slice, collectives._gather),
    ("R->S", collectives._slice, collectives._pad),
    ("R->P", collectives._keep_one, collectives._keep_one),
    ("S->P", collectives._pad, collectives._slice),
)


def move_mutants():
    for name, kernel, dual in PAIRS:
        for other in others(kernel):
            yield move_mutant(f"{name} forward {other.__name__}", (kernel, dual), (other, dual))
        for other in others(dual):
            yield move_mutant(f"{name} backward {other.__name__}", (kernel, dual), (kernel, other))
    pair = collectives._all_to_all, collectives._all_to_all_back
    yield move_mutant("S->S forward back", pair, (pair[1], pair[1]))
    yield move_mutant("S->S backward forth", pair, (pair[0], pair[0]))
    yield blank_mutant("I->P forward _nothing", torch.clone)
    yield blank_mutant("I->P backward _keep_one", torch.zeros_like)


def others(kernel):
    return [k for row in ALIKE if kernel in row for k in row if k is not kernel]


def move_mutant(name, pair, wrong):
    move = collectives._move

    def damaged_move(x, kernel, dual, where, ways=("", "")):
        return move(x, *(wrong if (kernel, dual) == pair else (kernel, dual)), where, ways)

    plant = lambda: mock.patch.object(collectives, "_move", damaged_move)  # noqa: E731
    return Mutant("move", name, plant, random_plans_fail)


def blank_mutant(name, wrong):
    plant = lambda: mock.patch.object(collectives, "_blanked", wrong)  # noqa: E731
    return Mutant("move", name, plant, random_plans_fail)


# Code generation ---------------------------------------------------------------------------------


def codegen_mutants():
    def mutant(name, module, function, wrong):
        plant = lambda: mock.patch.object(module, function, wrong)  # noqa: E731
        return Mutant("codegen", name, plant, random_plans_fail)

    gathered = move_calls._gathered
    factor = codegen._local_factor
    yield mutant("no share of a mean", codegen, "_averaged", lambda e, op, decision, made: made)
    yield mutant("an even share", codegen, "_local_factor", even_share(factor))
    yield mutant("whole sizes", codegen, "_localized", lambda e, call, decision: call)
    no_blocks = lambda *args, **more: ((), gathered(*args, **more)[1])  # noqa: E731
    yield mutant("no blocks", move_calls, "_gathered", no_blocks)
    no_length = lambda *args, **more: (gathered(*args, **more)[0], None)  # noqa: E731
    yield mutant("no length", move_calls, "_gathered", no_length)


def even_share(factor):
    """The first rank's share for every rank."""

    def wrong(e, op, decision, name):
        return factor(FirstRank(e), op, decision, name)

    return wrong


class FirstRank:
    """What an emitter knows, of rank 0."""

    def __init__(self, emitter):
        self.grid, self.coords = emitter.grid, (0,) * len(emitter.grid.sizes)


SUBJECTS = (
    Program(
        inputs={"x0": "torch.randn([4, 6, 8]).double().requires_grad_()"},
        params={
            "p0": "nn.Parameter(torch.randn([24, 8]).double())",
            "p1": "nn.Parameter(torch.randn([8, 8]).double())",
            "p2": "nn.Parameter(torch.randn([8]).double())",
        },
        lines=(
            Line(("v0", "v1", "v2"), "v0, v1, v2 = F.linear(x0, p0).chunk(3, -1)"),
            Line(("v3",), "v3 = v0.unflatten(-1, (4, 2)).transpose(1, 2) * 0.5"),
            Line(("v4",), "v4 = v3.transpose(1, 2).reshape(4, 6, 8) + v1 * v2"),
            Line(("v5",), "v5 = x0 + F.linear(v4, p1, p2)"),
            Line(("v6",), "v6 = F.layer_norm(v5, (8,), p2)"),
            Line(("v7",), "v7 = v6.square().mean() + v5.sum((0, 1)).tanh().mean()"),
        ),
        outputs=("v7",),
    ),
    Program(
        inputs={"x0": "torch.randn([5, 7]).double()"},
        params={
            "p0": "nn.Parameter(torch.randn([5, 7]).double())",
            "p1": "nn.Parameter(torch.randn([7, 5]).double())",
        },
        lines=(
            Line(("v0",), "v0 = F.gelu(F.linear(x0, p0))"),
            Line(("v1",), "v1 = F.linear(v0, p1) + x0"),
            Line(("v2",), "v2 = (v1 @ p1).reshape(5, 5, 1).tanh()"),
            Line(("v3",), "v3 = v2.mean(0) + v1.mean()"),
        ),
        outputs=("v3", "v0"),
    ),
)
PREPARED = {}


def subjects():
    """Return every small program prepared, with its grids, once."""
    if not PREPARED:
        for k, program in enumerate(SUBJECTS):
            model, inputs = program.build()
            subject = prepare(model, (), inputs)
            for grid in ((2,), (3,), (2, 2)):
                PREPARED[k, grid] = subject, Plans(subject, as_grid(grid), detours=True)
    return PREPARED


def random_plans_fail(count=16):
    """Say whether a random plan of a small program is off."""
    return any(
        plan_failure(subject, plans, Case(SUBJECTS[k], grid, seed))
        for seed in range(count)
        for (k, grid), (subject, plans) in subjects().items()
    )
