"""rng="exact" draws what one device draws, and "fast" what its promise says, under any plan."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autotp
from autotp.axis import run_ranks
from autotp.check import compare, prepare
from autotp.errors import AutotpError, CaptureError, RuntimeStateError
from autotp.grid import as_grid
from autotp.layouts import Shard
from autotp.passes.capture.model import capture
from autotp.passes.emit.codegen import emit
from autotp.reference import SEED
from autotp.simulate import local_params, placeholder_values
from tests import models
from tests.end_to_end.models import CLUSTER, assert_near, gpt2, gradients, loss_of, tokens
from tests.end_to_end.on_ranks import on_ranks
from tests.random_plans import random_plan

WIDTH = 12


class Drawing(nn.Module):
    """A forward over two linear layers, a buffer that counts calls and a batch norm's channels."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.computes = forward

    def forward(self, x):
        return self.computes(self, x)


def dropouts(m, x):
    h = F.dropout(m.a(F.dropout(x, 0.2)), 0.4)
    h = F.alpha_dropout(h, 0.3) + F.dropout(h.mT, 0.3).mT  # a mask in another order of memory
    h = F.dropout1d(h, 0.3) + F.feature_alpha_dropout(h, 0.2)
    return F.dropout(m.b(h), 0.1).pow(2).mean()


def likes(m, x):
    h = m.a(x)
    noise = torch.randn_like(h) + torch.rand_like(h.mT).mT + torch.empty_like(h).exponential_()
    kept = (torch.rand(h.shape) < 0.7) & torch.bernoulli(torch.full_like(h, 0.8)).bool()
    return m.b(torch.where(kept, h + 0.1 * noise, 0.0)).pow(2).mean()


def gates(m, x):
    h = m.a(x)
    open_ = torch.bernoulli(h.sigmoid())
    soft = F.gumbel_softmax(h, tau=0.7)
    return m.b(h * open_ + soft + torch.normal(h.detach(), 0.5)).pow(2).mean()


def picks(m, x):
    h = m.b(m.a(x))
    rows = torch.multinomial(h.detach().flatten(0, 1).softmax(-1), 3)
    return h.flatten(0, 1).gather(1, rows).mean() + h[torch.randperm(len(h))].pow(2).mean()


def unread(m, x):
    m.calls += 1  # torch's functionalisation runs, and drops what nobody reads
    torch.rand(3)
    F.dropout(m.a(x), 0.5)
    torch.empty(5).normal_()
    with torch.no_grad():
        torch.rand_like(x)
    h = F.dropout(m.a(x), 0.5)
    F.dropout(h.mT, 0.25) * 2
    return F.dropout(m.b(h), 0.25).pow(2).mean()


def copies(m, x):
    """Copy into another order before draws: right there, behind pointwise ops, views and twins."""
    h = F.dropout(m.a(x).mT.contiguous(), 0.3)
    h = F.dropout(F.gelu(h.permute(2, 0, 1).contiguous()), 0.3).permute(1, 2, 0)
    h = h + torch.rand_like(h.mT.contiguous()).mT
    h = h + torch.rand_like(h.permute(1, 2, 0).clone()).permute(2, 0, 1)
    left, right = h.mT.contiguous().unsqueeze(1).chunk(2, -1)
    h = torch.cat((F.dropout(left, 0.2), torch.bernoulli(right.sigmoid())), -1).squeeze(1)
    h = F.dropout(h.clone(memory_format=torch.contiguous_format).contiguous().clone(), 0.2)
    return F.dropout(m.b(h), 0.1).pow(2).mean()


FORWARDS = (dropouts, likes, gates, picks, unread, copies)


def transformer():
    layer = nn.TransformerEncoderLayer(WIDTH, 3, 16, dropout=0.3, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(4, 5, WIDTH),)


def encoder_decoder():
    model = nn.Transformer(WIDTH, 3, 1, 1, 16, dropout=0.3, batch_first=True)
    return model, (torch.randn(4, 5, WIDTH), torch.randn(4, 3, WIDTH))


MODELS = {
    "gpt2": lambda: models.gpt2(dropout=0.3),
    "gpt2 eager": lambda: models.gpt2("eager", dropout=0.3),
    "bert": lambda: models.bert(dropout=0.3),
    "encoder": transformer,
    "encoder and decoder": encoder_decoder,
    **{f.__name__: lambda f=f: (Drawing(f), (torch.randn(5, 7, WIDTH),)) for f in FORWARDS},
}


def subject_of(name, rng):
    torch.manual_seed(1)
    model, inputs = MODELS[name]()
    model = model.double().train()
    if isinstance(inputs, dict):
        return prepare(model, (), inputs, rng)
    return prepare(model, tuple(x.double() for x in inputs), {}, rng)


@pytest.mark.parametrize("name", MODELS)
def test_exact_draws_are_those_of_one_device_under_random_plans(name):
    subject = subject_of(name, "exact")
    assert subject.captured == ()  # the captured graph draws what the model draws
    for seed, sizes in enumerate(((2, 2), (1, 3))):
        report = compare(subject, random_plan(subject, as_grid(sizes), seed))
        assert report.ok, report


def draws(subject, plan, seeds, rng="exact"):
    """Return, per rank and step, the outputs and the state that its generator is left in."""

    def run(rank, axes):
        module = emit(subject.program, subject.network, plan, plan.grid.coords(rank), axes, rng)
        state = module.meta["rng"]
        params = local_params(plan, subject.state, rank)
        values = placeholder_values(subject.program, params, subject.state, subject.inputs)
        out, state.own = [], {}
        for state.step_seed in seeds:
            out.append([o.detach() for o in module(*values)])
        return out, state.own

    return run_ranks(plan.grid, run)


@pytest.mark.parametrize("name", ("gpt2", "gates", "unread"))
def test_steps_in_a_row_draw_on_and_leave_the_generator_as_one_device_does(name):
    subject = subject_of(name, "exact")
    torch.manual_seed(SEED)
    values = placeholder_values(subject.program, subject.state, subject.state, subject.inputs)
    expected = [subject.program.graph_module(*values) for _ in range(3)]
    assert not torch.equal(expected[0][0], expected[1][0])
    after = torch.get_rng_state()
    plan = random_plan(subject, as_grid((2, 2)), 5)
    for steps, own in draws(subject, plan, [SEED] * 3):
        assert torch.equal(own[torch.device("cpu")], after)
        for step, whole in zip(steps, expected, strict=True):
            if not plan.outputs[0] or not any(isinstance(t, Shard) for t in plan.outputs[0]):
                torch.testing.assert_close(step[0], whole[0].detach())


# Fast: three promises ----------------------------------------------------------------------------


class Kept(torch.fx.Interpreter):
    """Run a program on ones that dropout reads; keep what each of its dropouts keeps."""

    def __init__(self, module):
        super().__init__(module)
        self.masks = {}

    def run_node(self, node):
        out = super().run_node(node)
        if node.op == "call_function" and node.target.__name__ == "dropout":
            self.masks[node.name] = (out != 0, node.meta["layout"])
        return out


def kept(subject, plan, seed):
    """Return, per rank, its masks by site with their layouts."""

    def run(rank, axes):
        module = emit(subject.program, subject.network, plan, plan.grid.coords(rank), axes)
        module.meta["rng"].step_seed = seed
        params = local_params(plan, subject.state, rank)
        interpreter = Kept(module)
        interpreter.run(*placeholder_values(subject.program, params, subject.state, subject.inputs))
        return interpreter.masks

    return run_ranks(plan.grid, run)


def several(m, x):
    h = F.dropout(m.a(F.dropout(x + 5, 0.4)), 0.4)
    return F.dropout(m.b(F.dropout(h.mT, 0.4).mT), 0.4).sum()


@pytest.mark.parametrize("seed", range(4))
def test_fast_masks_agree_where_replicated_and_differ_where_split(seed):
    torch.manual_seed(seed)
    subject = prepare(Drawing(several), (torch.randn(8, 30, WIDTH),), {}, "exact")
    grid = as_grid((2, 2))
    plan = random_plan(subject, grid, seed)
    ranks, again, other = (kept(subject, plan, s) for s in (7, 7, 8))
    for site, (_, layout) in ranks[0].items():
        for a, b in itertools.combinations(range(4), 2):
            moved = [
                isinstance(t, Shard)
                for t, i, j in zip(layout, grid.coords(a), grid.coords(b), strict=True)
                if i != j
            ]
            first, second = ranks[a][site][0], ranks[b][site][0]
            assert torch.equal(first, second) != any(moved), (site, layout)
            if any(moved):
                common = tuple(slice(min(n)) for n in zip(first.shape, second.shape, strict=True))
                agree = (first[common] == second[common]).double().mean()
                assert 0.42 < agree < 0.62  # independent masks of 0.4 agree on 0.52
        for rank in range(4):
            assert torch.equal(ranks[rank][site][0], again[rank][site][0])
            assert not torch.equal(ranks[rank][site][0], other[rank][site][0])


# Real ranks --------------------------------------------------------------------------------------


@on_ranks((1, 2), (2, 2))
def test_training_with_dropout_is_what_one_device_trains(grid):
    model, inputs = gpt2(dropout=0.2).train(), tokens()
    one = copy.deepcopy(model)
    torch.manual_seed(3)
    ours = autotp.parallelize(model, grid, inputs, cluster=CLUSTER, rng="exact")
    results = []
    for net in (one, ours):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(net(**inputs))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append(({"losses": torch.stack(losses), **gradients(net)}, torch.get_rng_state()))
    (theirs, their_state), (mine, my_state) = results
    assert torch.equal(their_state, my_state)
    assert_near(mine, theirs, bound=1e-4)


@on_ranks((1, 2))
def test_other_seeds_on_other_ranks_are_refused_where_draws_must_agree(grid):
    inputs = tokens()
    ours = autotp.parallelize(gpt2(dropout=0.2).train(), grid, inputs, cluster=CLUSTER, rng="exact")
    torch.manual_seed(torch.distributed.get_rank())
    with pytest.raises(RuntimeStateError, match="needs the same random state on every rank"):
        ours(**inputs)


def seeding(m, x):
    torch.manual_seed(0)
    return (m.a(x) * torch.rand(x.shape[:-1]).unsqueeze(-1)).sum()


def forking(m, x):
    with torch.random.fork_rng():
        return (m.a(x) * torch.rand(x.shape[:-1]).unsqueeze(-1)).sum()


GENERATOR = torch.Generator()


def own(m, x):
    return (m.a(x) * torch.rand(x.shape[:-1], generator=GENERATOR).unsqueeze(-1)).sum()


@pytest.mark.parametrize(
    ("said", "forward"), {"manual_seed": seeding, "fork_rng": forking, "of its own": own}.items()
)
def test_what_a_graph_cannot_draw_is_refused(said, forward):
    with pytest.raises(CaptureError, match=said):
        capture(Drawing(forward), (torch.randn(5, 7, WIDTH),), {}, train=True)


def test_a_mode_that_there_is_not_is_refused():
    with pytest.raises(AutotpError, match='rng="fast" or rng="exact"'):
        autotp.check(Drawing(dropouts), (1, 2), (torch.randn(5, 7, WIDTH),), rng="same")
