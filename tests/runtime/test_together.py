"""Moves of several tensors by one call: each is what its own call makes, forward and backward."""

import pytest
import torch

from autotp.axis import run_ranks
from autotp.collectives import all_gather, invariant_to_replicate
from autotp.grid import Grid
from autotp.layouts import Shard, take_shard
from autotp.together import (
    all_gather_together,
    begin_gather,
    begin_replicate,
    invariant_to_replicate_together,
)

GRID = Grid(("col",), (3,))
SHAPES = [(7, 4), (6,), (4, 5, 6), (12, 2)]
SHARDS = [Shard(0), Shard(0), Shard(1), Shard(0, (3, 6, 3))]


def wholes():
    numbers = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=numbers) for shape in SHAPES]


def tensors(axis, trained, move):
    local = wholes()
    if move is gathered:
        pairs = zip(local, SHARDS, strict=True)
        local = [take_shard(w, (t,), GRID, (axis.index,)) for w, t in pairs]
    return [x.requires_grad_(k in trained) for k, x in enumerate(local)]


def gathered(xs, axis, to, together, early=False):
    dims, parts = [t.dim for t in SHARDS], [t.parts for t in SHARDS]
    sizes = [shape[t.dim] for shape, t in zip(SHAPES, SHARDS, strict=True)]
    if together:
        given = begin_gather(xs, axis, dims, parts, sizes, to) if early else xs
        return all_gather_together(given, axis, dims, parts, sizes, to)
    return [
        all_gather(x, axis, *where, to) for x, *where in zip(xs, dims, parts, sizes, strict=True)
    ]


def replicated(xs, axis, to, together, early=False):
    if not together:
        return [invariant_to_replicate(x, axis) for x in xs]
    return invariant_to_replicate_together(begin_replicate(xs, axis) if early else xs, axis)


@pytest.mark.parametrize("move", [gathered, replicated])
@pytest.mark.parametrize("to", ["R", "I"])
@pytest.mark.parametrize("trained", [(0, 1, 2, 3), (1, 3)], ids=["all", "some"])
@pytest.mark.parametrize("used", [(0, 1, 2, 3), (0, 3)], ids=["all used", "some used"])
@pytest.mark.parametrize("early", [False, True], ids=["at once", "early"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "differentiated twice"])
def test_one_call_is_what_many_are(move, to, trained, used, twice, early):
    def run(rank, axes, together):
        xs = tensors(axes["col"], trained, move)
        made = move(xs, axes["col"], to, together, early)
        scale = 1.0 + (rank if to == "R" else 0)
        loss = sum((made[k] ** 3).sum() * scale for k in used)
        params = [xs[k] for k in trained]
        grads = torch.autograd.grad(loss, params, allow_unused=True, create_graph=twice)
        if twice:
            given = [g for g in grads if g is not None]
            grads = torch.autograd.grad(sum(g.sum() for g in given), params, allow_unused=True)
        return made, grads, axes["col"].calls

    one = run_ranks(GRID, lambda rank, axes: run(rank, axes, True))
    many = run_ranks(GRID, lambda rank, axes: run(rank, axes, False))
    for (made, grads, calls), (mine, own, apart) in zip(one, many, strict=True):
        torch.testing.assert_close(made, mine)
        assert [g is None for g in grads] == [g is None for g in own]
        torch.testing.assert_close(
            [g for g in grads if g is not None], [g for g in own if g is not None]
        )
        if not twice:
            assert all(calls[kind] == 1 < n or n == 1 for kind, n in apart.items())


def test_bytes_are_those_of_many_calls():
    def run(rank, axes, together):
        made = gathered(tensors(axes["col"], (0, 1, 2, 3), gathered), axes["col"], "R", together)
        sum(x.sum() for x in made).backward()
        return axes["col"].sent

    sent = [run_ranks(GRID, lambda r, axes, t=t: run(r, axes, t)) for t in (True, False)]
    assert sent[0] == sent[1]


def test_without_gradients_nothing_is_watched():
    def run(rank, axes):
        xs = tensors(axes["col"], (0, 1), gathered)
        with torch.no_grad():
            made = replicated(xs, axes["col"], "R", True), gathered(xs, axes["col"], "R", True)
        assert not any(x.requires_grad for x in made[1])
        assert all(x is y for x, y in zip(made[0], xs, strict=True))

    run_ranks(GRID, run)
