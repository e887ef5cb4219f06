"""The cheapest ways between layouts, against all ways of at most so many moves; and copies."""

import numpy as np
import pytest
import torch

from autotp.cost_model.cluster import gloo_loopback
from autotp.grid import as_grid
from autotp.layouts import I, P, R, Shard
from autotp.passes.move_table import closed
from autotp.passes.moves import Moves


@pytest.mark.parametrize("seed", range(20))
def test_the_cheapest_ways_are_those_of_ever_more_moves(seed):
    r = np.random.default_rng(seed)
    count = int(r.integers(1, 40))
    single = np.where(r.random((count, count)) < 0.15, r.random((count, count)), np.inf)
    np.fill_diagonal(single, 0.0)
    given, ways = single.copy(), single
    for _ in range(count):
        ways = np.min(ways[:, :, None] + single[None], axis=1)
    assert closed(single) == pytest.approx(ways, rel=1e-12)
    assert np.array_equal(single, given)


BLOCKS = Shard(0, (4, 4))


@pytest.mark.parametrize(
    ("before", "after", "copies"),
    [
        (Shard(0), R, 0),
        (Shard(1), R, 2),  # gathered, and its gradient scattered
        (BLOCKS, R, 2),
        (P, Shard(1), 2),
        (I, Shard(1), 1),  # a slice; its gradient is gathered
        (Shard(1), I, 1),
        (Shard(0), Shard(1), 2),
        (Shard(1), BLOCKS, 4),
        (P, I, 0),
        (I, R, 0),
    ],
)
def test_what_lies_apart_in_memory_is_put_in_order_by_copies(before, after, copies):
    moves = Moves(as_grid((2,)), gloo_loopback(), params={"weight"})
    shape, types = (8, 6), ((I, R, P, Shard(0), Shard(1), BLOCKS),)
    plain, put = (moves.table(shape, torch.float32, True, types, is_put=on) for on in (False, True))
    at = plain.number[(before,)], plain.number[(after,)]
    (step,) = moves.path(plain, (before,), (after,), shape, torch.float32)
    copy_s = moves.kind_s("pad", step.size_bytes, 0)
    assert put.single[at] - plain.single[at] == pytest.approx(copies * copy_s, abs=1e-15)
    for value, table in (("x", put), ("weight", plain)):  # parameters share a buffer
        apart = moves.apart(value, shape, (before, after))
        kinds = [step.forward, step.backward]
        assert moves.move_s(kinds, step.size_bytes, 0, apart) == pytest.approx(table.single[at])


def test_a_dim_behind_others_of_one_element_lies_together():
    moves = Moves(as_grid((2,)), gloo_loopback())
    assert moves.apart("x", (1, 8, 6), (Shard(1), R)) == 0
    assert moves.apart("x", (2, 8, 6), (Shard(1), R)) == 1
