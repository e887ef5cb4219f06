"""Two levels: where a group has them, what is sent over each, and when they are the faster way."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import sympy

from autotp.cost_model.closed_forms import two_level_volume
from autotp.cost_model.cluster import Cluster, Link, Rate
from autotp.cost_model.collectives import (
    algorithms,
    collective_s,
    fastest,
    level_bytes,
    plain_s,
    sent_bytes,
    two_level_s,
)
from autotp.cost_model.levels import STAGES, between_share, fits, members_of, nodes_of

KINDS = sorted(STAGES)
SHAPES = [(4, 2), (6, 2), (6, 3), (8, 4), (64, 8)]
FAST, SLOW = Link(1e-6, 1e11), Link(1e-4, 1e9)


def nodes(members, intra=FAST, inter=SLOW, **more):
    """Nodes of so many ranks, on which only sending costs anything."""
    free = ((("float32", np.inf),), np.inf, np.inf, 0.0)
    return Cluster("nodes", "ring", members, intra, inter, *free, **more)


def test_a_name_says_how_many_ranks_a_node_has():
    assert [members_of(nodes_of(m)) for m in (2, 8, 12)] == [2, 8, 12]
    assert not any(map(members_of, ("", "ring", "nodes_of_", "nodes_of_x", "nodes_of_-2")))


def test_nodes_are_several_and_whole_and_have_several_ranks():
    assert [m for m in range(13) if fits(m, 12)] == [2, 3, 4, 6]
    assert algorithms("all_gather", 6) == ("exchange", "ring", "nodes_of_2", "nodes_of_3")
    assert algorithms("all_to_all", 4) == () == algorithms("permute", 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "members"), SHAPES)
def test_two_levels_send_what_one_sends_and_least_between_nodes(kind, ranks, members):
    inside, between = level_bytes(kind, 5040, ranks, members)
    by = nodes_of(members)
    assert inside + between == sent_bytes(kind, 5040, ranks, by) == sent_bytes(kind, 5040, ranks)
    assert between == between_share(ranks, members) * (inside + between)
    least = sent_bytes(kind, 5040, ranks // members)  # of a node, as though it were one rank
    assert members * between == least


@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_is_what_is_sent(kind):
    m, k = sympy.symbols("m k", positive=True)
    inside, between = two_level_volume(kind, sympy.Symbol("N"), m, k)
    for ranks, members in SHAPES:
        at = {m: members, k: sympy.Integer(ranks) / members, sympy.Symbol("N"): 5040}
        found = tuple(Fraction(int(x.p), int(x.q)) for x in (inside.subs(at), between.subs(at)))
        assert found == level_bytes(kind, 5040, ranks, members)
    whole = sympy.Symbol("N") * (m * k - 1) / (m * k) * (2 if kind == "all_reduce" else 1)
    assert sympy.simplify(inside + between - whole) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_price_is_that_of_the_stages(kind):
    link = nodes(2).link((4,), 0)
    steps, rounds = (1 + (kind == "all_reduce")), (1 + (kind == "all_reduce"))
    inside_s = rounds * (1e-6 + 1e6 / 2 / 1e11)
    between_s = steps * (1e-4 + 1e6 / 4 / 1e9)
    assert fastest(kind, 10**6, 4, link, "ring") == "nodes_of_2"
    assert collective_s(kind, 1e6, 4, link, "ring") == pytest.approx(inside_s + between_s)
    sizes = np.array([1e3, 1e6, 1e9])
    each = [collective_s(kind, x, 4, link, "ring") for x in sizes]
    assert collective_s(kind, sizes, 4, link, "ring").tolist() == pytest.approx(each)


def test_putting_blocks_in_order_costs_a_copy():
    slow = replace(nodes(2), memory_bandwidth_bytes_per_s=1e10, op_overhead_s=1e-3)
    levels = [cluster.link((4,), 0).levels for cluster in (nodes(2), slow)]
    for kind, copy_s in (("all_gather", 1e-3 + 2e8 / 1e10), ("all_reduce", 0.0)):
        free_s, paid_s = (two_level_s(kind, 1e8, 4, x, "ring") for x in levels)
        assert paid_s - free_s == pytest.approx(copy_s)


def test_one_level_stays_where_the_wire_between_is_as_fast():
    cluster = replace(nodes(2, intra=SLOW), memory_bandwidth_bytes_per_s=1e10)
    assert fastest("all_gather", 10**8, 4, cluster.link((4,), 0), "ring") == ""
    assert fastest("all_gather", 10**3, 4, cluster.link((4,), 0), "ring") == "nodes_of_2"  # 2 steps


@pytest.mark.parametrize(
    ("members", "grid", "axis", "by"),
    [
        (2, (4,), 0, "nodes_of_2"),
        (4, (4, 2), 0, "nodes_of_2"),  # two of the axis in each node, two apart
        (8, (16, 2, 2), 0, "nodes_of_2"),
        (4, (4, 4), 0, ""),  # one in each node
        (4, (2, 4), 1, ""),  # all in one node
        (4, (6,), 0, ""),  # a node and a half
        (8, (8, 3), 0, ""),  # three in one node, two in another
        (3, (2, 2), 0, ""),
    ],
)
def test_an_axis_has_two_levels_where_it_fills_nodes_evenly(members, grid, axis, by):
    assert fastest("all_gather", 10**6, grid[axis], nodes(members).link(grid, axis), "ring") == by


def test_what_was_measured_is_the_price_and_only_where_it_fits():
    rates = (Rate("all_gather", 1e-4, 1e9), Rate("all_gather", 1e-5, 1e10, by="nodes_of_2"))
    crossings = ((2, Link(1e-4, 1e9, rates=rates)),)
    cluster = nodes(2, crossings=crossings)
    link = cluster.link((4,), 0)
    assert fastest("all_gather", 10**6, 4, link, "gloo") == "nodes_of_2"
    assert collective_s("all_gather", 1e6, 4, link, "gloo") == pytest.approx(3 * (1e-5 + 2.5e-5))
    uneven = replace(cluster, ranks_per_node=8).link((8, 3), 0)
    assert fastest("all_gather", 10**6, 8, uneven, "gloo") == ""
    odd = cluster.link((5,), 0)
    costs = [price("all_gather", 1e6, 5, odd, "gloo") for price in (collective_s, plain_s)]
    assert costs[0] == costs[1]
