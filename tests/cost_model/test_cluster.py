import math

import pytest

from autotp.cost_model.cluster import CLUSTERS, by_name, crossing, dgx_a100, dgx_h100
from autotp.errors import AutotpError


@pytest.mark.parametrize("name", sorted(CLUSTERS))
def test_a_cluster_is_found_by_its_name_and_is_a_value(name):
    cluster = by_name(name)
    assert cluster.name == name and cluster == by_name(name) and hash(cluster)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AutotpError, match="dgx_a100, dgx_h100"):
        by_name("abacus")


@pytest.mark.parametrize(
    ("sizes", "axis", "inside"),
    [((8,), 0, True), ((16,), 0, False), ((2, 8), 1, True), ((2, 8), 0, False), ((2, 4), 0, True)],
)
def test_the_last_axes_stay_inside_a_node(sizes, axis, inside):
    cluster = dgx_h100()
    assert (cluster.link(sizes, axis) is cluster.intra) == inside


def test_one_rank_per_node_has_its_own_card():
    cluster = dgx_a100()
    assert cluster.link((2, 8), 0) is cluster.inter


def test_a_ring_over_two_whole_nodes_drives_all_their_cards():
    cluster = dgx_a100()
    link = cluster.link((16,), 0)
    assert link.bandwidth_bytes_per_s == 8 * 25e9
    assert link.latency_s == pytest.approx((14 * 3.4e-6 + 14.0e-6) / 15)
    assert link.rate("all_to_all").bandwidth_bytes_per_s == pytest.approx(25e9 * 15 / 8)
    assert link.low_latency and link.low_latency.latency_s == pytest.approx((14 * 0.6 + 2.7) / 15e6)


def test_no_group_outruns_the_link_inside_its_node():
    cluster = dgx_h100()
    link = crossing(cluster.intra, cluster.inter, 9, 8)
    for kind in ("all_gather", "all_to_all"):
        assert link.rate(kind).bandwidth_bytes_per_s <= cluster.intra.bandwidth_bytes_per_s


def test_rates_by_dtype_take_names_and_torch_dtypes():
    import torch

    cluster = dgx_a100()
    assert cluster.matmul_flops_per_s(torch.bfloat16) == cluster.matmul_flops_per_s("bfloat16")
    assert cluster.matmul_flops_per_s("int64") == cluster.matmul_flops_per_s("float32")
    assert by_name("bandwidth_bound").matmul_flops_per_s("float64") == math.inf
