"""Collectives of two levels on real ranks: four of gloo, taken for two nodes of two."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp import schemes
from autotp.cost_model.cluster import Link, bandwidth_bound
from autotp.cost_model.levels import STAGES, between_share
from autotp.dist_axis import dist_axes
from autotp.errors import RuntimeStateError
from tests.end_to_end.on_ranks import on_ranks
from tests.models import ResidualMLP

FAST = bandwidth_bound(1e11, latency_s=1e-7, flops_per_s=1e9)
TWO_NODES = replace(FAST, backend="gloo", ranks_per_node=2, inter=Link(1e-6, 1e9))


@on_ranks((4,))
def test_each_gives_what_one_level_gives_and_counts_what_leaves_a_node(grid):
    axis = dist_axes(init_device_mesh("cpu", grid, mesh_dim_names=("col",)))["col"]
    for dtype in (torch.int64, torch.float32, torch.complex64):  # whole numbers: sums are exact
        x = (torch.arange(24) + 100 * axis.index).to(dtype).reshape(4, 2, 3)
        for kind in STAGES:
            plain, two = (getattr(axis, kind)(x, by=by) for by in ("", "nodes_of_2"))
            assert torch.equal(plain, two)
    for kind, between in axis.sent_between.items():
        assert axis.sent[kind] == 2 * between / between_share(4, 2)
    assert axis.calls["all_reduce"] == 6
    with pytest.raises(RuntimeStateError, match="axis 'col' has no two levels by 'nodes_of_3'"):
        axis.all_gather(x, by="nodes_of_3")


@on_ranks((4,))
def test_groups_are_made_once(grid):
    axis = dist_axes(init_device_mesh("cpu", grid, mesh_dim_names=("col",)))["col"]
    inside, between = axis.over_nodes(2)
    assert axis.over_nodes(2) == (inside, between)
    found = [dist.get_process_group_ranks(part.group) for part in (inside, between)]
    node, place = divmod(axis.index, 2)
    assert found == [[2 * node, 2 * node + 1], [place, place + 2]]
    whole = torch.compile(lambda x: axis.all_gather(x, by="nodes_of_2") * 2, backend="eager")
    gathered = whole(torch.full((3,), float(axis.index)))
    assert gathered.tolist() == [[2.0 * rank] * 3 for rank in range(4)]


@on_ranks((1, 4), (4, 1))
def test_training_over_two_nodes_is_training_on_one_device(grid):
    torch.manual_seed(0)
    scheme = schemes.fsdp if grid[0] > 1 else schemes.megatron
    model, whole = ResidualMLP().double(), ResidualMLP().double()
    whole.load_state_dict(model.state_dict())
    inputs = dict(x=torch.randn(8, 12).double(), y=torch.randn(8, 12).double())
    pins = scheme(model, grid, inputs)
    parallel = autotp.parallelize(model, grid, inputs, cluster=TWO_NODES, pins=pins)
    assert [members for _, members in parallel.plan.levels()] == [2]
    axes = parallel._autotp.axes.values()
    for axis in axes:
        axis.reset_sent()
    steps = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (parallel, whole)]
    for step in range(3):
        losses = [m(**inputs) for m in (parallel, whole)]
        torch.testing.assert_close(*losses)
        for loss, optimizer in zip(losses, steps, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step == 0:
            sent = {(k, a.name): n for a in axes for k, n in a.sent.items() if n}
            between = {(k, a.name): n for a in axes for k, n in a.sent_between.items()}
            assert sent == {k: n for k, n in parallel.plan.sent().items() if n}
            assert between == parallel.plan.sent_between()
    for name, value in autotp.full_state_dict(parallel).items():
        torch.testing.assert_close(value, whole.state_dict()[name])
