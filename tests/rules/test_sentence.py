"""The sentence: what it reads, how it binds to shapes, and what it refuses."""

import pytest

from autotp.errors import RuleError
from autotp.passes.rules import parse


def bound(text, operands, results, **sizes):
    return parse(text).bind(operands, results, sizes)


def test_names_on_both_sides_a_summed_one_and_an_added_operand():
    sig = bound("... i, o i, +o -> ... o", [(2, 3, 8), (6, 8), (6,)], [(2, 3, 6)])
    assert sig.sizes == {".0": 2, ".1": 3, "i": 8, "o": 6}
    assert [f for f in sig.factors() if sig.summed(f)] == ["i"]
    assert sig.added == {2}


def test_brackets_mark_what_is_needed_whole():
    sig = bound("... [d], [d] -> ... [d]", [(4, 6), (6,)], [(4, 6)])
    assert sig.whole == {"d"} and sig.factors() == [".0", "d"]


def test_brackets_inside_a_product():
    assert bound("a -> ([r] a)", [(4,)], [(12,)]).whole == {"r"}


def test_a_product_is_solved_from_its_other_factors():
    sig = bound("b s (n d) -> b s n d", [(2, 3, 8)], [(2, 3, 4, 2)])
    assert sig.operands[0][2] == (("n", "d"),) and sig.sizes["n"] == 4


def test_blocks_side_by_side_are_split_together():
    sig = bound("a (q|k|v) -> a q, a k, a v", [(2, 12)], [(2, 6), (2, 3), (2, 3)])
    assert sig.blocks() == [("q", "k", "v")]
    assert not sig.summed("q")


def test_an_unknown_block_is_what_the_others_leave():
    assert bound("(before|kept) -> kept", [(10,)], [(6,)]).sizes["before"] == 4


def test_ellipsis_aligns_at_the_right():
    sig = bound("..., ... -> ...", [(2, 3, 4), (4,)], [(2, 3, 4)])
    assert sig.operands[1] == ((((".2",)),),)


def test_a_dim_of_one_element_broadcasts():
    sig = bound("..., ... -> ...", [(2, 1), (2, 3)], [(2, 3)])
    assert sig.operands[0] == ((((".0",)),), ((),))


def test_a_dim_of_one_element_everywhere_is_a_factor():
    assert bound("... -> ...", [(1, 3)], [(1, 3)]).sizes == {".0": 1, ".1": 3}


def test_an_operand_that_is_not_given_is_left_out():
    sig = bound("... d, d, +d -> ... d", [(4, 6), None, (6,)], [(4, 6)])
    assert len(sig.operands) == 2 and sig.added == {1}


def test_trailing_operands_may_be_missing():
    assert bound("t i, o i, +o -> t o", [(4, 6), (5, 6)], [(4, 5)]).added == frozenset()


def test_scalars_have_no_dims():
    assert bound("i, i -> ", [(7,), (7,)], [()]).results == ((),)


@pytest.mark.parametrize(
    ("text", "operands", "results", "said"),
    [
        ("a b -> a", [(2, 3)], [(3,)], "factor a is both 2 and 3"),
        ("a b -> a b", [(2, 3, 4)], [(2, 3)], r"does not fit a tensor of shape \[2, 3, 4\]"),
        ("... a b -> ...", [(3,)], [()], r"does not fit a tensor of shape \[3\]"),
        ("a -> a", [(2,), (2,)], [(2,)], "does not fit 2 operands"),
        ("(n d) -> n d", [(7,)], [(2, 3)], "does not have 7 elements"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(text, operands, results, said):
    with pytest.raises(RuleError, match=said):
        bound(text, operands, results)


def test_a_sentence_has_an_arrow():
    with pytest.raises(RuleError, match="has no '->'"):
        parse("a b")
