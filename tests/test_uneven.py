"""Sizes that no axis divides: split unevenly where that is legal, and right everywhere."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autotp
from autotp.check import compare, prepare
from autotp.cost_model.cluster import bandwidth_bound
from autotp.errors import PinError
from autotp.grid import as_grid
from autotp.passes.planning import search_plan
from tests.random_plans import random_plan

CHIPS = bandwidth_bound(1e9, flops_per_s=1e9)
GRIDS = ((2, 2), (1, 4), (2, 3))
BATCH, SEQ, WIDTH, HIDDEN, VOCAB = 5, 7, 15, 31, 29


class Decoder(nn.Module):
    """A language model of odd vocabulary, width, heads and hidden size."""

    def __init__(self, norm, merged):
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.norm = norm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.merged = merged

    def forward(self, ids):
        b, s = ids.shape
        x = self.table(ids)
        q, k, v = (t.transpose(1, 2) for t in self.qkv(self.norm(x)).view(b, s, 9, 5).chunk(3, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, s, WIDTH))
        x = x.reshape(b * s, WIDTH) if self.merged else x
        logits = self.head(x + self.down(F.gelu(self.up(x))))
        if self.merged:
            return F.cross_entropy(logits, ids.flatten(), ignore_index=3)
        return (logits.softmax(-1) ** 2).mean() + logits.mean((0, 2)).square().mean()


class Means(nn.Module):
    """Averages over rows that split unevenly, alone and merged, in every spelling."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x, y):
        h = torch.tanh(self.fc(x))
        p = self.out(h).squeeze(-1)
        rows = h.mean(0).sum() + h.flatten(0, 1).mean(0).square().sum() + h.mean((0, 1)).norm()
        losses = F.mse_loss(p, y) + F.l1_loss(p.flatten(), y.flatten())
        losses = losses + F.binary_cross_entropy_with_logits(p, y.sigmoid())
        return losses + rows + F.huber_loss(p, y, reduction="sum") / p.numel()


CASES = {
    "merged rows": lambda: (Decoder(nn.LayerNorm, True), {"ids": torch.randint(VOCAB, (5, 7))}),
    "plain rows": lambda: (Decoder(nn.RMSNorm, False), {"ids": torch.randint(VOCAB, (5, 7))}),
    "means": lambda: (Means(), {"x": torch.randn(5, 7, WIDTH), "y": torch.randn(5, 7)}),
}


@functools.lru_cache(maxsize=1)  # a model's tests follow one another
def subject(name):
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    floats = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return prepare(model.double(), (), floats)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_odd_sizes_compute_what_the_model_computes(name, grid):
    first = subject(name)
    parts = first.program, first.network, first.factors
    best = search_plan(*parts, as_grid(grid), CHIPS).plan
    assert best.collectives(), "nothing was split"
    for plan in (best, *(random_plan(first, as_grid(grid), seed) for seed in range(3))):
        report = compare(first, plan)
        assert report.ok, report


def checked(pins, grid=(1, 4), name="merged rows"):
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    assert autotp.check(model, grid, inputs, cluster=CHIPS, pins=pins).ok
    return autotp.plan(model, grid, inputs, cluster=CHIPS, pins=pins)


@pytest.mark.parametrize("grid", ((1, 4), (1, 3)), ids=str)
def test_an_odd_vocabulary_and_an_odd_hidden_size_are_split(grid):
    pins = {
        "head": {"col": "o"},
        "up": {"col": "o"},
        "down": {"col": "i"},
        "up.weight": {"col": "S(0)"},
    }
    plan = checked(pins, grid)
    assert plan["head"].results[0][1] == plan["cross_entropy_loss"].operands[0][1]
    ranks = grid[1]
    assert plan.params["up.weight"].local_bytes == -(-HIDDEN // ranks) * WIDTH * 4


def test_an_odd_batch_is_split_and_its_mean_is_the_mean_of_all():
    checked({"table": {"col": ".0"}, "up": {"col": ".0"}}, (1, 3), "plain rows")
    checked({"mse_loss": {"col": ".0"}, "fc": {"col": ".0"}}, (1, 3), "means")


def test_no_rank_is_left_with_nothing():
    with pytest.raises(PinError, match="of 4: legal are I, R, P0, P1, s, i, o"):  # 2, 2, 1 and 0
        checked({"fc": {"col": ".0"}}, (1, 4), "means")


def test_merged_rows_are_cut_between_rows_of_the_batch_only():
    with pytest.raises(PinError, match="of 2: legal are I, R, P0, P1, i, o"):  # 5 x 7 rows
        checked({"up": {"col": ".0"}}, (1, 2))
    checked({"up": {"col": ".0"}}, (1, 5))
