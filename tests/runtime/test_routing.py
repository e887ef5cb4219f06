"""Rows that go where data says: the exchange itself; what uses it is proved with its rules."""

import pytest
import torch

from autotp.axis import run_ranks
from autotp.grid import Grid
from autotp.layouts import Shard, local_ranges
from autotp.routing import exchange, owner_places, split_index_select
from tests.runtime.shards import check
from tests.runtime.test_collectives import LINE, SQUARE

CUBE = Grid(("z", "row", "col"), (2, 2, 3))


@pytest.mark.parametrize("grid", [LINE, SQUARE, CUBE], ids=str)
def test_an_exchange_brings_rows_to_their_targets_and_gradients_back(grid):
    count, ranks = 40, grid.world_size
    source, target = torch.randint(ranks, (2, count)).unbind()
    whole = torch.randn(count, 3)

    def one(rank, axes):
        rows = whole[source == rank].requires_grad_()
        got = exchange(rows, source, target, tuple(axes.values()), 7)
        (got * got.detach()).sum().backward()
        return got.detach(), rows.grad, [a.sent for a in axes.values()]

    for rank, (got, grad, sent) in enumerate(run_ranks(grid, one)):
        assert torch.equal(got, whole[target == rank])
        assert torch.equal(grad, whole[source == rank])
        wire = 2 * 7 * 3 * 4
        assert sent == [{"all_to_all": wire - wire / n} for n in grid.sizes]


def test_a_rank_may_send_and_get_nothing():
    def one(rank, axes):
        source, target = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)
        return exchange(torch.ones(4 * (rank == 0), 2), source, target, tuple(axes.values()), 4)

    assert [len(rows) for rows in run_ranks(LINE, one)] == [0, 4, 0]


@pytest.mark.parametrize("size", [24, 23, 13])
def test_owners_are_those_that_hold_the_chunks(size):
    axes = run_ranks(CUBE, lambda rank, axes: tuple(axes.values()))[0]
    places = owner_places(torch.arange(size), size, axes)
    for coords in CUBE.all_coords():
        mine = torch.ones(size, dtype=torch.bool)
        for place, here in zip(places, coords, strict=True):
            mine &= place == here
        ((low, high),) = local_ranges(size, (Shard(0),) * 3, 0, CUBE, coords)
        assert mine.nonzero().flatten().tolist() == list(range(low, high))


@pytest.mark.parametrize("grid", [SQUARE, CUBE], ids=str)
def test_a_lookup_whose_table_and_indices_are_split_over_all_axes(grid):
    chunks = (Shard(0),) * len(grid.names)

    def split(axes, table, index):
        own = tuple(axes[name] for name in grid.names)
        both = dict(split_v=own, size_v=25, split_k=own, size_k=23)
        return split_index_select(table, 0, index, **both)

    inputs = [(torch.randn(25, 3), chunks), (torch.randint(25, (23,)), chunks)]
    check(split, lambda table, index: table.index_select(0, index), inputs, chunks, grid)
