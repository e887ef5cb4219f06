"""Small models written in unusual ways: the best and random plans compute what they compute.

Each pattern is a forward over two linear layers `a` and `b`, a table `e` and a scalar `s`; what
torch.export would lose in silence is refused by name.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autotp.check import compare, prepare
from autotp.cost_model.cluster import bandwidth_bound
from autotp.errors import CaptureError
from autotp.grid import as_grid
from autotp.passes.capture.model import capture
from autotp.passes.planning import search_plan
from tests.random_plans import random_plan

CHIPS = bandwidth_bound(1e9, flops_per_s=1e9)
WIDTH, VOCAB = 8, 13


class Pattern(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.e = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.s = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("causal", torch.full((6, 6), -math.inf).triu(1))
        self.computes = forward

    def forward(self, *args):
        return self.computes(self, *args)


def reuse(m, x, i):
    h = m.b(F.relu(m.b(x))) @ m.b.weight.T
    return F.linear(h + m.e(i) * m.e((i + 1) % VOCAB), m.e.weight).logsumexp(-1).mean()


def broadcast(m, x, i):
    y = m.b(x) * m.s / (1 + m.s**2) + m.e.weight[3] - x * m.b.weight[: x.shape[1], :1]
    added = torch.addmm(m.s, y[0], m.b.weight).tanh()  # a scalar is added once
    return added.sum() + torch.baddbmm(m.s, y, y.mT).mean() + torch.rsub(y, x, alpha=2).sum()


def pools(m, x, i):
    h = m.b(x)
    rows = h.var(1), h.std(-1, unbiased=False), h.amax(1), h.min(-1).values, h.logsumexp(1)
    return *rows, h.mean(1), h.max(), h.cumsum(1), h.flip(1), h.swapaxes(0, 1), h.norm()


def attention(m, x, i):
    q, k = m.a(x).view(*x.shape[:2], 2, 2, 4).unbind(2)
    scores = torch.einsum("bshe,bthe->bhst", q, k) + m.causal[: x.shape[1], : x.shape[1]]
    y = torch.einsum("bhst,bthe->bshe", scores.softmax(-1), k).flatten(2)
    return m.b(y + F.softmax(x, 1)).pow(2).mean()


def gates(m, x, i):
    h = m.a(x)
    (a, b), (c, d), (e, f) = h.chunk(2, -1), h.split(WIDTH, -1), (h[..., :WIDTH], h[..., WIDTH:])
    unequal, _unread = h.split([4, 12], -1)
    mixed = F.silu(a) * b + c.sigmoid() * d + e * F.gelu(f) + h[..., ::2] * h[..., 1::2]
    return m.b(torch.cat([mixed, x], 1)).sum(1), torch.stack([a, b], 1).mean(1), unequal


def masks(m, x, i):
    h, mask = m.b(x), i > 5
    rows = (h * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    kept = torch.where(mask[..., None], h, 0.0).sum() / mask.sum()
    filled = h.masked_fill(~mask[..., None], -1e4).amax(1).mean()
    return rows.sum() + kept + filled + (h * (h > 0)).sum() / (h > 0).sum()


def losses(m, x, i):
    h = F.linear(m.b(x), m.e.weight)
    rows, target = h.flatten(0, 1), i.masked_fill(i == 2, -100).flatten()
    total = F.cross_entropy(rows, target, weight=h.detach()[0, 0].abs(), label_smoothing=0.1)
    total += F.cross_entropy(h.transpose(1, 2), i) + F.cross_entropy(h, h.detach().softmax(-1))
    total += F.cross_entropy(rows, i.flatten(), reduction="none").view(i.shape).mean(1).sum()
    total += F.mse_loss(h, h.detach().mean(1, keepdim=True).expand_as(h)) + F.smooth_l1_loss(h, -h)
    return total + F.binary_cross_entropy_with_logits(h, h.detach().sigmoid(), reduction="sum")


def outputs(m, x, i):
    h = m.b(x)
    views = {"h": h, "twice": (h, h), "flat": h.view(-1), "detached": h.detach()}
    own = [m.b.weight, m.b.weight.t(), m.s, m.causal, x, i, None, 3]
    return views, own, h.argmax(-1), (h > 0).sum(), h.detach().long()


def partials(m, x, i):
    p, q = m.b(x), F.linear(x, m.b.weight.t())
    r = torch.cat([-(p + q) * 0.5 - x, p], 1) / m.s
    r = r.view(len(x), -1, 2, 4).transpose(1, 2).sum(-1).mean(1)
    return (r * r).sum() + p.sum() * q.sum() + p.sum() ** 2 + (p.sum() + 1).expand(3).sum()


def single(m, x, i):
    y = (x @ m.b.weight[:, :1]) * m.s
    return m.a(y.squeeze(-1).softmax(-1).unsqueeze(-1).expand_as(x)).squeeze().sum(-1)


PATTERNS = (
    reuse, broadcast, pools, attention, gates, masks, losses, outputs, partials, single,
)  # fmt: skip


@pytest.mark.parametrize("shape", ((4, 6), (7, 5)), ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.__name__)
def test_every_plan_computes_what_the_pattern_computes(pattern, shape):
    torch.manual_seed(0)
    x = torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)
    args = x, torch.randint(VOCAB, shape)
    subject = prepare(Pattern(pattern).double(), args, {})
    for seed, sizes in enumerate(((2, 2), (2, 3), (1, 3))):
        grid = as_grid(sizes)
        parts = subject.program, subject.network, subject.factors
        for plan in search_plan(*parts, grid, CHIPS).plan, random_plan(subject, grid, seed):
            report = compare(subject, plan)
            assert report.ok, report


# Refused ------------------------------------------------------------------------------------------


def hooked(m, x):
    h = m.b(x)
    h.register_hook(lambda grad: 2 * grad)
    return h.sum()


REFUSED = {
    "would be lost": hooked,
    "a shape that depends": lambda m, x: m.b(x)[x > 0].sum(),
    "torch.vmap": lambda m, x: torch.vmap(m.b)(x).sum(),
}


@pytest.mark.parametrize(("said", "forward"), REFUSED.items())
def test_what_a_graph_cannot_hold_is_refused(said, forward):
    with pytest.raises(CaptureError, match=said):
        capture(Pattern(forward), (torch.randn(3, WIDTH),), {}, train=True)


def test_memory_shared_by_two_parameters_is_refused():
    model = Pattern(lambda m, x: m.b(x))
    model.c = nn.Parameter(model.b.weight.detach()[2:])
    with pytest.raises(CaptureError, match="share memory"):
        capture(model, (torch.randn(3, WIDTH),), {}, train=True)


def test_tensors_stored_by_the_forward_are_taken_back():
    def storing(m, x):
        m.last = m.b(x)
        return m.last.sum()

    model = Pattern(storing)
    with pytest.warns(UserWarning, match="stores tensors in last"):
        capture(model, (torch.randn(3, WIDTH),), {}, train=True)
    assert not hasattr(model, "last")
