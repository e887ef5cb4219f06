"""A sequence split through whole models, attention included: pinned, found, and under a budget."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autotp
from autotp.cost_model.cluster import bandwidth_bound
from autotp.layouts import I, Shard
from tests.models import MODELS, NanoGPT, tokens


class OneHead(nn.Module):
    """Attention whose heads cannot split, and an MLP."""

    def __init__(self, width=32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.norm(x)
        mixed = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y), is_causal=True)
        x = x + self.o(mixed)
        return x + self.down(F.gelu(self.up(x)))


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(OneHead(), OneHead())

    def forward(self, x):
        return self.layers(x).square().mean()


def attention(plan):
    return [d.factors.get("col") for d in plan if d.op == "scaled_dot_product_attention"]


@pytest.mark.parametrize("grid", [(1, 3), (2, 2)], ids=str)
def test_a_sequence_stays_split_through_attention(grid):
    torch.manual_seed(0)
    model, inputs = NanoGPT(), dict(idx=tokens(), targets=tokens())
    pins = autotp.schemes.ring_attention(model, grid, inputs)
    plan = autotp.plan(model, grid, inputs, pins=pins)
    attention = [d for d in plan if d.op == "scaled_dot_product_attention"]
    assert {d.factors["col"] for d in attention} == {"s+t"}
    stream = [d for d in plan if d.name.startswith("h.") and not d.free]
    assert all(any(isinstance(t, Shard) for t in d.results[0][1:]) for d in stream)
    gathered = {m.value for m in plan.moves if m.forward == "all_gather"}
    assert gathered == {*plan["lm_head"].makes}  # it is returned
    assert all(t is I for r in plan.params.values() for t in r.layout)
    assert autotp.check(model, grid, inputs, pins=pins).ok


@pytest.mark.parametrize("name", [pytest.param("gpt2 eager", marks=pytest.mark.slow), "llama"])
def test_masks_and_rotary_tables_do_not_gather_the_stream(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    pins = autotp.schemes.ring_attention(model, (2, 3), inputs)
    plan = autotp.plan(model, (2, 3), inputs, pins=pins)
    gathered = {m.of for m in plan.moves if m.forward == "all_gather"}
    keys = {"addmm", "addmm_4"} if name == "gpt2 eager" else set()  # one projection of q, k and v
    assert gathered - keys == {m.of for m in plan.moves if m.value in plan["lm_head"].makes}
    assert autotp.check(model, (2, 3), inputs, pins=pins).ok


def test_a_long_sequence_is_split_without_pins_and_on_a_ring_where_memory_is_short():
    with torch.device("meta"):
        model, inputs = Layers(), dict(x=torch.zeros(1, 4096, 32))

    def planned(memory_bytes, pins=None):
        cluster = bandwidth_bound(1e9, flops_per_s=1e12, memory_bytes=memory_bytes)
        return autotp.plan(model, (1, 4), inputs, cluster=cluster, pins=pins)

    free = planned(float("inf"))
    assert attention(free) == ["s", "s"] and free["layers.1.up"].factors == {"col": "s"}
    kept = {"*": {"backward": "keep"}}
    assert "s+t" in attention(planned(0.7 * free.memory_bytes, kept))
