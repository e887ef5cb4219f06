from fractions import Fraction

import numpy as np
import pytest

from autotp.cost_model.cluster import Link, Rate, bandwidth_bound, dgx_h100, gloo_loopback
from autotp.cost_model.collectives import (
    FREE,
    PLAIN,
    ROUNDS,
    collective_s,
    fastest,
    sent_bytes,
    wire_bytes_by,
)
from autotp.layouts import MOVES

KINDS = sorted([*ROUNDS, "permute"])
CASES = [(backend, kind) for backend in PLAIN for kind in KINDS]


def test_every_move_of_the_layouts_has_a_price():
    kinds = {k for move in MOVES.values() for k in (move.forward, move.backward)}
    assert kinds <= FREE | set(KINDS)


def test_sent_bytes_are_exact_ring_counts():
    assert sent_bytes("all_gather", 16, 4) == 12 == sent_bytes("all_to_all", 16, 4)
    assert sent_bytes("all_reduce", 16, 4) == 24
    assert sent_bytes("reduce_scatter", 16, 3) == Fraction(32, 3)
    assert sent_bytes("permute", 16, 4) == 16
    assert sent_bytes("keep_one", 16, 4) == 0 == sent_bytes("all_reduce", 16, 1)
    assert sent_bytes("permute", 16, 1) == 0


def test_an_algorithm_sends_what_it_is_made_of():
    assert sent_bytes("reduce_scatter", 16, 4, "all_reduce") == 24
    assert sent_bytes("reduce_scatter", 16, 4, "exchange") == 12
    assert sent_bytes("all_gather", 16, 4, "ring") == 12
    assert sent_bytes("all_reduce", 24, 3, "scatter_gather") == 32
    assert wire_bytes_by("all_reduce", "scatter_ring", 20, 3, 4) == 24  # five floats, filled to six
    assert wire_bytes_by("all_reduce", "", 20, 3, 4) == 20


def test_the_fastest_of_the_measured_algorithms_is_the_price_at_every_size():
    rates = (Rate("all_gather", 1e-3, 1e9), Rate("all_gather", 1e-5, 1e8, by="ring"))
    link = Link(1e-3, 1e9, rates=rates)
    sizes = np.array([1e3, 1e5, 1e6, 1e7])
    chosen = [fastest("all_gather", int(x), 4, link, "gloo") for x in sizes]
    assert chosen == ["ring", "ring", "", ""]
    seconds = collective_s("all_gather", sizes, 4, link, "gloo")
    by = {"": (1e-3, 1e9), "ring": (1e-5, 1e8)}
    expected = [3 * (by[c][0] + x / 4 / by[c][1]) for x, c in zip(sizes, chosen, strict=True)]
    assert seconds == pytest.approx(expected)
    assert fastest("all_gather", 1, 4, Link(1e-3, 1e9), "gloo") == ""
    assert fastest("slice", 1, 4, link, "gloo") == "" == fastest("all_gather", 1, 1, link, "gloo")


@pytest.mark.parametrize("kind", KINDS)
def test_only_bytes_cost_on_a_bandwidth_bound_cluster(kind):
    cluster = bandwidth_bound(1e9)
    seconds = collective_s(kind, 2**20, 4, cluster.intra, cluster.backend)
    assert seconds == pytest.approx(float(sent_bytes(kind, 2**20, 4)) / 1e9)


@pytest.mark.parametrize(("backend", "kind"), CASES)
def test_an_array_of_sizes_gives_the_seconds_of_each(backend, kind):
    sizes = np.array([1e3, 1e5, 1e7, 1e9])
    link = dgx_h100().link((4, 8), 0)
    seconds = collective_s(kind, sizes, 4, link, backend)
    assert seconds.tolist() == [collective_s(kind, x, 4, link, backend) for x in sizes]
    assert (np.diff(seconds) > 0).all()


@pytest.mark.parametrize(("backend", "kind"), CASES)
def test_one_rank_and_free_moves_cost_nothing(backend, kind):
    link = gloo_loopback().intra
    assert collective_s(kind, 1e6, 1, link, backend) == 0
    assert collective_s("slice", 1e6, 4, link, backend) == 0


def test_short_messages_take_the_protocol_of_low_latency():
    link = dgx_h100().intra
    assert collective_s("all_reduce", 0.0, 8, link, "nccl") == pytest.approx(6.6e-6 + 14 * 0.6e-6)
    large = collective_s("all_reduce", 1e9, 8, link, "nccl")
    assert 1.75e9 / large == pytest.approx(370e9, rel=0.02)


def test_gloo_reduce_scatter_is_an_exchange_and_a_sum():
    link = Link(1e-4, 1e9, sum_bytes_per_s=1e10)
    pieces = collective_s("all_to_all", 1e7, 4, link, "gloo") + 1e7 / 1e10
    assert collective_s("reduce_scatter", 1e7, 4, link, "gloo") == pytest.approx(pieces)


MEASURED_MS = {  # medians of benchmarks/measure_gloo.py at 4 KiB, times four, up to 16 MiB
    ("all_reduce", 2): (1.68, 1.3, 1.7, 1.44, 2.84, 8.4, 21.39),
    ("all_reduce", 4): (5.62, 4.89, 6.01, 5.24, 6.32, 7.7, 30.04),
    ("all_gather", 2): (0.85, 1.36, 1.02, 1.51, 2.1, 5.41, 15.5),
    ("all_gather", 4): (3.07, 3.35, 3.05, 3.77, 4.47, 8.33, 33.22),
    ("all_to_all", 2): (0.68, 0.59, 0.5, 0.71, 2.28, 5.0, 14.05),
    ("all_to_all", 4): (1.23, 1.22, 1.26, 1.72, 2.51, 6.16, 19.09),
    ("reduce_scatter", 2): (0.89, 0.99, 0.87, 0.78, 1.95, 5.27, 17.42),
    ("reduce_scatter", 4): (1.63, 1.6, 1.6, 1.64, 3.37, 7.16, 24.0),
}


@pytest.mark.parametrize("case", MEASURED_MS, ids=str)
def test_gloo_is_predicted_within_the_spread_of_its_measurements(case):
    sizes = 4096.0 * 4.0 ** np.arange(7)
    predicted = collective_s(case[0], sizes, case[1], gloo_loopback().intra, "gloo")
    ratios = np.abs(np.log(1e3 * predicted / MEASURED_MS[case]))
    assert np.exp(np.median(ratios)) < 1.35 and np.exp(ratios.max()) < 1.75
