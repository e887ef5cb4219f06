"""Optimizers step on local tensors where they may, and nobody can tell: on real ranks."""

import copy

import pytest
import torch
from torch.distributed.tensor import DTensor

import autotp
from autotp import optimizers, schemes
from autotp.optimizers import ELEMENTWISE
from autotp.placements import as_part_of
from tests.end_to_end.on_ranks import on_ranks
from tests.models import build

GRIDS = ((4, 1), (2, 2))
ONLY_LOCAL = {torch.optim.Rprop}
"""What torch cannot step on DTensors that are shards."""


def parallel(grid):
    model, inputs = build("mlp", double=True)
    scheme = schemes.fsdp if grid == (4, 1) else schemes.batch_x_tensor
    pins = scheme(model.train(), grid, inputs)
    return autotp.parallelize(model, grid, inputs, pins=pins, cluster="gloo_loopback"), inputs


def stepped(model, inputs, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs).backward()
        optimizer.step()


def assert_alike(mine, theirs):
    assert type(mine) is type(theirs)
    if isinstance(mine, DTensor):
        assert (mine.placements, mine.shape) == (theirs.placements, theirs.shape)
        mine, theirs = mine.to_local(), theirs.to_local()
    if isinstance(mine, torch.Tensor):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    else:
        assert mine == theirs


@on_ranks(*GRIDS)
def test_every_optimizer_steps_as_it_does_on_dtensors(grid):
    model, inputs = parallel(grid)
    start = copy.deepcopy(model.state_dict())
    for kind in sorted(ELEMENTWISE - ONLY_LOCAL, key=lambda t: t.__name__):
        ends = []
        for is_watched in (False, True):
            model.load_state_dict(start)
            optimizer = kind(model.parameters(), lr=0.05)
            if is_watched:  # by a hook of its own: it steps on DTensors
                optimizer.register_step_post_hook(lambda *_: None)
            stepped(model, inputs, optimizer)
            ends.append((copy.deepcopy(model.state_dict()), optimizer.state_dict()["state"]))
        (mine, my_states), (theirs, their_states) = ends
        for name in theirs:
            assert_alike(mine[name], theirs[name])
        assert my_states.keys() == their_states.keys()
        for number, state in their_states.items():
            assert state.keys() == my_states[number].keys(), kind
            for key, value in state.items():
                assert_alike(my_states[number][key], value)


@on_ranks((4, 1))
def test_what_cannot_step_on_dtensors_steps(grid):
    model, inputs = parallel(grid)
    for kind in ONLY_LOCAL:
        before = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
        optimizer = kind(model.parameters(), lr=0.05)
        stepped(model, inputs, optimizer, 1)
        for name, p in model.named_parameters():  # its first step is the learning rate
            moved = (p.full_tensor() - before[name]).abs()
            torch.testing.assert_close(moved, 0.05 * p.grad.full_tensor().sign().abs())


@on_ranks((2, 2))
def test_states_are_kept_loaded_and_go_on(grid):
    model, inputs = parallel(grid)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, amsgrad=True)
    stepped(model, inputs, optimizer)
    first = next(iter(optimizer.state.values()))
    moment = first["exp_avg"]
    stepped(model, inputs, optimizer, 1)
    assert next(iter(optimizer.state.values()))["exp_avg"] is moment  # the very same tensor
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    stepped(model, inputs, optimizer)
    end = copy.deepcopy(model.state_dict())
    model.load_state_dict(saved[0])
    again = torch.optim.AdamW(model.parameters(), lr=0.1)
    again.load_state_dict(saved[1])
    stepped(model, inputs, again)
    for name, value in model.state_dict().items():
        assert_alike(value, end[name])


@on_ranks((2, 2))
def test_a_step_is_made_on_local_tensors_unless_somebody_looks(grid):
    model, inputs = parallel(grid)
    seen = []

    class Plain(torch.optim.SGD):
        def step(self, closure=None):
            seen.append({type(p) for group in self.param_groups for p in group["params"]})
            return super().step(closure)

    def types_in(kind, closure=None, **options):
        optimizer = kind(model.parameters(), lr=0.01, **options)
        stepped(model, inputs, optimizer, 1)
        inside = []
        original = kind.step.__wrapped__

        def step(self, *args, **kwargs):
            inside.append(type(self.param_groups[0]["params"][0]))
            return original(self, *args, **kwargs)

        patch = pytest.MonkeyPatch()
        with patch.context() as m:
            m.setattr(kind, "step", optimizer.profile_hook_step(step))
            optimizer.step(*([closure] if closure else []))
        return inside

    assert types_in(torch.optim.SGD) == [torch.Tensor]
    assert types_in(torch.optim.SGD, lambda: model(**inputs)) != [torch.Tensor]
    stepped(model, inputs, Plain(model.parameters(), lr=0.01), 1)
    assert torch.Tensor not in seen[0]  # a subclass may do anything


@on_ranks((2, 2))
def test_a_step_that_raises_leaves_an_optimizer_that_steps(grid):
    model, inputs = parallel(grid)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    stepped(model, inputs, optimizer, 1)
    optimizer.param_groups[0]["lr"] = "no number"
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    stepped(model, inputs, optimizer, 1)
    assert all(isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"])


@on_ranks((2, 2))
def test_the_fused_kernel_is_taken_where_the_choice_was_left(grid):
    model, inputs = parallel(grid)
    for options, expected in (({}, True), ({"foreach": False}, None), ({"fused": False}, False)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
        inside = []
        original = torch.optim.AdamW.step.__wrapped__

        def step(self, *args, original=original, inside=inside):
            inside.append(self.param_groups[0]["fused"])
            return original(self, *args)

        patch = pytest.MonkeyPatch()
        with patch.context() as m:
            m.setattr(torch.optim.AdamW, "step", optimizer.profile_hook_step(step))
            stepped(model, inputs, optimizer, 2)
        assert inside == [expected] * 2
        assert optimizer.param_groups[0]["fused"] == options.get("fused")
    assert optimizers._Aside not in map(type, vars(optimizer).values())


@on_ranks((2, 2))
def test_what_does_not_lie_flat_in_memory_is_stepped_as_it_is_read(grid):
    """Torch's fused kernel goes through memory, not through dims, where strides differ."""
    model, inputs = parallel(grid)
    start = copy.deepcopy(model.state_dict())
    ends = []
    for is_transposed in (False, True):
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        stepped(model, inputs, optimizer, 1)
        for p in model.parameters():
            local = p.grad.to_local()
            if is_transposed and local.ndim == 2:
                p.grad = as_part_of(local.t().contiguous().t(), p)
        optimizer.step()
        ends.append(copy.deepcopy(model.state_dict()))
    for name, value in ends[0].items():
        assert_alike(ends[1][name], value)
