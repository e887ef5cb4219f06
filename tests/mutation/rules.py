"""Rows of the table with one thing changed, judged by arithmetic on the op's fixed calls.

A `+` is dropped, a factor unbracketed or two swapped, a fact changed. Rows of other libraries' ops
are damaged like ATen's; a user's rule is damaged before it is registered.
"""

import contextlib
import re
from dataclasses import replace
from unittest import mock

import torch

from autotp.errors import RuleError
from autotp.passes.check_rule import _strategies as all_strategies
from autotp.passes.check_rule import check_rule, example_of
from autotp.passes.custom import rule as register
from autotp.passes.rules import find, rows
from autotp.passes.rules.table import _TABLE
from tests.faults.test_rule import custom, only_here
from tests.mutation.mutant import GRIDS, Mutant, raises, refuted
from tests.rules import draws
from tests.rules.varied import FIXED

FACTS = ("no average", "no localize", "no random")
"""What changes no layout."""


def rule_mutants():
    ops = {find(op).op: op for op in FIXED if find(op)}
    for rule in rows():
        op = ops[rule.op]
        for what, wrong in damaged(rule, op):
            if what not in FACTS and not allows_more(rule, wrong, op):
                continue  # the row as it was, or with fewer choices
            yield Mutant(
                "rule",
                f"{str(rule.op).removeprefix('aten.')}: {what}",
                lambda wrong=wrong: mock.patch.dict(_TABLE, {wrong.op: wrong}),
                lambda wrong=wrong, op=op: (
                    refuted(op, FIXED[op], wrong) or draws_wrongly(op, wrong)
                ),
            )


def draws_wrongly(op, rule):
    """Say whether ranks that draw apart make what one device could not."""
    own = [call for call in draws.CALLS if call[0] is op]
    return any(raises(draws.assert_drawn_like_one, *call, rule) for call in own)


def damaged(rule, op):
    """Yield what is changed, and the changed rule."""
    texts = {said(rule, op, call) for call in FIXED[op]} - {""}
    yield from damaged_sentences(rule, texts)
    yield from damaged_facts(rule)


def damaged_sentences(rule, texts):
    if any("+" in text for text in texts):
        yield "no +", said_otherwise(rule, lambda text: text.replace("+", ""))
    for name in sorted({n for text in texts for n in re.findall(r"\[(\w+)\]", text)}):
        yield f"{name} not whole", said_otherwise(rule, lambda t, n=name: t.replace(f"[{n}]", n))
    if any(re.search(r"\((\w+) (\w+)\)", text) for text in texts):
        swap = lambda text: re.sub(r"\((\w+) (\w+)\)", r"(\2 \1)", text)  # noqa: E731
        yield "factors swapped", said_otherwise(rule, swap)


def damaged_facts(rule):
    if rule.linear is None:
        yield "linear", replace(rule, linear="all")
    elif rule.linear != "all":
        yield "linear in all", replace(rule, linear="all")
    if rule.average:
        yield "no average", replace(rule, average=None)
    if rule.localize:
        yield "no localize", replace(rule, localize=None)
    if rule.random:
        yield "no random", replace(rule, random=None, draw=None, exact=None)
    for factor, kind in rule.split.items():
        other = {"S": "P", "P": "I", "I": "P"}[kind]
        yield f"{factor} is {other}", replace(rule, split={**rule.split, factor: other})


def said(rule, op, call):
    """Return the sentence of one call."""
    heard = []

    def listen(text):
        heard.append(text)
        return text

    with contextlib.suppress(Exception):
        check_rule(op, *call, rule=said_otherwise(rule, listen), grids=())
    return heard[0] if heard else ""


def said_otherwise(rule, change):
    """Return the rule with its sentence changed."""

    def sentence(call):
        text = rule.sentence if isinstance(rule.sentence, str) else rule.sentence(call)
        return change(text) if isinstance(text, str) else (change(text[0]), text[1])

    return replace(rule, sentence=sentence)


def allows_more(rule, wrong, op):
    """Say whether a damaged rule allows what the row does not."""
    return any(allowed(wrong, op, call) - allowed(rule, op, call) for call in FIXED[op])


def allowed(rule, op, call):
    """Return the layouts that a rule allows for a call."""
    try:
        example = example_of(op, *call, rule=rule)
    except RuleError:
        return {None}
    return {(s.operands, s.results) for s in all_strategies(example, GRIDS[0])}


# Users' rules ------------------------------------------------------------------------------------


def project_back(ctx, g):
    x, w = ctx.saved_tensors
    return g @ w, g.mT @ x, g.sum(0)


@custom("project", project_back)
def project(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, w, b)


PROJECT = "t i, o i, +o -> t o"
REGISTERED = (
    ("centre", "b t d -> b t d", None),
    ("centre", "b [t] [d] -> [t] b [d]", None),
    ("scale", "b t d, d -> b t d", "all"),
    ("centre", "... d -> ... d", "all"),
    ("project", "t i, o i, o -> t o", "each"),
    ("project", "t i, o [i], o -> t o", "all"),
    ("project", PROJECT, "all"),
    ("project", PROJECT, (0,)),
    ("project", "t i, o i, +o -> o t", "each"),
)
"""Ops of tests.faults.test_rule and the one above, with rules that are wrong."""


def custom_mutants():
    for op, sentence, linear in REGISTERED:
        yield Mutant(
            "custom",
            f"{op}: {sentence}, linear {linear}",
            contextlib.nullcontext,
            lambda given=(op, sentence, linear): is_refused(*given),
        )


def is_refused(name, sentence, linear):
    """Say whether a user's rule is refused when it is registered."""
    with only_here(name):
        return raises(register, f"faults::{name}", sentence, linear=linear)
