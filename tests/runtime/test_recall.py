"""Calls that forget what they make: gradients as if all were kept, and when it is made again."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autotp.errors import RuntimeStateError
from autotp.random_programs import dropout
from autotp.randomness import RandomState
from autotp.recall import Recipe, recalled

X, W = torch.randn(6, 4), torch.randn(5, 4)


class Counted:
    """A function that counts its calls and keeps sight of what it made last."""

    def __init__(self, fn):
        self.fn, self.calls, self.last = fn, 0, None

    def __call__(self, *args, **kwargs):
        self.calls += 1
        out = self.fn(*args, **kwargs)
        self.last = weakref.ref(out)
        return out


def leaves():
    return X.clone().requires_grad_(), W.clone().requires_grad_()


def expected(fn):
    x, w = leaves()
    fn(x, w).backward()
    return x.grad, w.grad


def plain(x, w):
    return F.linear(F.gelu(2 * x), w).square().sum()


def forgetful(x, w, gelu, sends=False):
    """`plain`, of which 2 x and the result of the GELU are made again."""
    two, act = Recipe([], sends), None
    double = recalled(torch.mul, two, [], x, 2)
    act = Recipe([two], sends)
    made = recalled(gelu, act, [two], double)
    return recalled(F.linear, None, [act], made.view(2, 3, 4), w).square().sum()


@pytest.mark.parametrize("sends", (False, True))
def test_what_is_forgotten_is_made_again_once_in_each_backward(sends):
    x, w = leaves()
    gelu = Counted(F.gelu)
    loss = forgetful(x, w, gelu, sends)
    gc.collect()
    assert gelu.calls == 1 and gelu.last() is None
    loss.backward(retain_graph=True)
    assert gelu.calls == 2 and gelu.last() is None
    for mine, theirs in zip((x.grad, w.grad), expected(plain), strict=True):
        assert torch.equal(mine, theirs)
    loss.backward()
    assert gelu.calls == 3


def test_what_a_call_saves_of_its_own_result_is_made_again_too():
    def soft(x, w):
        return F.linear(torch.softmax(x, 1), w).square().sum()

    x, w = leaves()
    softmax, recipe = Counted(torch.softmax), Recipe([], False)
    made = recalled(softmax, recipe, [recipe], x, 1)
    loss = recalled(F.linear, None, [recipe], made, w).square().sum()
    del made
    assert softmax.last() is None
    loss.backward()
    assert softmax.calls == 2 and torch.equal(x.grad, expected(soft)[0])


def test_a_recipe_that_sends_is_run_though_a_copy_was_saved():
    x, w = leaves()
    gather, recipe = Counted(lambda x: 2 * x), Recipe([], True)
    made = recalled(gather, recipe, [], x)
    recalled(lambda x, w: F.linear(x + 0, w), None, [recipe], made, w).sum().backward()
    assert gather.calls == 2


def test_draws_are_the_same_again_also_when_the_next_step_has_begun():
    rng, recipe = RandomState(step_seed=3), Recipe([], False)
    x, w = leaves()
    draw = {"rng": rng, "site": 1, "split": ()}
    made = recalled(dropout, recipe, [recipe], x, 0.5, True, **draw)
    loss = recalled(torch.mul, None, [recipe], made, w.sum()).sum()
    rng.step_seed = 4
    loss.backward()
    assert torch.allclose(w.grad, torch.full_like(w, made.sum().item()))
    assert rng.step_seed == 4


def test_autocast_is_that_of_the_forward():
    x, w = leaves()
    recipe = Recipe([], False)
    with torch.autocast("cpu", torch.bfloat16):
        made = recalled(torch.mm, recipe, [], x, w.t())
        loss = recalled(torch.mul, None, [recipe], made, made.detach()).sum()
    assert made.dtype == torch.bfloat16
    loss.backward()
    assert x.grad is not None


def test_what_was_changed_since_is_refused():
    x, _ = leaves()
    shard, recipe = X.clone(), Recipe([], True)
    made = recalled(torch.mul, recipe, [], shard, 2)
    loss = recalled(torch.mul, None, [recipe], made, x).sum()
    shard.add_(1)
    with pytest.raises(RuntimeStateError, match="since been changed"):
        loss.backward()


def test_what_only_renames_is_kept():
    x, w = leaves()
    recipe = Recipe([], True)
    made = recalled(torch.ops.aten.contiguous.default, recipe, [], x)
    recalled(F.linear, None, [recipe], made, w).square().sum().backward()
    assert torch.equal(x.grad, expected(lambda x, w: F.linear(x, w).square().sum())[0])


@pytest.mark.parametrize("around", (torch.no_grad, torch.autograd.graph.save_on_cpu))
def test_without_gradient_and_under_hooks_of_others_ops_are_just_called(around):
    x, w = leaves()
    gelu = Counted(F.gelu)
    with around():
        loss = forgetful(x, w, gelu)
    if loss.requires_grad:
        loss.backward()
        assert torch.equal(w.grad, expected(plain)[1])
    assert gelu.calls == 1


def test_under_a_checkpoint_around_it_all_is_computed_again_once():
    x, w = leaves()
    gelu = Counted(F.gelu)
    checkpoint(forgetful, x, w, gelu, use_reentrant=False).backward()
    assert gelu.calls == 2 and torch.equal(w.grad, expected(plain)[1])
