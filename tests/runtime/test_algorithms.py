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
from autotp.cost_model.collectives import OTHERS, algorithms, level_bytes, sent_bytes, wire_bytes_by
from autotp.cost_model.levels import members_of
from autotp.errors import RuntimeStateError
from autotp.grid import Grid
from autotp.layouts import I, P, R, Shard
from autotp.together import all_gather_together
from tests.runtime.shards import check

GATHER, SCATTER = OTHERS["all_gather"], OTHERS["reduce_scatter"]
BLOCKS = Shard(1, (12, 24))


def moves(ranks):
    """Yield a name, a move, its types before and after, and the collectives that it calls."""
    kinds = ("all_gather", "reduce_scatter", "all_reduce")
    gathers, scatters, reduces = (algorithms(kind, ranks) for kind in kinds)
    for by in gathers:
        for back in scatters:
            yield (f"S->R {by} {back}", partial(all_gather, dim=0, size=7, by=by, back_by=back)), (
                (Shard(0), R), {"all_gather": by, "reduce_scatter": back})  # fmt: skip
            yield (f"P->S {back} {by}", partial(reduce_scatter, dim=0, by=back, back_by=by)), (
                (P, Shard(0)), {"all_gather": by, "reduce_scatter": back})  # fmt: skip
        blocks = partial(all_gather, dim=1, parts=BLOCKS.parts, to="I", by=by)
        yield (f"S->I {by}", blocks), ((BLOCKS, I), {"all_gather": by})
        sliced = partial(slice_to_shard, dim=0, back_by=by)
        yield (f"I->S {by}", sliced), ((I, Shard(0)), {"all_gather": by})
    for by in reduces:
        yield (f"P->I {by}", partial(all_reduce, to="I", by=by)), ((P, I), {"all_reduce": by})
        back = partial(invariant_to_replicate, back_by=by)
        yield (f"I->R {by}", back), ((I, R), {"all_reduce": by})
        both = partial(all_reduce, by=by, back_by=by)
        yield (f"P->R {by}", both), ((P, R), {"all_reduce": by})


MOVES = [(n, *m) for n in (2, 3, 4) for m in moves(n)]
MOVES += [(n, *m) for n in (6,) for m in moves(n) if all(map(members_of, m[1][1].values()))]


@pytest.mark.parametrize(("ranks", "move", "does"), MOVES, ids=[f"{m[0]} {m[1][0]}" for m in MOVES])
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
        between = level_bytes(kind, size, ranks, members_of(by))[1] if members_of(by) else 0
        assert axes["col"].sent_between.get(kind, 0) == calls * between


@pytest.mark.parametrize("by", (*GATHER, "nodes_of_2"))
@pytest.mark.parametrize("back_by", (*SCATTER, "nodes_of_2"))
def test_shared_calls_take_an_algorithm_too(by, back_by):
    check(
        lambda axes, x: all_gather_together([x], axes["col"], [0], by=by, back_by=back_by)[0],
        lambda x: x * 1,
        [(torch.randn(8, 5, dtype=torch.float64), (Shard(0),))],
        (R,),
        Grid(("col",), (4,)),
    )


@pytest.mark.parametrize("by", algorithms("all_reduce", 4))
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


@pytest.mark.parametrize(("ranks", "members"), [(4, 1), (4, 3), (4, 4), (6, 4)])
def test_ranks_that_do_not_fill_several_nodes_are_refused(ranks, members):
    x, by = torch.randn(5), f"nodes_of_{members}"
    with pytest.raises(RuntimeStateError, match=f"axis 'col' has no two levels by '{by}'"):
        run_ranks(Grid(("col",), (ranks,)), lambda r, axes: axes["col"].all_reduce(x, by=by))


def test_who_waits_between_nodes_is_told_that_a_rank_stopped():
    def one(rank, axes):
        return rank == 3 or axes["col"].all_reduce(torch.ones(2), by="nodes_of_2")

    with pytest.raises(RuntimeStateError, match="rank 3 finished without taking part"):
        run_ranks(Grid(("col",), (4,)), one)
