"""What backward is priced at is what autograd does: the bytes and the products of its kernels."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from autotp.cost_model.cluster import bandwidth_bound
from autotp.cost_model.optimizer import UPDATE_TRAFFIC
from autotp.grid import as_grid
from autotp.options import Options
from autotp.passes.planning import search_plan
from autotp.reading import inferred

BANDWIDTH = 1e9
ROWS, WIDTH = 6, 8


class Traffic(TorchDispatchMode):
    """Counts the bytes that kernels read and write; views move nothing, and zeros are written."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in ("detach", "_unsafe_view", "ones_like"):
            return out
        given = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        self.moved += sum(_bytes(t) for t in given) + _bytes(out)
        if name in ("slice_backward", "select_backward"):  # zeros, and a copy into them
            self.moved += _bytes(given[0])
        return out


def _bytes(t):
    """Return the bytes of the elements that are in memory: those of an expanded dim once."""
    return t.untyped_storage().nbytes() if 0 in t.stride() else t.nbytes


class Made(nn.Module):
    """Maps two parameters, a matrix and a row, to one result."""

    def __init__(self, compute):
        super().__init__()
        self.x = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.y = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.row = nn.Parameter(torch.randn(WIDTH))
        self.compute = compute

    def forward(self, c):
        return self.compute(self, c)


MAPS = {
    "a sum": lambda m, c: m.x + m.y,
    "a sum over a broadcast": lambda m, c: m.x + m.row,
    "a product": lambda m, c: m.x * m.y,
    "a product with a constant": lambda m, c: m.x * c,
    "a product with a broadcast": lambda m, c: m.x * m.row,
    "a slice": lambda m, c: m.x[:, 2:6],
    "a row": lambda m, c: m.x[3],
    "a repeat": lambda m, c: m.row.expand(ROWS, WIDTH),
    "halves": lambda m, c: torch.cat(m.x.chunk(2, dim=1)[::-1], dim=1),
    "a transpose": lambda m, c: m.x.T,
    "side by side": lambda m, c: torch.cat([m.x, m.y]),
    "a mean": lambda m, c: m.x.mean(1),
    "a copy": lambda m, c: m.x.T.clone(memory_format=torch.contiguous_format),
    "three readers": lambda m, c: (m.x + m.y) * ((m.x + c) + (m.x - c)),
}


CLUSTER = replace(bandwidth_bound(1e30), memory_bandwidth_bytes_per_s=BANDWIDTH)
"""On which nothing but memory takes time."""


def plan_of(model, inputs, cluster):
    return search_plan(*inferred(model, inputs, {}, Options()), as_grid((1,)), cluster).plan


def backward_s(model, inputs, cluster=CLUSTER):
    """Return the seconds by which a training step is longer than forward and the optimizer."""
    trained = plan_of(model, inputs, cluster)
    forward = plan_of(copy.deepcopy(model).requires_grad_(False), inputs, cluster)
    held = sum(r.local_bytes for r in trained.params.values() if r.trained)
    update_s = UPDATE_TRAFFIC * held / cluster.memory_bandwidth_bytes_per_s
    return trained.step_time_s - forward.step_time_s - update_s


@pytest.mark.parametrize("name", MAPS)
def test_bytes_are_those_of_kernels(name):
    model, inputs = Made(MAPS[name]), (torch.randn(ROWS, WIDTH),)
    out = model(*inputs)
    given = torch.randn_like(out)
    with Traffic() as traffic:
        torch.autograd.grad(out, [*model.parameters()], given, allow_unused=True)
    assert BANDWIDTH * backward_s(model, inputs) == pytest.approx(traffic.moved, abs=1e-6)


class Linears(nn.Module):
    """Two linears; the first one's input carries no gradient, `frozen` ones' weights none."""

    def __init__(self, frozen=()):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        for k in frozen:
            self.layers[k].requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("frozen", ((), (0,), (1,), (0, 2)))
def test_a_product_has_one_more_for_each_gradient(frozen):
    rate = 1e6
    cluster = bandwidth_bound(1e30, flops_per_s=rate)
    model, inputs = Linears(frozen), (torch.randn(ROWS, WIDTH),)
    out = model(*inputs)
    wanted = [p for p in model.parameters() if p.requires_grad]
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out, wanted, torch.randn_like(out))
    assert rate * backward_s(model, inputs, cluster) == pytest.approx(counter.get_total_flops())


class Attention(nn.Module):
    """Attention of a parameter to itself: its calibrated rate is that of three forward passes."""

    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.randn(2, 4, ROWS, WIDTH))

    def forward(self, scale):
        return F.scaled_dot_product_attention(self.q, self.q, self.q)


def test_attention_takes_two_forward_passes():
    plan = plan_of(Attention(), (torch.ones(()),), bandwidth_bound(1e30, flops_per_s=1e6))
    (attention,) = [d for d in plan.decisions if "attention" in d.op]
    assert attention.backward_s == pytest.approx(2 * (attention.seconds - attention.backward_s))
    assert 1e6 * attention.seconds == pytest.approx(3 * attention.flops)
