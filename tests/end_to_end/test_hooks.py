"""Hooks: forward hooks act as they did, the model's own once; what would be lost is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as everywhere
from torch.nn.utils import parametrizations

import autotp
from autotp.check import compare, prepare
from autotp.errors import CaptureError
from autotp.grid import as_grid
from autotp.passes.capture.model import capture
from tests.end_to_end.models import CLUSTER, assert_near, gradients
from tests.end_to_end.on_ranks import on_ranks
from tests.random_plans import random_plan

WIDTH = 8


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.inside = lambda h: h

    def forward(self, x):
        return self.b(self.inside(self.a(x)).relu()).pow(2).mean()


def tripled(module, args, out):
    return 3 * out


def shifted(module, args):
    return (args[0] + 1,)


def scaled(module, grads_in, grads_out):
    return tuple(g and 2 * g for g in grads_in)


def assert_checked(model):
    subject = prepare(model.double(), (torch.randn(4, 6, WIDTH, dtype=torch.float64),), {})
    assert subject.captured == ()
    for seed, sizes in enumerate(((2, 2), (1, 3))):
        report = compare(subject, random_plan(subject, as_grid(sizes), seed))
        assert report.ok, report


def test_forward_hooks_of_submodules_act():
    torch.manual_seed(0)
    model, plain = Two(), Two()
    plain.load_state_dict(model.state_dict())
    model.a.register_forward_pre_hook(shifted)
    model.b.register_forward_hook(tripled)
    x = torch.randn(4, 6, WIDTH)
    program = capture(model, (x,), {}, train=True)
    (out,) = program.graph_module(*model.parameters(), x)
    torch.testing.assert_close(out, 9 * plain(x + 1))
    assert_checked(model)


@pytest.mark.parametrize("made", ("weight_norm", "spectral_norm", "orthogonal"))
def test_parametrizations_work_or_are_refused(made):
    torch.manual_seed(0)
    model = Two().train()
    getattr(parametrizations, made)(model.a)
    try:
        assert_checked(model)
    except CaptureError as error:
        assert made != "weight_norm", error
        assert error.at and error.remedy


def tensor_hook(m):
    m.inside = lambda h: (h.register_hook(lambda g: 2 * g), h)[1]


def several_tensors(m):
    m.inside = lambda h: (torch.autograd.graph.register_multi_grad_hook((h,), print), h)[1]


def offloading(m):
    def inside(h):
        with torch.autograd.graph.save_on_cpu():
            return h.exp()

    m.inside = inside


REFUSED = {
    r"a   backward_hook scaled": lambda m: m.a.register_full_backward_hook(scaled),
    r"a   backward_pre_hook shifted": lambda m: m.a.register_full_backward_pre_hook(shifted),
    "register_hook": tensor_hook,
    "register_multi_grad_hook": several_tensors,
    "saved_tensors_hooks": offloading,
}


@pytest.mark.parametrize(("said", "register"), REFUSED.items())
def test_hooks_that_a_capture_would_lose_are_refused(said, register):
    model = Two()
    register(model)
    with pytest.raises(CaptureError, match=said):
        capture(model, (torch.randn(3, WIDTH),), {}, train=True)


GLOBAL = {
    "forward hook": everywhere.register_module_forward_hook,
    "forward pre hook": everywhere.register_module_forward_pre_hook,
    "backward hook": everywhere.register_module_full_backward_hook,
    "backward pre hook": everywhere.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", GLOBAL)
def test_global_hooks_are_refused(kind):
    handle = GLOBAL[kind](lambda *_: None)
    try:
        with pytest.raises(CaptureError, match=f"all modules   global {kind}"):
            capture(Two(), (torch.randn(3, WIDTH),), {}, train=True)
    finally:
        handle.remove()


@on_ranks((1, 2))
def test_the_models_own_hooks_act_once_and_new_hooks_are_captured(grid):
    model, x = Two(), torch.randn(4, 6, WIDTH)
    one = copy.deepcopy(model)
    seen = []
    for net in (one, model):
        net.register_forward_hook(tripled)
        net.register_full_backward_hook(lambda m, into, out: seen.append(out[0].item()))
    ours = autotp.parallelize(model, grid, (x,), cluster=CLUSTER)

    def step(net):
        net.zero_grad()
        loss = net(x)
        loss.backward()
        return {"loss": loss.detach(), **gradients(net)}

    assert_near(step(ours), step(one))
    handles = [net.a.register_forward_hook(tripled) for net in (one, ours)]
    assert_near(step(ours), step(one))
    for handle in handles:
        handle.remove()
    assert_near(step(ours), step(one))
    assert len(seen) == 6 and len(ours._autotp.modes) == 2
