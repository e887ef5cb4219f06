"""The cheapest ways between layouts, against all ways of at most so many moves."""

import numpy as np
import pytest

from autotp.passes.move_table import closed


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
