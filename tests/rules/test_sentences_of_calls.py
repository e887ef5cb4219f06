"""Rules that write their sentence from the call: reshapes, slices, joins, attention, einsum."""

import pytest
import torch

from autotp.passes.check_rule import example_of

aten = torch.ops.aten


def t(*shape):
    return torch.ones(shape)


def said(op, *args, **kwargs):
    """Write a bound signature with letters in order of appearance, each with its size."""
    sig = example_of(op, args, kwargs).op.signature
    letters = dict(zip(sig.factors(), "abcdefghij", strict=False))

    def name(factor):
        text = f"{letters[factor]}{sig.sizes[factor]}"
        return f"[{text}]" if factor in sig.whole else text

    def dim(blocks):
        inside = "|".join(" ".join(map(name, product)) or "1" for product in blocks)
        return inside if len(blocks) == 1 and len(blocks[0]) < 2 else f"({inside})"

    sides = [", ".join(" ".join(map(dim, row)) for row in s) for s in (sig.operands, sig.results)]
    return " -> ".join(sides)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ((2, 3, 8), (2, 3, 4, 2), "a2 b3 (c4 d2) -> a2 b3 c4 d2"),
        ((2, 3, 4, 2), (2, 3, 8), "a2 b3 c4 d2 -> a2 b3 (c4 d2)"),
        ((2, 3, 8), (6, 8), "a2 b3 c8 -> (a2 b3) c8"),
        ((4, 6), (2, 12), "(a2 b2) c6 -> a2 (b2 c6)"),
        ((4, 6), (4, 1, 6), "a4 b6 -> a4 1 b6"),
        ((4, 1, 6, 1), (4, 6), "a4 1 b6 1 -> a4 b6"),
        ((4, 6), (6, 4), "[a4] [b6] -> [c6] [d4]"),
        ((5, 4, 6), (5, 6, 4), "a5 [b4] [c6] -> a5 [d6] [e4]"),
        ((1,), (), "1 -> "),
    ],
)
def test_a_reshape_keeps_the_factors_that_both_shapes_share(before, after, sentence):
    assert said(aten.reshape.default, t(*before), list(after)) == sentence


@pytest.mark.parametrize(
    ("bounds", "sentence"),
    [
        ((1, 0, 6), "a4 (b6|c6) -> a4 b6"),
        ((1, 4, 8), "a4 (b4|c4|d4) -> a4 c4"),
        ((1, -4), "a4 (b8|c4) -> a4 c4"),
        ((1, 0, 12), "a4 b12 -> a4 b12"),
        ((1, 0, 5), "a4 [b12] -> a4 [c5]"),
        ((1, 0, 12, 2), "a4 [b12] -> a4 [c6]"),
    ],
)
def test_a_slice_is_one_of_several_blocks(bounds, sentence):
    assert said(aten.slice.Tensor, t(4, 12), *bounds) == sentence


@pytest.mark.parametrize(
    ("op", "args", "sentence"),
    [
        (aten.split.Tensor, (t(2, 12), 4, 1), "a2 (b4|c4|d4) -> a2 b4, a2 c4, a2 d4"),
        (aten.split_with_sizes.default, (t(8, 3), [6, 2]), "(a6|b2) c3 -> a6 c3, b2 c3"),
        (aten.chunk.default, (t(2, 12), 2, -1), "a2 (b6|c6) -> a2 b6, a2 c6"),
        (aten.cat.default, ([t(2, 4), t(2, 6)], 1), "a2 b4, a2 c6 -> a2 (b4|c6)"),
        (aten.stack.default, ([t(2, 4), t(2, 4)], 1), "a2 b4, a2 b4 -> a2 [c2] b4"),
        (aten.unbind.int, (t(3, 4), 0), "[a3] b4 -> b4, b4, b4"),
        (aten.select.int, (t(3, 4), -1, 0), "a3 [b4] -> a3"),
        (aten.expand.default, (t(2, 1, 3), [4, 2, 6, 3]), "a2 1 b3 -> c4 a2 d6 b3"),
        (aten.repeat.default, (t(4, 1), [2, 6]), "a4 1 -> ([b2] a4) [c6]"),
        (aten.squeeze.dims, (t(2, 1, 3), [0, 1]), "[a2] 1 b3 -> [a2] b3"),
    ],
)
def test_joins_splits_and_single_dims(op, args, sentence):
    assert said(op, *args) == sentence


@pytest.mark.parametrize(
    ("heads", "mask", "sentence"),
    [
        ((4, 4), None, "a2 b4 c3 [d5], a2 b4 [e6] [d5], a2 b4 [e6] [f5] -> a2 b4 c3 [f5]"),
        (
            (4, 2),
            None,
            "a2 (b2 c2) d3 [e5], a2 b2 [f6] [e5], a2 b2 [f6] [g5] -> a2 (b2 c2) d3 [g5]",
        ),
        (
            (4, 2),
            (2, 1, 3, 6),
            "a2 (b2 c2) d3 [e5], a2 b2 [f6] [e5], a2 b2 [f6] [g5], a2 1 d3 [h6]"
            " -> a2 (b2 c2) d3 [g5]",
        ),
        (
            (4, 1),
            (1, 4, 1, 6),
            "a2 b4 c3 [d5], a2 1 [e6] [d5], a2 1 [e6] [f5], 1 b4 1 [g6] -> a2 b4 c3 [f5]",
        ),
    ],
    ids=["plain", "grouped", "grouped and masked", "one key head"],
)
def test_attention_names_heads_and_groups(heads, mask, sentence):
    query, key = t(2, heads[0], 3, 5), t(2, heads[1], 6, 5)
    grouped = {"enable_gqa": True} if heads[1] == 2 else {}
    masks = (t(*mask),) if mask else ()
    op = aten.scaled_dot_product_attention.default
    assert said(op, query, key, key, *masks, **grouped) == sentence


@pytest.mark.parametrize(
    ("equation", "shapes", "sentence"),
    [
        ("bsi,oi->bso", [(2, 3, 4), (5, 4)], "a2 b3 c4, d5 c4 -> a2 b3 d5"),
        ("ij,jk", [(2, 3), (3, 4)], "a2 b3, b3 c4 -> a2 c4"),
        ("...i,ij", [(2, 3), (3, 4)], "a2 b3, b3 c4 -> a2 c4"),
    ],
)
def test_an_equation_is_a_sentence(equation, shapes, sentence):
    assert said(aten.einsum.default, equation, [t(*s) for s in shapes]) == sentence
