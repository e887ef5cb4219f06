"""Attention with its sequence split, against the whole op: precisions, masks, grids, bytes."""

import pytest
import torch
import torch.nn.functional as F

from autotp.grid import Grid
from autotp.layouts import I, R, Shard
from autotp.split_attention import split_attention, tour, way_home
from tests.runtime.shards import check
from tests.runtime.test_local_programs import CLOSE, DTYPES, LINE, SQUARE

CUBE = Grid(("z", "row", "col"), (2, 2, 2))
PLACES = {
    "rows": (LINE, ("col",), ()),
    "ring": (LINE, ("col",), ("col",)),
    "ring of four": (SQUARE, ("row", "col"), ("row", "col")),
    "rows of a ring": (SQUARE, ("row", "col"), ("col",)),
    "ring of eight": (CUBE, CUBE.names, CUBE.names),
}
ROWS, KEYS = 24, 27
MASKS = {
    "none": lambda dtype: None,
    "causal": lambda dtype: None,
    "window": lambda dtype: (torch.arange(ROWS)[:, None] - torch.arange(KEYS)).abs() < 4,
    "nothing seen": lambda dtype: torch.arange(ROWS)[:, None] % 3 > torch.zeros(KEYS),
    "additive": lambda dtype: torch.randn(3, 1, ROWS, KEYS, dtype=dtype),
    "lowest": lambda dtype: torch.full((ROWS, KEYS), torch.finfo(dtype).min, dtype=dtype),
    "padding": lambda dtype: torch.arange(KEYS).expand(3, 1, 1, KEYS) < 13,
}


def check_attention(place, mask, dtype=torch.float64, heads=(4, 4), spread=1.0):
    grid, s, t = PLACES[place]
    causal, seen = mask == "causal", MASKS[mask](dtype)
    rows = tuple(Shard(2) if n in s else I for n in grid.names)
    keys = tuple(Shard(2) if n in t else R if n in s else I for n in grid.names)
    masks = tuple(
        Shard(seen.ndim - 2) if n in s and seen.shape[-2] > 1 else R if n in s else I
        for n in grid.names
    ) if seen is not None else None  # fmt: skip
    options = dict(scale=0.4, enable_gqa=heads[0] != heads[1])

    def split(axes, q, k, v, m):
        own = dict(split_s=[axes[n] for n in s], split_t=[axes[n] for n in t])
        sizes = dict(size_s=ROWS, size_t=KEYS)
        return split_attention(q, k, v, m, 0.0, causal, **options, **own, **sizes)

    def whole(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, m, 0.0, causal, **options)

    inputs = [
        (spread * torch.randn(3, heads[0], ROWS, 8, dtype=dtype), rows),
        (torch.randn(3, heads[1], KEYS, 8, dtype=dtype), keys),
        (torch.randn(3, heads[1], KEYS, 6, dtype=dtype), keys),
        None if seen is None else (seen, masks),
    ]
    return check(split, whole, inputs, rows, grid, **CLOSE[dtype])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("place", PLACES)
def test_split_attention(place, mask):
    check_attention(place, mask)


@DTYPES
@pytest.mark.parametrize("mask", ["causal", "nothing seen", "additive"])
def test_the_ring_in_every_precision(dtype, mask):
    check_attention("ring", mask, dtype)


@pytest.mark.parametrize("mask", ["causal", "additive"])
def test_the_ring_with_fewer_key_heads(mask):
    check_attention("ring of four", mask, heads=(6, 2))


def test_large_scores_do_not_overflow():
    check_attention("ring", "causal", spread=300.0)


def test_blocks_go_round_once_and_their_gradients_home():
    axes = check_attention("ring", "causal")
    block = 9 * 3 * 4 * (8 + 6) * 8
    assert axes["col"].sent == {"permute": (2 + 2 + 3) * block}
    assert axes["col"].calls == {"permute": 7}


def test_a_tour_meets_every_rank_and_comes_home():
    for sizes in [(4,), (2, 3), (3, 2), (2, 2, 3)]:
        at = [0] * len(sizes)
        met = {tuple(at)}
        for axis in tour(sizes):
            at[axis] = (at[axis] + 1) % sizes[axis]
            met.add(tuple(at))
        assert len(met) == len(tour(sizes)) + 1 == torch.tensor(sizes).prod()
        home = way_home(sizes)
        assert all((n + home.get(a, 0)) % sizes[a] == 0 for a, n in enumerate(at))
