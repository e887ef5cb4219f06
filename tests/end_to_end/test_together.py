"""Parameters that share calls, and gradients that are awaited when backward ends: on real ranks."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import autotp
from autotp import schemes, together
from autotp.cost_model.cluster import bandwidth_bound
from autotp.dist_axis import DistAxis
from autotp.errors import NumericsError
from tests.end_to_end.on_ranks import on_ranks
from tests.models import build

CLUSTER = bandwidth_bound(1e9, latency_s=1e-5, flops_per_s=1e9)
BESIDE = replace(bandwidth_bound(1e9, latency_s=2e-7, flops_per_s=1e10), overlap=0.5)


def both(grid, name="nanogpt", scheme=schemes.data_parallel, cluster=CLUSTER, **options):
    """Return a model, the same one parallel, and their inputs."""
    model, inputs = build(name, double=True)
    parallel = copy.deepcopy(model.train())
    pins = scheme(model, grid, inputs)
    autotp.parallelize(parallel, grid, inputs, pins=pins, cluster=cluster, **options)
    return model, parallel, inputs


def loss_of(model, inputs):
    out = model(**inputs)
    return out[1] if isinstance(out, tuple) else out


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_same(model, parallel):
    theirs = dict(parallel.named_parameters())
    for name, p in model.named_parameters():
        found = theirs[name].grad
        assert (p.grad is None) == (found is None), name
        if found is not None:
            torch.testing.assert_close(whole(found), p.grad, rtol=1e-9, atol=1e-12, msg=name)


def is_later(plan):
    return any(b.begins for b in plan.buckets)


@on_ranks((4, 1), (2, 2))
def test_gradients_are_complete_when_backward_returns(grid):
    for scheme in (schemes.data_parallel, schemes.fsdp, schemes.batch_x_tensor):
        for cluster in (CLUSTER, BESIDE):
            model, parallel, inputs = both(grid, scheme=scheme, cluster=cluster)
            assert parallel.plan.buckets, scheme
            for _ in range(2):  # the second is added to the first
                loss_of(model, inputs).backward()
                loss_of(parallel, inputs).backward()
            assert_same(model, parallel)


@on_ranks((1, 2))
def test_a_step_with_moves_that_begin_early_is_a_step(grid):
    for scheme in (schemes.megatron, schemes.megatron_sp, schemes.batch_x_tensor):
        model, parallel, inputs = both(grid, scheme=scheme, cluster=BESIDE)
        assert any(b.hidden_s for b in parallel.plan.buckets), scheme
        for m in (model, parallel):
            optimizer = torch.optim.SGD(m.parameters(), lr=1e-3)
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(m, inputs).backward()
                optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(loss_of(parallel, inputs), loss_of(model, inputs))
        assert_same(model, parallel)


@on_ranks((4, 1), (2, 2))
def test_calls_and_bytes_are_those_of_the_plan(grid):
    _, parallel, inputs = both(grid)
    plan, axes = parallel.plan, parallel._autotp.axes
    for axis in axes.values():
        axis.reset_sent()
    loss_of(parallel, inputs).backward()
    sent = {(kind, a.name): n for a in axes.values() for kind, n in a.sent.items() if n}
    assert sent == plan.sent()
    sending = {"all_gather", "all_reduce", "reduce_scatter"}
    apart = [k for m in plan.moves for k in (m.forward, m.backward) if k in sending]
    inside = [row for row in plan.internal if row[3]]
    spared = sum(len(b.moves) - 1 for b in plan.buckets)
    made = sum(n for a in axes.values() for n in a.calls.values())
    assert made == len(apart) + len(inside) - spared and spared > 20


@on_ranks((2, 2))
def test_what_is_kept_may_go_back_twice(grid):
    model, parallel, inputs = both(grid)
    for m in (model, parallel):
        loss = loss_of(m, inputs)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same(model, parallel)


@on_ranks((4, 1))
def test_gradients_may_be_asked_for(grid):
    model, parallel, inputs = both(grid)
    assert is_later(parallel.plan)
    names = ["h.0.c_fc.weight", "wte.weight"]
    wanted = [[dict(m.named_parameters())[n] for n in names] for m in (model, parallel)]
    losses = [loss_of(m, inputs) for m in (model, parallel)]
    pairs = [
        torch.autograd.grad(y, p, retain_graph=True) for y, p in zip(losses, wanted, strict=True)
    ]
    for mine, found in zip(*pairs, strict=True):
        torch.testing.assert_close(whole(found), mine, rtol=1e-9, atol=1e-12)
    for loss, params in zip(losses, wanted, strict=True):
        loss.backward(inputs=params)
    assert_same(model, parallel)


@on_ranks((4, 1))
def test_hooks_of_parameters_see_whole_sums(grid):
    model, parallel, inputs = both(grid)
    seen = [{}, {}]
    for found, m in zip(seen, (model, parallel), strict=True):
        for name, p in m.named_parameters():
            p.register_post_accumulate_grad_hook(
                lambda p, name=name, found=found: found.update({name: whole(p.grad).clone()})
            )
        loss_of(m, inputs).backward()
    assert seen[0].keys() == seen[1].keys()
    for name, gradient in seen[0].items():
        torch.testing.assert_close(seen[1][name], gradient, rtol=1e-9, atol=1e-12)


@on_ranks((2, 2))
def test_frozen_parameters_stay_without_a_gradient(grid):
    model, parallel, inputs = both(grid)
    for m in (model, parallel):
        dict(m.named_parameters())["h.1.c_fc.bias"].requires_grad_(False)
        loss_of(m, inputs).backward()
    assert_same(model, parallel)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(parallel, inputs), loss_of(model, inputs))
    model.eval(), parallel.eval()
    torch.testing.assert_close(loss_of(parallel, inputs), loss_of(model, inputs))


class Blocks(nn.Module):
    """Blocks that are recomputed, with a parameter that two of them share."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.blocks[2].weight = self.blocks[0].weight

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(lambda x, b=block: b(x).tanh(), x, use_reentrant=False)
        return x.square().mean()


@on_ranks((4, 1), (2, 2))
def test_regions_are_recomputed_beside_shared_calls(grid):
    model = Blocks().double()
    parallel, inputs = copy.deepcopy(model), {"x": torch.randn(8, 8).double()}
    pins = schemes.data_parallel(model, grid, inputs)
    autotp.parallelize(parallel, grid, inputs, pins=pins, cluster=CLUSTER)
    assert any(len(b.moves) > 1 for b in parallel.plan.buckets)
    loss_of(model, inputs).backward()
    loss_of(parallel, inputs).backward()
    assert_same(model, parallel)


@on_ranks((4, 1))
def test_a_compiled_program_shares_calls_too(grid):
    for scheme, cluster in ((schemes.data_parallel, CLUSTER), (schemes.fsdp, BESIDE)):
        model, parallel, inputs = both(grid, "mlp", scheme, cluster)
        loss_of(model, inputs).backward()
        parallel._autotp.axes["row"].reset_sent()
        loss_of(torch.compile(parallel, backend="aot_eager"), inputs).backward()
        assert not parallel._autotp.axes["row"].calls  # which are not counted when compiled
        assert_same(model, parallel)


@on_ranks((4, 1))
def test_gradients_are_looked_at_after_they_came(grid):
    model, parallel, inputs = both(grid, "mlp", check_numerics=True)
    loss_of(model, inputs).backward()
    loss_of(parallel, inputs).backward()
    assert_same(model, parallel)
    with torch.no_grad():
        for p in parallel.parameters():
            p.mul_(torch.inf)
    with pytest.raises(NumericsError):
        loss_of(parallel, inputs).backward()


@on_ranks((4, 1))
def test_the_wait_is_the_last_of_backward(grid):
    """Started when a bucket is there, with layers still to come; awaited after the last of them."""
    small = bandwidth_bound(1e9, latency_s=2e-7, flops_per_s=1e9)
    _, parallel, inputs = both(grid, cluster=small)
    buckets = [b for b in parallel.plan.buckets if b.begins]
    assert len(buckets) > 3
    events = []

    def told(word, method):
        def call(self, *args):
            events.append(word)
            return method(self, *args)

        return call

    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        m.setattr(DistAxis, "begin", told("start", DistAxis.begin))
        m.setattr(together._Begin, "backward", staticmethod(told("wait", together._Begin.backward)))
        loss = loss_of(parallel, inputs)
        loss.register_hook(lambda _: events.append("begin"))
        loss.backward()
    assert events == ["begin", *["start"] * len(buckets), *["wait"] * len(buckets)]
