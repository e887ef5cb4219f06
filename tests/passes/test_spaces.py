"""Layouts as numbers say of each what the functions of one layout say."""

import itertools
import math

import pytest

from autotp.grid import as_grid
from autotp.layouts import I, P, R, is_valid, largest_shape, may_change, move_of, shard
from autotp.passes.spaces import elements, legal, picks_of, space

TYPES = (I, R, P, shard(0), shard(0, (4, 4)), shard(1), shard(1, (3, 6)), shard(2))


@pytest.mark.parametrize("shape", [(8, 9, 5), (12, 9), (8,), (8, 9, 16)])
@pytest.mark.parametrize("sizes", [(2,), (2, 3), (4, 1, 2)])
def test_layouts_as_numbers(shape, sizes):
    grid, options = as_grid(sizes), tuple(TYPES if n > 1 else (I,) for n in sizes)
    every = picks_of(TYPES, options)
    layouts = list(itertools.product(*options))
    assert [tuple(TYPES[k] for k in row) for row in every.tolist()] == layouts
    valid = [is_valid(shape, c, grid) for c in layouts]
    assert legal(shape, TYPES, every, grid).tolist() == valid
    found = space(TYPES, every[legal(shape, TYPES, every, grid)])
    assert list(found.layouts) == [c for c, v in zip(layouts, valid, strict=True) if v]
    held = elements(shape, TYPES, found.picks, grid)
    assert held.tolist() == [math.prod(largest_shape(shape, c, grid)) for c in found.layouts]
    led = {
        (c.axis, found.layouts[k], found.layouts[j])
        for c in found.changes
        for k, j in zip(c.starts.tolist(), c.ends.tolist(), strict=True)
    }
    assert led == {
        (axis, before, after)
        for before, after in itertools.permutations(found.layouts, 2)
        for axis in [
            a for a, pair in enumerate(zip(before, after, strict=True)) if len({*pair}) > 1
        ]
        if (*before[:axis], *before[axis + 1 :]) == (*after[:axis], *after[axis + 1 :])
        if move_of(before[axis], after[axis]) and may_change(before, axis, after[axis])
    }
