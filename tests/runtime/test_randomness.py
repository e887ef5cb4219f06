"""Masks: equal on replicas and different on shards, or the single device's; seeds that stay put."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from autotp.axis import run_ranks
from autotp.grid import Grid
from autotp.random_programs import dropout, sdpa_dropout
from autotp.randomness import (
    RandomState,
    agreed_step_seed,
    draw_step_seed,
    drawn_call,
    site_seed,
)
from autotp.recompute import run_region

SQUARE = Grid(("row", "col"), (2, 2))


def masks(fn, step_seed=7, site=3, shape=(64, 64)):
    """Return what `fn` keeps of ones on every rank of the square, split over its rows."""

    def one(rank, axes):
        rng = RandomState(step_seed)
        return fn(torch.ones(shape), rng=rng, split=(axes["row"],), site=site)

    return run_ranks(SQUARE, one)


def drop(x, **random):
    return dropout(x, 0.25, True, **random)


def attend(x, **random):
    q = x.reshape(1, 4, -1, 16)
    return sdpa_dropout(q, q, torch.eye(64).expand(1, 4, 64, 64), None, 0.25, **random)


@pytest.mark.parametrize("fn", [drop, attend])
def test_masks_are_equal_where_replicated_and_different_where_split(fn):
    shape = (64, 64)
    first, again = masks(fn, shape=shape), masks(fn, shape=shape)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3])
    others = [first[2], masks(fn, step_seed=8)[0], masks(fn, site=4)[0]]
    for a, b in itertools.combinations([first[0], *others], 2):
        agree = ((a == 0) == (b == 0)).float().mean().item()
        assert 0.55 < agree < 0.7  # independent masks of 1/4 agree on 10/16


def test_dropout_scales_and_sends_the_gradient_through_its_mask():
    x = torch.ones(400, 50, requires_grad=True)
    y = dropout(x, 0.25, True, rng=RandomState(1), site=0)
    y.sum().backward()
    assert torch.equal(x.grad, y) and torch.equal(y.unique() * 0.75, torch.tensor([0.0, 1.0]))
    assert abs(y.mean().item() - 1) < 0.02
    assert dropout(x, 0.25, False, rng=RandomState(1), site=0) is x
    assert not dropout(x, 1.0, True, rng=RandomState(1), site=0).any()


def test_attention_without_dropout_is_the_op_and_its_seed_stays_inside():
    q = torch.randn(2, 4, 8, 16)
    state = torch.get_rng_state()
    out = sdpa_dropout(q, q[:, :2], q[:, :2], enable_gqa=True, rng=RandomState(), site=1)
    assert torch.equal(out, F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True))
    sdpa_dropout(q, q, q, None, 0.5, rng=RandomState(), site=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_recomputed_forward_draws_the_same_masks():
    rng = RandomState()

    def forward(x):
        rng.step_seed = draw_step_seed()
        q = dropout(x.sin(), 0.5, True, rng=rng, site=0)
        return sdpa_dropout(q, q, q, None, 0.5, rng=rng, site=1).cos()

    grads = []
    for run in (forward, lambda x: checkpoint(forward, x, use_reentrant=False)):
        torch.manual_seed(5)
        x = torch.linspace(0, 1, 2 * 8 * 4).reshape(1, 2, 8, 4).requires_grad_()
        first, second = run(x), run(x)
        (first.sum() + second.square().sum()).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("exact", (False, True))
def test_a_region_draws_again_what_it_drew_though_other_steps_follow(exact):
    rng = RandomState(exact=exact)

    def region(x):
        if exact:
            return (drawn_call(torch.ops.aten.dropout.default, x.sin(), 0.5, True, rng=rng).cos(),)
        return (dropout(x.sin(), 0.5, True, rng=rng, site=0).cos(),)

    grads = []
    for run in (region, lambda x: run_region(region, rng, x)):
        torch.manual_seed(5)
        x = torch.linspace(0, 1, 40, requires_grad=True)
        losses = []
        for rng.step_seed in (1, 2):
            losses.append(run(x)[0].square().sum())
        state = torch.get_rng_state()
        sum(losses).backward()
        assert torch.equal(torch.get_rng_state(), state)
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_ranks_agree_on_a_step_seed():
    seeds = run_ranks(SQUARE, lambda rank, axes: agreed_step_seed(axes.values()))
    assert len(set(seeds)) == 1 and draw_step_seed() != draw_step_seed()


def test_site_seeds_are_fixed_and_distinct():
    places = itertools.product(range(9), range(9), [(), (0,), (1,), (0, 0)])
    seeds = {site_seed(*place) for place in places}
    assert len(seeds) == 9 * 9 * 4 and all(0 <= s < 2**63 for s in seeds)
    assert site_seed(1, 2, (3,)) == site_seed(1, 2, (3,))


def test_dropout_compiles_whole_and_new_seeds_do_not_recompile():
    rng, frames = RandomState(), CompileCounterWithBackend("aot_eager")
    step = lambda x: dropout(x.sin(), 0.5, True, rng=rng, site=0)  # noqa: E731
    compiled = torch.compile(step, backend=frames, fullgraph=True)
    for rng.step_seed in (2**40 + 1, 2**50 + 3, 2**60 + 5, 2**61 + 7):
        x = torch.ones(32, requires_grad=True)
        assert torch.equal(compiled(x), step(x))
    assert frames.frame_count <= 2
