import pytest
import sympy
from sympy import Integer

from autotp.cost_model import closed_forms as cf
from autotp.cost_model.closed_forms import a, b, c, g, h, p, q, r, s, sent_volume
from autotp.cost_model.collectives import sent_bytes

T = b * s
N = p / a


def linears(size):
    """Forward and backward results of qkv, proj, fc1 and fc2, as 2D weight-stationary sums them."""
    over_r = [3 * h, h, 4 * h, 4 * h]
    over_c = [h, h, h, h]
    return [("all_reduce", size * x / c, r) for x in over_r] + [
        ("all_reduce", size * x / r, c) for x in over_c
    ]


SCHEMES = [
    (cf.megatron_1d(), [("all_reduce", T * h, p)] * 4),
    (cf.megatron_1d(), [("all_gather", T * h, p), ("reduce_scatter", T * h, p)] * 4),
    (cf.summa_ab(), [("all_gather", g * x / q, q) for x in (7 * T * h, 12 * h**2)]),
    (cf.summa_abt(), [("all_gather", g * x / q, q) for x in (4 * T * h, 12 * h**2)]),
    (cf.weight_stationary(), linears(T)),
    (
        cf.batch_tensor(),
        [("all_reduce", T * h / a, N)] * 4 + [("all_reduce", 12 * h**2 / N, a)],
    ),
    (cf.fully_sharded(), [("all_gather", g * 12 * h**2, p), ("slice", h, p)]),
]


@pytest.mark.parametrize(("formula", "collectives"), SCHEMES)
def test_each_formula_is_the_volume_of_its_collectives(formula, collectives):
    assert sympy.simplify(formula - sent_volume(collectives)) == 0


def test_symbolic_and_exact_counts_are_one():
    for kind in ("all_gather", "all_reduce", "all_to_all", "reduce_scatter"):
        exact = sent_bytes(kind, 1000, 3)
        assert sent_volume([(kind, Integer(1000), Integer(3))]) == sympy.Rational(exact)


@pytest.mark.parametrize(
    ("other", "tokens"),
    [
        (cf.summa_ab(Integer(2), Integer(3)), 12 * h),
        (cf.summa_abt(Integer(2), Integer(3)), 3 * h),
        (cf.batch_tensor(Integer(2), Integer(2)), sympy.Rational(3, 2) * h),
    ],
)
def test_where_four_ranks_do_better_than_megatron(other, tokens):
    assert sympy.simplify(cf.crossover(cf.megatron_1d(Integer(4)), other) - tokens) == 0


def test_equal_or_parallel_volumes_never_cross():
    assert cf.crossover(cf.megatron_1d(Integer(4)), cf.megatron_1d(Integer(4))) is None
    assert cf.crossover(cf.megatron_1d(Integer(4)), cf.megatron_1d(Integer(8))) is None


def test_a_volume_prints_as_one_short_formula():
    assert str(sent_volume([("all_reduce", T * h, p)] * 4)) == "8*b*h*s*(p - 1)/p"
