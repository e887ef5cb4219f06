"""Every algorithm of a collective does what the plain one does, forward and backward."""

from functools import partial

import pytest
import torch

from autotp.axis import run_ranks
from autotp.collectives import (
    all_gather,
    all_reduce,
    invariant_to_replicate,
    reduce_scatter,
    slice_to_shard,
)
from autotp.cost_model.collectives import OTHERS, sent_bytes, wire_bytes_by
from autotp.grid import Grid
from autotp.layouts import I, P, R, Shard
from autotp.together import all_gather_together
from tests.runtime.shards import check

GATHER, SCATTER, REDUCE = (OTHERS[k] for k in ("all_gather", "reduce_scatter", "all_reduce"))
BLOCKS = Shard(1, (12, 24))


def moves():
    """Yield a name, a move, its types before and after, and the collectives that it calls."""
    for by in GATHER:
        for back in SCATTER:
            yield (f"S->R {by} {back}", partial(all_gather, dim=0, size=7, by=by, back_by=back)), (
                (Shard(0), R), {"all_gather": by, "reduce_scatter": back})  # fmt: skip
            yield (f"P->S {back} {by}", partial(reduce_scatter, dim=0, by=back, back_by=by)), (
                (P, Shard(0)), {"all_gather": by, "reduce_scatter": back})  # fmt: skip
        blocks = partial(all_gather, dim=1, parts=BLOCKS.parts, to="I", by=by)
        yield (f"S->I {by}", blocks), ((BLOCKS, I), {"all_gather": by})
        sliced = partial(slice_to_shard, dim=0, back_by=by)
        yield (f"I->S {by}", sliced), ((I, Shard(0)), {"all_gather": by})
    for by in REDUCE:
        yield (f"P->I {by}", partial(all_reduce, to="I", by=by)), ((P, I), {"all_reduce": by})
        back = partial(invariant_to_replicate, back_by=by)
        yield (f"I->R {by}", back), ((I, R), {"all_reduce": by})
        both = partial(all_reduce, by=by, back_by=by)
        yield (f"P->R {by}", both), ((P, R), {"all_reduce": by})


MOVES = list(moves())


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("move", "does"), MOVES, ids=[m[0][0] for m in MOVES])
def test_every_algorithm_keeps_value_and_gradient_and_counts_its_bytes(move, does, ranks):
    (before, after), called = does
    whole = torch.randn(7, 36, dtype=torch.float64)  # seven rows divide among no group
    axes = check(
        lambda axes, x: move[1](x, axes["col"]),
        lambda x: x * 1,
        [(whole, (before,))],
        (after,),
        Grid(("col",), (ranks,)),
    )
    calls = 2 if move[0].startswith("P->R") else 1
    rows = -(-7 // ranks) * ranks if Shard(0) in (before, after) else 7
    for kind, by in called.items():
        size = wire_bytes_by(kind, by, rows * 36 * 8, ranks, 8)
        assert axes["col"].sent[kind] == calls * sent_bytes(kind, size, ranks, by)
        assert axes["col"].calls[kind] == calls


@pytest.mark.parametrize("by", GATHER)
@pytest.mark.parametrize("back_by", SCATTER)
def test_shared_calls_take_an_algorithm_too(by, back_by):
    check(
        lambda axes, x: all_gather_together([x], axes["col"], [0], by=by, back_by=back_by)[0],
        lambda x: x * 1,
        [(torch.randn(6, 5, dtype=torch.float64), (Shard(0),))],
        (R,),
        Grid(("col",), (3,)),
    )


@pytest.mark.parametrize("by", REDUCE)
def test_all_ranks_get_the_same_bits_of_a_sum(by):
    x = torch.randn(4, 1001)
    sums = run_ranks(Grid(("col",), (4,)), lambda r, axes: axes["col"].all_reduce(x[r], by=by))
    assert all(torch.equal(sums[0], other) for other in sums)


def test_a_largest_value_is_no_sum():
    (most,) = set(
        run_ranks(
            Grid(("col",), (3,)),
            lambda r, axes: float(axes["col"].all_reduce(torch.tensor(r), op="max")),
        )
    )
    assert most == 2
