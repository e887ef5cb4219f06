"""From timings to a cluster: every figure is found where it belongs, on either clock."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotp.cost_model.calibration import (
    AttentionTiming,
    Late,
    Measured,
    Overlap,
    ProductTiming,
    Seconds,
    StreamTiming,
    UpdateTiming,
    fit,
    typical,
)
from autotp.cost_model.cluster import gloo_loopback
from autotp.cost_model.collectives import collective_s
from autotp.cost_model.compute import op_s
from autotp.cost_model.link_fit import Timing
from autotp.cost_model.optimizer import UPDATE_TRAFFIC, update_s

KINDS = ("all_gather", "all_reduce", "all_to_all", "permute", "reduce_scatter")


def product(dtype, shape, flops_per_s):
    seconds = 2 * shape[0] * shape[1] * shape[2] / flops_per_s
    return ProductTiming(dtype, shape, (seconds,) * 3, (seconds / 2,) * 3)


def measured(products=(), places=((2, 2, 1e9),), overlap=None, late=None):
    """Timings of a machine: `places` are (ranks, members, bytes per second)."""
    return Measured(
        backend="gloo",
        world_size=4,
        ranks_per_node=2,
        collectives=tuple(
            Timing(kind, ranks, members, size, 1e-3 + size / rate, 1e-4 + size / rate / 4)
            for ranks, members, rate in places
            for kind in KINDS
            for size in (2**12, 2**16, 2**20, 2**24)
        ),
        products=tuple(products) or (product("float32", (512, 512, 512), 5e10),),
        streams=(
            StreamTiming("copy", 2 * 10**6, 1e-4, 5e-5),
            StreamTiming("add", 3 * 10**6, 1.5e-4, 5e-5),
            StreamTiming("gelu", 6 * 10**6, 2e-3, 1e-3),
        ),
        op_overhead=Seconds(4e-6, 3e-6),
        overlap=overlap,
        memory_bytes=6e9,
        late=late,
    )


@given(st.integers(0, 2**32), st.floats(1e-6, 10))
def test_outliers_do_not_move_what_is_typical(seed, truth):
    rng = random.Random(seed)
    repeats = [truth * rng.uniform(0.97, 1.03) for _ in range(8)]
    repeats += [truth * rng.uniform(5, 1000) for _ in range(3)]
    assert typical(repeats) == pytest.approx(truth, rel=0.03)


def test_attention_has_a_rate_of_its_own():
    timed = (AttentionTiming("float32", 10**9, 0.05, 0.04),)
    wall, cpu = (fit(replace(measured(), attention=timed), "x", c) for c in ("wall", "cpu"))
    taken = [op_s(10**9, 0, "float32", c, attention=True) - c.op_overhead_s for c in (wall, cpu)]
    assert taken == pytest.approx([0.05, 0.04])
    assert op_s(10**9, 0, "float32", wall) < taken[0]  # products alone are faster
    assert wall.attention_rate("float64") == wall.matmul_flops_per_s("float64")


def test_what_caches_hold_is_read_faster():
    timed = tuple(
        StreamTiming(name, times * n, times * n / rate, times * n / rate / 2)
        for n, rate in ((10**5, 4e10), (10**6, 5e10), (10**7, 1e10))  # noise: it cannot rise
        for name, times in (("copy", 2), ("add", 3))
    )
    gelu = measured().streams[-1:]
    cluster = fit(replace(measured(), streams=(*timed, *gelu)), "x")
    sizes = np.array([1.0, 2.5e5, 2.5e6, 8e6, 2.5e7, 1e12])
    rates = cluster.stream_rate(sizes)
    assert rates[[0, 1, 2, 4, 5]] == pytest.approx([4e10, 4e10, 4e10, 1e10, 1e10])
    assert 1e10 < rates[3] < 4e10 and cluster.memory_bandwidth_bytes_per_s == pytest.approx(1e10)
    taken = op_s(0 * sizes, sizes, "float32", cluster)
    assert (np.diff(taken) > 0).all()
    alone = [op_s(0, n, "float32", cluster) for n in sizes.tolist()]
    assert alone == pytest.approx(taken.tolist())
    assert fit(replace(measured(), streams=(*timed, *gelu)), "x", "cpu").stream_rate(1) > 6e10


def test_every_figure_on_either_clock():
    wall, cpu = fit(measured(), "here"), fit(measured(), "here", "cpu")
    assert wall.name == "here" and wall.ranks_per_node == 2 and wall.memory_bytes == 6e9
    assert wall.memory_bandwidth_bytes_per_s == pytest.approx(2e10)
    assert cpu.memory_bandwidth_bytes_per_s == pytest.approx(5e10)
    assert wall.pointwise_bytes_per_s == pytest.approx(3e9)
    assert (wall.op_overhead_s, cpu.op_overhead_s) == (4e-6, 3e-6)
    assert cpu.matmul_flops_per_s("float32") == pytest.approx(1e11)


@pytest.mark.parametrize(("cores", "slower"), [(0.0, 1.0), (2.0, 1.0), (0.5, 1.0), (0.1, 5.0)])
def test_ranks_that_share_cores_take_turns(cores, slower):
    """A product's CPU-seconds are half of its wall clock's: too many for less than half a core."""
    alone, shared = fit(measured(), "here"), fit(replace(measured(), cores=cores), "here")
    assert shared.matmul_flops_per_s("float32") * slower == pytest.approx(
        alone.matmul_flops_per_s("float32")
    )
    rates = [c.memory_bandwidth_bytes_per_s for c in (shared, alone)]
    assert rates[0] < rates[1] if slower > 1 else rates[0] == rates[1]
    assert shared.intra == alone.intra  # all ranks took part in these
    assert fit(replace(measured(), cores=cores), "here", "cpu") == fit(measured(), "here", "cpu")


def test_updates_take_so_much_a_parameter_and_for_each_byte():
    small, large = 16 * 3e-4, 3e-4 + 1e-3
    timed = UpdateTiming(16, 32, small, small / 2), UpdateTiming(1, 4 * 10**6, large, large / 2)
    wall, cpu = (fit(replace(measured(), updates=timed), "here", c) for c in ("wall", "cpu"))
    for size_bytes in (32, 4 * 10**6):
        expected = 3e-4 + size_bytes / 4e9
        assert update_s(size_bytes, "float32", wall) == pytest.approx(expected, rel=1e-3)
        assert update_s(size_bytes, "float32", cpu) == pytest.approx(expected / 2, rel=1e-3)


def test_updates_that_were_not_measured_are_traffic():
    cluster = gloo_loopback()
    traffic = op_s(0, UPDATE_TRAFFIC * 10**6, "float32", cluster)
    assert update_s(10**6, "float32", cluster) == traffic


def test_each_class_of_link_has_its_own_rates():
    places = ((2, 2, 8e9), (2, 1, 1e8), (4, 2, 2e8))
    cluster = fit(measured(places=places), "two nodes")
    inside, between, across = (cluster.link(*at) for at in (((2, 2), 1), ((2, 2), 0), ((4,), 0)))
    assert inside is cluster.intra and between is cluster.inter
    assert across is dict(cluster.crossings)[2]
    rates = [x.rate("permute", 2).bandwidth_bytes_per_s for x in (inside, between, across)]
    assert rates == pytest.approx([8e9, 1e8, 2e8], rel=0.05)


def test_one_node_has_one_link():
    cluster = fit(measured(), "one node")
    assert cluster.inter == cluster.intra and not cluster.crossings


def test_narrow_products_are_slower_and_the_ladder_rises():
    shapes = {1: 1e10, 8: 3e10, 32: 2.5e10, 512: 5e10}
    products = [product("float32", (n, 512, 512), rate) for n, rate in shapes.items()]
    cluster = fit(measured([*products, product("float16", (128,) * 3, 3e9)]), "narrow")
    reached = [cluster.matmul_flops_per_s("float32", n) for n in (1, 8, 32, 512, 4096)]
    assert reached == sorted(reached) and reached[0] == pytest.approx(1e10)
    assert reached[1] == reached[2]  # pooled: noise made it fall
    assert reached[3] == reached[4] == pytest.approx(5e10) == cluster.matmul_flops_per_s("float32")
    assert cluster.matmul_flops_per_s("float16", 1) == pytest.approx(3e9)
    flops = 2 * 512 * 512
    assert op_s(flops, 0, "float32", cluster, narrowest=1) == pytest.approx(flops / 1e10 + 4e-6)


@pytest.mark.parametrize(
    ("seconds", "share"), [((1, 2, 3), 0), ((1, 2, 2), 1), ((2, 1, 2.5), 0.5), ((1, 1, 9), 0)]
)
def test_overlap_is_the_share_of_the_shorter_that_is_hidden(seconds, share):
    timed = Overlap(*(Seconds(s, s / 2) for s in seconds))
    assert fit(measured(overlap=timed), "x").overlap == share
    assert fit(measured(overlap=timed), "x", "cpu").overlap == 0  # CPU-seconds add up


@pytest.mark.parametrize(("cores", "share"), [(0.0, 1.0), (1.0, 0.5), (0.75, 1 / 3), (0.5, 0.0)])
def test_what_keeps_the_cores_busy_hides_nothing(cores, share):
    """Short samples run while other ranks wait, whose turn comes all the same."""
    timed = Overlap(Seconds(1, 0.5), Seconds(1, 1), Seconds(1, 1.5))
    found = fit(replace(measured(overlap=timed), cores=cores), "x").overlap
    assert found == pytest.approx(share)


@pytest.mark.parametrize(
    ("cores", "wall_s"),
    [
        (0.0, 1.0),  # every rank has a device of its own
        (1.0, 1.0),
        (0.8, 0.5),  # ranks take turns: half a second of these is in the products' price
        (0.5, 0.0),
    ],
)
def test_a_collective_after_compute_pays_for_ranks_that_come_late(cores, wall_s):
    timed = Late(Seconds(1, 0.1), Seconds(3, 0.3), Seconds(2, 2), Seconds(4, 2.4))
    found = replace(measured(late=timed), cores=cores)
    assert fit(found, "x").intra.call_s == pytest.approx(wall_s)
    by_cpu = fit(found, "x", "cpu").intra
    assert by_cpu.call_s == pytest.approx(0.2)
    once = collective_s("all_reduce", 4096, 4, by_cpu, "gloo")
    assert once == pytest.approx(
        0.2 + collective_s("all_reduce", 4096, 4, replace(by_cpu, call_s=0), "gloo")
    )
