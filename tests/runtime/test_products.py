"""Products whose exchange is part of them: values, gradients and bytes, against dense ones."""

import itertools
from functools import partial

import pytest
import torch

from autotp.axis import run_ranks
from autotp.cost_model.collectives import sent_bytes
from autotp.grid import Grid
from autotp.layouts import P, R, Shard
from autotp.live_bytes import LiveBytes
from autotp.products import SCHEDULES, gather_matmul, matmul_scatter, panels_of
from tests.runtime.shards import check

B, T, O, I = 3, 12, 24, 36  # noqa: E741 - of 2, 3 and 4 ranks every chunk has two panels or more


def tensors(ndim, transposed):
    lead = (T,) if ndim == 2 else (B, T)
    x = torch.randn(*lead, I, dtype=torch.float64)
    weight = torch.randn(*((O, I) if transposed else (I, O)), dtype=torch.float64)
    return x, weight, torch.randn(O, dtype=torch.float64)


def dense(x, weight, bias=None, *, transposed):
    out = x @ (weight.mT if transposed else weight)
    return out if bias is None else out + bias


GATHERS = [  # what is moved, its dim in x or in [i, o], how the other rests, the result's type
    ("x", "t", R, R),
    ("weight", "o", R, R),
    ("x", "t", "o", "o"),
    ("x", "i", "o", "o"),
    ("weight", "i", "t", "t"),
    ("weight", "o", "t", "t"),
]


def types(ndim, transposed):
    """The shard of each factor in x, in the weight and in the result."""
    w = dict(zip("oi" if transposed else "io", (0, 1), strict=True))
    return dict(t=ndim - 2, i=ndim - 1), w, dict(t=ndim - 2, o=ndim - 1)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("by", SCHEDULES)
@pytest.mark.parametrize(("moved", "factor", "other", "made"), GATHERS)
@pytest.mark.parametrize(("ndim", "transposed", "biased"), [(2, False, True), (3, True, False)])
def test_what_is_gathered_on_the_way_is_multiplied_as_if_it_were_whole(
    ranks, by, moved, factor, other, made, ndim, transposed, biased
):
    x, weight, bias = tensors(ndim, transposed)
    xd, wd, yd = types(ndim, transposed)
    mine, its = (xd, wd) if moved == "x" else (wd, xd)
    shard, rest = Shard(mine[factor]), other if other is R else Shard(its[other])
    given = (
        [(x, (shard,)), (weight, (rest,))] if moved == "x" else [(x, (rest,)), (weight, (shard,))]
    )
    bias_type = Shard(0) if made == "o" else R

    def fn(axes, x, weight, bias=None):
        return gather_matmul(x, weight, axes["col"], mine[factor], by, bias, moved, transposed)

    axes = check(
        fn,
        partial(dense, transposed=transposed),
        [*given, *([(bias, (bias_type,))] if biased else [])],
        (made if made is R else Shard(yd[made]),),
        Grid(("col",), (ranks,)),
    )
    whole = x if moved == "x" else weight
    times = 1 if by == "ring" else 2  # panels are gathered again in backward
    sent = axes["col"].sent
    assert sent["all_gather"] == times * sent_bytes("all_gather", whole.nbytes, ranks)
    assert sent["reduce_scatter"] == sent_bytes("reduce_scatter", whole.nbytes, ranks)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("by", SCHEDULES)
@pytest.mark.parametrize("factor", ["t", "o"])
@pytest.mark.parametrize(("ndim", "transposed", "biased"), [(2, False, True), (3, True, False)])
def test_what_is_scattered_on_the_way_is_the_sum(ranks, by, factor, ndim, transposed, biased):
    x, weight, bias = tensors(ndim, transposed)
    xd, wd, yd = types(ndim, transposed)

    def fn(axes, x, weight, bias=None):
        return matmul_scatter(x, weight, axes["col"], yd[factor], by, bias, transposed)

    axes = check(
        fn,
        partial(dense, transposed=transposed),
        [(x, (Shard(xd["i"]),)), (weight, (Shard(wd["i"]),)), *([(bias, (P,))] if biased else [])],
        (Shard(yd[factor]),),
        Grid(("col",), (ranks,)),
    )
    size = x.nbytes // I * O
    for kind in ("all_gather", "reduce_scatter"):
        assert axes["col"].sent[kind] == sent_bytes(kind, size, ranks)


@pytest.mark.parametrize(("by", "moved"), list(itertools.product(SCHEDULES, ("x", "weight"))))
def test_a_gradient_may_be_differentiated_again(by, moved):
    x, weight, _ = tensors(2, False)

    def slope(axes, x, weight):
        y = gather_matmul(x, weight, axes["col"], 0, by, moved=moved)
        (g,) = torch.autograd.grad((y**2).sum(), x if moved == "x" else weight, create_graph=True)
        return g

    def dense_slope(x, weight):
        y = (x @ weight) * 1
        (g,) = torch.autograd.grad(
            (2 * y**2).sum(), x if moved == "x" else weight, create_graph=True
        )
        return g

    layouts = ((Shard(0),), (R,)) if moved == "x" else ((R,), (Shard(0),))
    check(
        slope,
        dense_slope,
        list(zip((x, weight), layouts, strict=True)),
        (Shard(0),),
        Grid(("col",), (2,)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_autocast_casts_what_it_casts_of_any_product(dtype):
    def made(rank, axes):
        x, weight = torch.ones(4, 4, dtype=dtype), torch.ones(4, 4, dtype=dtype)
        for bias in (None, torch.ones(4, dtype=dtype)):
            with torch.autocast("cpu", torch.bfloat16):
                plain = torch.nn.functional.linear(x, weight, bias)
                given = axes["col"], 0, "ring", bias
                out = gather_matmul(x, weight, *given), matmul_scatter(x, weight, *given)
            assert [y.dtype for y in out] == [plain.dtype] * 2

    run_ranks(Grid(("col",), (2,)), made)


@pytest.mark.parametrize("length", [1, 2, 6, 7, 12, 16, 25])
def test_panels_divide_a_chunk(length):
    assert length % panels_of(length) == 0 and panels_of(length) <= 4


def test_panels_never_hold_the_gathered_operand_whole():
    peak = {}
    for by in SCHEDULES:

        def one(rank, axes, by=by):
            x = torch.randn(64, 256, requires_grad=True)
            weight = torch.randn(8, 256, requires_grad=True)
            with LiveBytes() as live:
                gather_matmul(x, weight, axes["col"], 0, by, transposed=True).sum().backward()
            return live.peak

        peak[by] = max(run_ranks(Grid(("col",), (4,)), one))
    whole = 4 * 64 * 256 * 4
    assert peak["panels"] < whole < peak["ring"]
