"""The fit of a link: known lines are recovered from noise, and no noise breaks an order."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotp.cost_model.calibration import typical
from autotp.cost_model.cluster import Cluster
from autotp.cost_model.collectives import collective_s, plain_s
from autotp.cost_model.levels import fits, members_of
from autotp.cost_model.link_fit import TRIANGLES, TWO_LEVELS, fit_lines, fit_link, triangles
from autotp.grid import as_grid
from autotp.layouts import I, P, R, Shard, move_of
from autotp.passes.moves import Moves

KINDS = ("all_gather", "all_reduce", "all_to_all", "permute", "reduce_scatter")
NODES = sorted({way.format("nodes_of_2") for way, _ in TWO_LEVELS})
WAYS = sorted({*KINDS, *NODES, *(w for way, chain in TRIANGLES for w in (way, *chain))})
SIZES = [2.0**k for k in range(12, 25, 2)]


def true_lines(latency_s, bandwidth, groups):
    """A link on which every step costs the same: its lines obey every order."""
    rounds = {"all_reduce": 2}
    return {
        (kind, n): (
            (1 if kind == "permute" else rounds.get(kind, 1) * (n - 1)) * latency_s,
            (1 if kind == "permute" else rounds.get(kind, 1) * (n - 1) / n) / bandwidth,
        )
        for kind in KINDS
        for n in groups
    }


def timings(lines, rng, noise, outliers, repeats=9):
    """Repeats of every line at every size; some take up to thirty times as long."""
    out = {}
    for cell, (a, b) in lines.items():
        out[cell] = []
        for x in SIZES:
            took = [
                (a + b * x)
                * (1 + rng.uniform(-noise, noise))
                * (rng.uniform(2, 30) if rng.random() < outliers else 1)
                for _ in range(repeats)
            ]
            out[cell].append((x, typical(took)))
    return out


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32),
    latency_s=st.floats(1e-6, 3e-3),
    bandwidth=st.floats(1e8, 3e11),
    groups=st.sampled_from([(2, 4), (2, 4, 8), (3, 6), (2,)]),
)
def test_lines_are_recovered_from_noise_and_outliers(seed, latency_s, bandwidth, groups):
    lines = true_lines(latency_s, bandwidth, groups)
    found = fit_lines(timings(lines, random.Random(seed), noise=0.04, outliers=0.15))
    for cell, (a, b) in lines.items():
        for x in SIZES:
            assert found[cell][0] + found[cell][1] * x == pytest.approx(a + b * x, rel=0.1)


def wild(seed, groups=(2, 4, 8), ways=WAYS):
    """Timings that contradict each other: each cell has a line of its own."""
    rng = random.Random(seed)
    lines = {
        (way, n): (10 ** rng.uniform(-6, -2), 10 ** rng.uniform(-11, -8))
        for way in ways
        for n in groups
        if not (m := members_of(way.partition(" by ")[2])) or fits(m, n)
    }
    return timings(lines, rng, noise=0.5, outliers=0.2, repeats=3)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_no_noise_breaks_an_order(seed):
    lines = fit_lines(wild(seed))
    for (kind, n), (a, b) in lines.items():
        assert a >= 0 and b > 0
        more = lines.get((kind, 2 * n), (np.inf, np.inf))
        assert a <= more[0] * (1 + 1e-6) + 1e-12 and b <= more[1] * (1 + 1e-6) + 1e-16
    for kind, chain in triangles(WAYS):
        for n in (m for m in (2, 4, 8) if all((k, m) in lines for k in (kind, *chain))):
            a, b = lines[kind, n]
            share = 1 / n if kind == "all_to_all" else 1.0
            others = [lines[k, n] for k in chain]
            assert a <= sum(x for x, _ in others) * (1 + 1e-6) + 1e-12
            assert b * share <= sum(y for _, y in others) * (1 + 1e-6) + 1e-16


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.sampled_from([(4,), (2, 2), (2, 4), (8, 1)]),
    rows=st.sampled_from([8, 64, 1024]),
    levels=st.booleans(),
)
def test_one_move_of_an_axis_is_never_dearer_than_a_chain(seed, sizes, rows, levels):
    link = fit_link(wild(seed, ways=WAYS if levels else [w for w in WAYS if w not in NODES]))
    cluster = Cluster(
        name="wild",
        backend="gloo",
        ranks_per_node=64,
        intra=link,
        inter=link,
        flops_per_s=(("float32", 1e10),),
        memory_bandwidth_bytes_per_s=1e10,
        memory_bytes=1e9,
        op_overhead_s=1e-6,
    )
    moves, shape = Moves(as_grid(sizes), cluster), (rows, 64)
    types = (I, R, P, Shard(0)) if levels else (I, R, P, Shard(0), Shard(1))
    for grad in (False, True):
        table = moves.table(
            shape, torch.float32, grad, tuple((I,) if k else types for k in range(len(sizes)))
        )
        for (i, before), (j, after) in itertools.permutations(enumerate(table.layouts), 2):
            if move_of(before[0], after[0]) is not None:
                assert table.single[i, j] <= table.seconds[i, j] * (1 + 1e-6)


def test_rates_read_back_as_the_lines_they_are():
    lines = true_lines(1e-4, 1e9, (2, 4))
    link = fit_link({cell: [(x, a + b * x) for x in SIZES] for cell, (a, b) in lines.items()})
    for (kind, n), (a, b) in lines.items():
        for x in SIZES:
            assert collective_s(kind, x, n, link, "gloo") == pytest.approx(a + b * x)


def test_an_algorithm_reads_back_as_the_line_it_is():
    lines = {("all_gather", 4): (3e-3, 3e-9), ("all_gather by exchange", 4): (1e-3, 1e-9)}
    link = fit_link({cell: [(x, a + b * x) for x in SIZES] for cell, (a, b) in lines.items()})
    assert link.measured("all_gather") == ("exchange",) and not link.measured("all_reduce")
    for x in SIZES:
        assert plain_s("all_gather", x, 4, link, "gloo") == pytest.approx(3e-3 + 3e-9 * x)
        assert collective_s("all_gather", x, 4, link, "gloo") == pytest.approx(1e-3 + 1e-9 * x)


def test_a_group_size_between_those_measured_takes_the_smaller_one():
    lines = true_lines(1e-4, 1e9, (2, 8))
    link = fit_link({cell: [(x, a + b * x) for x in SIZES] for cell, (a, b) in lines.items()})
    assert [link.rate("all_gather", n).ranks for n in (1, 2, 7, 8, 64)] == [2, 2, 2, 8, 8]
