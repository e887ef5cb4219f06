"""Models of unusual structure: buffers, ties, frozen parts, what they take and what they return.

Each forward stands over the same few layers; random legal plans compute what it computes, with all
buffers, gradients and one update. A sample trains on real ranks.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import autotp
from autotp.check import compare, prepare
from autotp.grid import as_grid
from tests.end_to_end.models import CLUSTER, assert_near, gpt2, gradients, loss_of, tokens
from tests.end_to_end.on_ranks import on_ranks
from tests.random_plans import random_plan

WIDTH, VOCAB = 8, 13


@dataclass
class Result:
    """What a model may return: a dataclass that torch's pytree knows."""

    loss: torch.Tensor
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


pytree.register_dataclass(Result)


class Model(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.again = self.shared
        self.e = nn.Embedding(VOCAB, WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB, bias=False)
        self.out.weight = self.e.weight
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.unused = nn.Linear(WIDTH, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.ones(WIDTH))
        self.register_buffer("last", torch.zeros(WIDTH), persistent=False)
        self.computes = forward

    def forward(self, *args, **kwargs):
        return self.computes(self, *args, **kwargs)


def mlp(m, x):
    return m.b(F.gelu(m.a(x)))


def buffers(m, x):
    before = m.average.clone()
    h = mlp(m, x) * before
    m.average.mul_(0.9).add_(h.detach().mean((0, 1)), alpha=0.1)
    m.last.copy_(h.detach()[0, 0])
    m.calls += 1
    after = h * m.average + before + m.last
    m.average = m.average + 0.01 * m.calls
    return (after / m.calls).pow(2).mean() + (m.average * x).mean()


def ties(m, x):
    h = m.shared(x).tanh() @ m.square + x @ m.square.T  # tied across a transpose
    h = m.again(h) + m.shared(h.relu())
    return m.out(h + m.e.weight[3]).logsumexp(-1).mean()


def frozen(m, x):
    h = m.frozen(mlp(m, m.frozen(x)))
    with torch.no_grad():
        gate = m.shared(x).sigmoid()
    return (h * gate + m.b(m.a(x).detach())).pow(2).mean()


def dicts(m, x):
    h = mlp(m, x)
    return {"loss": h.pow(2).mean(), "parts": {"h": h, "none": None}, "list": [h.sum(-1), 3, "x"]}


def dataclass_out(m, x):
    h = mlp(m, x)
    return Result(loss=h.pow(2).mean(), logits=m.out(h))


def losses(m, x):
    h = mlp(m, x)
    return h.pow(2).mean(), F.l1_loss(m.shared(h), x), h.sum(), m.square.norm()


def passed_through(m, x):
    return x, m.square, m.average, mlp(m, x).sum(), m.calls


FORWARDS = (buffers, ties, frozen, dicts, dataclass_out, losses, passed_through)


def check(model, args, kwargs, grids=((2, 2), (1, 3))):
    subject = prepare(model, args, kwargs)
    assert subject.captured == ()
    for seed, sizes in enumerate(grids):
        report = compare(subject, random_plan(subject, as_grid(sizes), seed))
        assert report.ok, report


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_every_structure_is_what_it_was_under_random_plans(forward):
    torch.manual_seed(0)
    check(Model(forward).double(), (numbers(4, 6, WIDTH),), {})


def nested(m, batch, *, extra=None, scale=1.0, flags=(True, "mean")):
    h = mlp(m, batch["x"]) + m.e(batch["ids"][0])
    h = h + extra[1]["shift"] if extra is not None else h
    return scale * h.pow(2).mean() if flags[0] else h


def test_inputs_nest_in_dicts_lists_and_tuples():
    torch.manual_seed(0)
    batch = {"x": numbers(4, 6, WIDTH), "ids": [torch.randint(VOCAB, (4, 6))]}
    extra = (None, {"shift": numbers(WIDTH)})
    check(Model(nested).double(), (batch,), {"extra": extra, "scale": 2.0})


# Several losses, each with its own backward -------------------------------------------------------


@on_ranks((1, 2))
def test_each_of_several_losses_goes_back(grid):
    model, x = Model(losses), torch.randn(4, 6, WIDTH)
    one = copy.deepcopy(model)
    ours = autotp.parallelize(model, grid, (x,), cluster=CLUSTER)
    for k in range(4):
        found = []
        for net in (ours, one):
            net.zero_grad()
            net(x)[k].backward()
            grads = {n: torch.zeros(p.shape) for n, p in net.named_parameters()}
            found.append({**grads, **gradients(net)})
        assert_near(*found, bound=1e-5)


@on_ranks((1, 2))
def test_structures_train_on_real_ranks(grid):
    x = torch.randn(4, 6, WIDTH)
    for forward in (buffers, ties, frozen, dataclass_out):
        model = Model(forward)
        one = copy.deepcopy(model)
        ours = autotp.parallelize(model, grid, (x,), cluster=CLUSTER)
        optimizers = [torch.optim.SGD(n.parameters(), lr=0.1) for n in (one, ours)]
        for _ in range(2):
            for net, optimizer in zip((one, ours), optimizers, strict=True):
                optimizer.zero_grad()
                out = net(x)
                loss_of(out).backward()
                optimizer.step()
        assert type(ours(x)) is type(one(x))
        expected, mine = one.state_dict(), autotp.full_state_dict(ours)
        assert_near({n: t.double() for n, t in mine.items()},
                    {n: t.double() for n, t in expected.items()})  # fmt: skip
        assert_near(dict(ours.named_buffers()), dict(one.named_buffers()))


# LoRA ---------------------------------------------------------------------------------------------


class Lora(nn.Module):
    """A frozen Conv1D of GPT-2 beside a trained product of low rank."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base, (n, m) = base, base.weight.shape
        self.down = nn.Parameter(torch.randn(n, rank) / n)
        self.up = nn.Parameter(torch.randn(rank, m) / 10)

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up


def lora():
    model = gpt2().requires_grad_(False)
    for block in model.transformer.h:
        block.attn.c_attn = Lora(block.attn.c_attn)
        block.mlp.c_fc = Lora(block.mlp.c_fc)
    return model.train()


def test_lora_trains_its_part_under_random_plans():
    torch.manual_seed(0)
    check(lora().double(), (), tokens(), grids=((2, 2),))


@on_ranks((1, 2))
def test_lora_then_more_is_trained(grid):
    model, inputs = lora(), tokens()
    one = copy.deepcopy(model)
    ours = autotp.parallelize(model, grid, inputs, cluster=CLUSTER)
    for thaw in (lambda m: None, lambda m: m.transformer.ln_f.requires_grad_(True)):
        found = []
        for net in (ours, one):
            thaw(net)
            net.zero_grad()
            net(**inputs).loss.backward()
            found.append(gradients(net))
        assert_near(*found, bound=1e-4)
        assert all(p.requires_grad == (p.grad is not None) for p in ours.parameters())


# Autocast -----------------------------------------------------------------------------------------


def region(m, x):
    h = m.shared(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = mlp(m, h)
        with torch.autocast("cpu", enabled=False):
            high = m.shared(low.to(h.dtype))
    return (high + h).pow(2).mean()


def test_autocast_within_the_forward_is_part_of_it():
    torch.manual_seed(0)
    model, x = Model(region), torch.randn(4, 6, WIDTH)
    subject = prepare(model, (x,), {})
    assert any(v.dtype is torch.bfloat16 for v in subject.network.values.values())
    assert subject.captured == ()
    assert compare(subject, random_plan(subject, as_grid((2, 2)), 1)).ok


@on_ranks((1, 2))
def test_autocast_around_the_model_acts_as_on_the_original(grid):
    for forward in (lambda m, x: mlp(m, x), lambda m, x: m.b(F.layer_norm(m.a(x), [2 * WIDTH]))):
        model, x = Model(forward), torch.randn(4, 6, WIDTH)
        one = copy.deepcopy(model)
        ours = autotp.parallelize(model, grid, (x,), cluster=CLUSTER)
        outs = []
        for net in (ours, one):
            with torch.autocast("cpu", torch.bfloat16):
                outs.append(net(x))
            outs[-1].float().pow(2).mean().backward()
        assert outs[0].dtype is outs[1].dtype is torch.bfloat16
        near = {"out": outs[0].detach().float()}, {"out": outs[1].detach().float()}
        assert_near(*near, bound=0.03)
        assert_near(gradients(ours), gradients(one), bound=0.05)
        assert not torch.equal(outs[1].float(), one(x))  # it did act
