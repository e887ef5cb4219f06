"""Damage one thing at a time, and see that the proofs notice.

    python -m tests.mutation [--only NAME]

    rule      a row of the table: a `+` dropped, a factor unbracketed or two swapped, a fact changed
    move      a collective: its forward or its backward replaced by another of the same shapes
    program   a local program: one of its sums over ranks left out
    codegen   a step of the code generation left out

Rules and local programs are judged by `check_rule` on the op's fixed calls, the others by random
plans of small programs. A mutant that nothing notices survives; SAME says which are right to.
"""

import argparse
import ast
import contextlib
import functools
import inspect
import io
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import fx

from autotp import (
    collectives,
    local_lookups,
    local_losses,
    local_programs,
    local_statistics,
    split_attention,
)
from autotp.check import prepare
from autotp.errors import RuleError
from autotp.grid import Grid, as_grid
from autotp.passes.check_rule import _strategies as all_strategies
from autotp.passes.check_rule import check_rule, example_of
from autotp.passes.emit import codegen, move_calls
from autotp.passes.rules import find, rows
from autotp.passes.rules.table import _TABLE
from tests.fuzz.program import Line, Program
from tests.fuzz.programs import Case, plan_failure
from tests.random_plans import Plans
from tests.rules.varied import FIXED

aten = torch.ops.aten
GRIDS = (Grid(("col",), (2,)), Grid(("row", "col"), (2, 3)))


@dataclass(frozen=True, slots=True)
class Mutant:
    """One damage: `plant` returns a context in which it is there; `notice` asks the proofs."""

    kind: str
    name: str
    plant: object
    notice: object


FACTS = ("no average", "no localize")
"""What changes no layout."""


# Rules -------------------------------------------------------------------------------------------


def rule_mutants():
    for rule in rows():
        calls = FIXED.get(rule.op, []) if not isinstance(rule.op, str) else []
        for what, wrong in damaged(rule, calls):
            if what not in FACTS and not allows_more(rule, wrong, calls):
                continue  # the row as it was, or with fewer choices
            yield Mutant(
                "rule",
                f"{str(rule.op).removeprefix('aten.')}: {what}",
                lambda wrong=wrong: mock.patch.dict(_TABLE, {wrong.op: wrong}),
                lambda wrong=wrong, calls=calls: refuted(wrong.op, calls, wrong),
            )


def damaged(rule, calls):
    """Yield what is changed, and the changed rule."""
    texts = {said(rule, call) for call in calls} - {""}
    if any("+" in text for text in texts):
        yield "no +", said_otherwise(rule, lambda text: text.replace("+", ""))
    for name in sorted({n for text in texts for n in re.findall(r"\[(\w+)\]", text)}):
        yield f"{name} not whole", said_otherwise(rule, lambda t, n=name: t.replace(f"[{n}]", n))
    if any(re.search(r"\((\w+) (\w+)\)", text) for text in texts):
        swap = lambda text: re.sub(r"\((\w+) (\w+)\)", r"(\2 \1)", text)  # noqa: E731
        yield "factors swapped", said_otherwise(rule, swap)
    if rule.linear is None:
        yield "linear", replace(rule, linear="all")
    elif rule.linear != "all":
        yield "linear in all", replace(rule, linear="all")
    if rule.average:
        yield "no average", replace(rule, average=None)
    if rule.localize:
        yield "no localize", replace(rule, localize=None)
    for factor, kind in rule.split.items():
        other = {"S": "P", "P": "I", "I": "P"}[kind]
        yield f"{factor} is {other}", replace(rule, split={**rule.split, factor: other})


def said(rule, call):
    """Return the sentence of one call."""
    heard = []

    def listen(text):
        heard.append(text)
        return text

    with contextlib.suppress(Exception):
        check_rule(rule.op, *call, rule=said_otherwise(rule, listen), grids=())
    return heard[0] if heard else ""


def said_otherwise(rule, change):
    """Return the rule with its sentence changed."""

    def sentence(call):
        text = rule.sentence if isinstance(rule.sentence, str) else rule.sentence(call)
        return change(text) if isinstance(text, str) else (change(text[0]), text[1])

    return replace(rule, sentence=sentence)


def refuted(op, calls, rule=None):
    """Say whether a rule fails on one of its calls."""
    with mock.patch.object(fx.graph_module.sys, "stderr", io.StringIO()):  # its own tracebacks
        for call in calls:
            try:
                check_rule(op, *call, rule=rule, grids=GRIDS)
            except Exception:
                return True
    return False


def allows_more(rule, wrong, calls):
    """Say whether a damaged rule allows what the row does not."""
    return any(
        allowed(wrong, call, grid) - allowed(rule, call, grid)
        for call in calls
        for grid in GRIDS[:1]
    )


def allowed(rule, call, grid):
    """Return the layouts that a rule allows for a call."""
    try:
        example = example_of(rule.op, *call, rule=rule)
    except RuleError:
        return {None}
    return {(s.operands, s.results) for s in all_strategies(example, grid)}


# Moves -------------------------------------------------------------------------------------------

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
    ("I->P", collectives._keep_one, collectives._nothing),
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


def others(kernel):
    return [k for row in ALIKE if kernel in row for k in row if k is not kernel]


def move_mutant(name, pair, wrong):
    move = collectives._move

    def damaged_move(x, kernel, dual, where):
        return move(x, *(wrong if (kernel, dual) == pair else (kernel, dual)), where)

    plant = lambda: mock.patch.object(collectives, "_move", damaged_move)  # noqa: E731
    return Mutant("move", name, plant, random_plans_fail)


# Local programs ----------------------------------------------------------------------------------

PROGRAMS = (local_lookups, local_losses, local_programs, local_statistics, split_attention)


def program_mutants():
    own = [op for op in FIXED if (rule := find(op)) and rule.program]
    for module in PROGRAMS:
        for name, line in sums_of(module):
            yield Mutant(
                "program",
                f"{module.__name__.removeprefix('autotp.')}.{name}",
                lambda module=module, line=line: without_sum(module, line),
                lambda: any(refuted(op, FIXED[op]) for op in own),
            )


def sums_of(module):
    """Yield the function and the line of every sum over ranks."""
    count = Counter()
    for top in ast.parse(inspect.getsource(module)).body:
        for node in ast.walk(top):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "total_over":
                count[top.name] += 1
                yield f"{top.name}, sum {count[top.name]}", node.lineno


def without_sum(module, line):
    total = module.total_over

    def wrong(x, axes, *op):
        here = sys._getframe(1)
        return x if here.f_lineno == line else total(x, axes, *op)

    return mock.patch.object(module, "total_over", wrong)


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


# All ---------------------------------------------------------------------------------------------

KINDS = {
    "rule": rule_mutants,
    "move": move_mutants,
    "program": program_mutants,
    "codegen": codegen_mutants,
}
LEGAL = "as legal: the row allows less than it could"
UNSEEN = "the calls draw nothing: tests/runtime/test_randomness.py holds the masks"
_SAME = {
    LEGAL: (
        "scaled_dot_product_attention.default: e not whole", "new_zeros.default: b1 not whole",
        "new_zeros.default: linear", "bucketize.Tensor: k not whole",
        "searchsorted.Tensor: k not whole", "searchsorted.Tensor: m not whole",
        "_grouped_mm.default: k not whole", "squeeze.default: a2 not whole",
        "type_as.default: linear", "broadcast_tensors.default: linear", "fill.Tensor: linear",
        "count_nonzero.default: a1 not whole", "count_nonzero.dim_IntList: a0 not whole",
        "count_nonzero.dim_IntList: a2 not whole", "max_unpool2d.default: x0 not whole",
        "max_unpool2d.default: x1 not whole", "max_unpool3d.default: x1 not whole",
        "max_unpool3d.default: x2 not whole",
    ),
    UNSEEN: (
        "alpha_dropout.default: linear", "dropout.default: linear",
        "feature_alpha_dropout.default: linear", "feature_alpha_dropout.default: x0 not whole",
        "feature_dropout.default: linear", "feature_dropout.default: x0 not whole",
    ),
}  # fmt: skip
SAME = {("rule", name): why for why, names in _SAME.items() for name in names}
"""Mutants that the proofs rightly let pass, by kind and name, with the reason."""


@functools.cache
def mutants(only=""):
    """Return the mutants whose kind and name contain `only`."""
    kinds = [kind for kind in KINDS if only.startswith(kind)] or KINDS
    made = [m for kind in kinds for m in KINDS[kind]()]
    return [m for m in made if only in f"{m.kind} {m.name}"]


def is_killed(mutant):
    """Say whether the proofs notice a mutant."""
    with warnings.catch_warnings(action="ignore"):
        subjects()
        with mutant.plant():
            return mutant.notice()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose kind and name contain this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scores, survivors = Counter(), []
    for mutant in mutants(options.only):
        killed = is_killed(mutant)
        scores[mutant.kind, killed] += 1
        if not killed:
            survivors.append(mutant)
            print("survives", mutant.kind, mutant.name, "=", reason(mutant), flush=True)
    for kind in KINDS:
        killed, alive = scores[kind, True], scores[kind, False]
        print(f"{kind:8} {killed:4} killed of {killed + alive}")
    sys.exit(any(not reason(m) for m in survivors))


def reason(mutant):
    """Return why a mutant rightly passes, or nothing."""
    return SAME.get((mutant.kind, mutant.name), "")


if __name__ == "__main__":
    main()
