"""Every rule against arithmetic: all strategies of every row compute what the op computes."""

import pytest
import torch
import torch.nn.functional as F

from autotp.errors import RuleError
from autotp.passes.check_rule import LINES, check_rule
from autotp.passes.rules import Rule, find, rows
from autotp.passes.rules.table import pointwise_sentence, result_shape_at
from autotp.passes.rules.view import reshape, slice_text
from tests.rules.cases import FAMILIES, c, calls, ints, x

aten = torch.ops.aten

CALLS = [call for family in FAMILIES for call in calls(family)]
IDS = [f"{op.name().removeprefix('aten::')}-{k}" for k, (op, _, _) in enumerate(CALLS)]


@pytest.mark.parametrize(("op", "args", "kwargs"), CALLS, ids=IDS)
def test_every_strategy_computes_what_the_op_computes(op, args, kwargs):
    assert len(check_rule(op, args, kwargs)) >= 4


def test_every_row_has_a_case():
    assert {rule.op for rule in rows()} <= {find(op).op for op, _, _ in CALLS if find(op)}


def test_every_local_program_is_proved():
    wanted = {(rule.op, factor) for rule in rows() for factor in rule.split}
    programs = [call for call in CALLS if find(call[0]) and find(call[0]).split]
    split = {
        (find(op).op, name)
        for op, args, kwargs in programs
        for strategy in check_rule(op, args, kwargs, grids=LINES[:1])
        for choice in strategy.choices
        for name in (*choice.split, " ".join(choice.split))
    }
    assert wanted <= split


# Wrong rules -------------------------------------------------------------------------------------


def forgetful_embedding(weight, indices, *, split_v, size_v):
    return F.embedding(indices % len(weight), weight)


WRONG = {
    "a bias that every rank adds": (
        Rule(aten.linear.default, "... i, o i, o -> ... o", linear="each"),
        (x(3, 8), x(6, 8), x(6)),
    ),
    "a mean that is not averaged": (
        Rule(aten.mean.default, "a b -> ", linear="all"),
        (x(4, 6),),
    ),
    "a softmax that is pointwise": (
        Rule(aten.softmax.int, "... -> ..."),
        (x(4, 6), -1),
    ),
    "a norm whose statistics are local": (
        Rule(aten.layer_norm.default, "... d, d, d -> ... d"),
        (x(4, 6), [6], x(6), x(6)),
    ),
    "a nonlinear op that passes partials": (
        Rule(aten.relu.default, "... -> ...", linear="all"),
        (x(4, 6),),
    ),
    "a scalar that every rank adds": (
        Rule(aten.add.Tensor, pointwise_sentence, linear="all"),
        (x(4, 6), 2.0),
    ),
    "a product of two partials": (
        Rule(aten.mul.Tensor, pointwise_sentence, linear="all"),
        (x(4, 6), x(4, 6)),
    ),
    "a sum of one partial": (
        Rule(aten.add.Tensor, pointwise_sentence, linear="each"),
        (x(4, 6), x(4, 6)),
    ),
    "a view that takes the minor factor for the major": (
        Rule(aten.reshape.default, "a b c -> a (c b)", localize=result_shape_at(1)),
        (x(2, 4, 6), [2, 24]),
    ),
    "a view that keeps its whole sizes": (
        Rule(aten.reshape.default, reshape),
        (x(2, 4, 6), [8, 6]),
    ),
    "a slice that keeps its whole bounds": (
        Rule(aten.slice.Tensor, slice_text),
        (x(4, 12), 1, 4, 8),
    ),
    "a scan over chunks": (
        Rule(aten.cumsum.default, "a b -> a b"),
        (x(4, 6), 1),
    ),
    "a maximum of sums": (
        Rule(aten.amax.default, "a b -> a"),
        (x(4, 6), [1]),
    ),
    "a loss that is averaged over each rank's rows": (
        Rule(aten.cross_entropy_loss.default, "t [v], t -> "),
        (x(6, 8), ints(8, 6)),
    ),
    "an embedding that masks nothing": (
        Rule(
            aten.embedding.default,
            "v d, ... -> ... d",
            split={"v": "P"},
            program=forgetful_embedding,
        ),
        (x(12, 6), ints(12, 8)),
    ),
    "attention over a part of the keys": (
        Rule(aten.scaled_dot_product_attention.default, "b n s d, b n t d, b n t e -> b n s e"),
        (x(2, 4, 3, 6), x(2, 4, 6, 6), x(2, 4, 6, 5)),
    ),
    "a gradient that is summed twice": (
        Rule(aten.mul.Tensor, "a b, [z] -> a b", linear=(0, 1)),
        (x(4, 6), x(1)),
    ),
}


@pytest.mark.parametrize(("rule", "args"), WRONG.values(), ids=WRONG)
def test_a_wrong_rule_is_refuted(rule, args):
    with pytest.raises(RuleError, match=f"rule of {rule.op} is wrong: strategy"):
        check_rule(rule.op, args, rule=rule)


def test_a_refutation_names_strategy_layouts_and_mismatch():
    rule, args = WRONG["a mean that is not averaged"]
    with pytest.raises(RuleError) as caught:
        check_rule(rule.op, args, rule=rule)
    first, *places = caught.value.at
    assert caught.value.what.endswith("strategy a on grid 2")
    assert first == ("layouts", "S(0) -> P")
    assert [where for where, _ in places] == ["result 0", "gradient of operand 0"]


def test_without_gradients_values_are_still_compared():
    rule = Rule(aten.softmax.int, "... -> ...")
    with pytest.raises(RuleError, match="result 0"):
        check_rule(rule.op, (c(4, 6), -1), rule=rule)


# What may not be split ---------------------------------------------------------------------------


def choices(op, *args, **kwargs):
    return {choice.name for s in check_rule(op, args, kwargs) for choice in s.choices}


def splits(op, *args, **kwargs):
    return {f for s in check_rule(op, args, kwargs) for choice in s.choices for f in choice.split}


def test_random_pointwise_ops_have_no_rule():
    assert torch.Tag.pointwise in aten.rrelu.default.tags
    assert find(aten.rrelu.default) is None


def test_attention_splits_queries_alone_and_keys_with_them():
    q = x(2, 4, 6, 5)
    plain, causal = (q, q, q), (q, q, q, None, 0.0, True)
    assert splits(aten.scaled_dot_product_attention.default, *plain) == {"b", "n", "s", "t"}
    assert splits(aten.scaled_dot_product_attention.default, *causal) == {"b", "n", "s", "t"}
    assert "t" not in choices(aten.scaled_dot_product_attention.default, *causal)


def test_grouped_queries_split_by_key_heads_or_within_groups():
    q, k = x(2, 12, 3, 5), x(2, 6, 4, 5)
    found = splits(aten.scaled_dot_product_attention.default, q, k, k, enable_gqa=True)
    assert found == {"b", "m", "g", "s", "t"}


@pytest.mark.parametrize(
    ("op", "args", "passes"),
    [
        (aten.linear.default, (x(4, 6), x(8, 6), x(8)), {"P0", "P1"}),
        (aten.add.Tensor, (x(4, 6), x(6)), {"P"}),
        (aten.add.Tensor, (x(4, 6), 1.0), set()),
        (aten.div.Tensor, (x(4, 6), x(6)), {"P"}),
        (aten.gelu.default, (x(4, 6),), set()),
        (aten.to.dtype, (x(4, 6), torch.float32), {"P"}),
        (aten.to.dtype, (x(4, 6), torch.int64), set()),
        (aten.to.dtype, (x(4, 6) > 0, torch.float64), set()),
        (aten.pad.default, (x(4, 6), [0, 1]), {"P"}),
        (aten.pad.default, (x(4, 6), [0, 1], "constant", 3.0), set()),
        (aten.pad.default, (x(4, 6), [0, 1], "replicate"), set()),
        (aten.take.default, (x(4, 6), ints(24, 5)), {"P"}),
        (aten.type_as.default, (x(4, 6), c(6)), {"P"}),
        (aten.view_as_complex.default, (x(4, 6, 2),), {"P"}),
    ],
)
def test_partials_pass_where_the_op_is_linear(op, args, passes):
    assert {n for n in choices(op, *args) if n.startswith("P")} == passes
