"""Factor inference: a fused dim is known by its blocks and heads, however the model spells it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autotp.passes.capture.model import capture
from autotp.passes.factors import infer_factors
from autotp.passes.network import read_network

B, S, H, HEADS, D = 2, 3, 24, 6, 4


class Fused(nn.Module):
    """Attention behind one projection, taken apart by `parts` into three of `[b, s, n, d]`."""

    def __init__(self, parts):
        super().__init__()
        self.qkv, self.out, self.parts = nn.Linear(H, 3 * H), nn.Linear(H, H), parts

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.parts(self.qkv(x)))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, S, H))


def heads(t):
    return t.view(B, S, -1, D)


SPELLINGS = {
    "split": lambda y: [heads(t) for t in y.split(H, dim=2)],
    "split with sizes": lambda y: [heads(t) for t in y.split([H, H, H], dim=2)],
    "chunk": lambda y: [heads(t) for t in y.chunk(3, dim=-1)],
    "slice": lambda y: [heads(y[..., k * H : (k + 1) * H]) for k in range(3)],
    "view and unbind": lambda y: y.view(B, S, 3, HEADS, D).unbind(2),
    "view and select": lambda y: [y.view(B, S, 3, HEADS, D)[:, :, k] for k in range(3)],
    "unflatten and permute": lambda y: y.unflatten(-1, (3, HEADS, D)).permute(2, 0, 1, 3, 4),
}


def splits(model, *inputs):
    """Return {(op, factor): [(atom's size, blocks)]} of every product with a parameter."""
    program = capture(model, inputs, {}, train=True)
    network = read_network(program)
    factors = infer_factors(network)
    return {
        (program.names[op.name], f): [(w.unit_count, w.parts) for w in factors.ways(op.name, f)]
        for op in network.ops
        for f in op.signature.factors()
    }


@pytest.mark.parametrize("parts", SPELLINGS.values(), ids=SPELLINGS)
def test_a_fused_projection_splits_by_heads_inside_each_block(parts):
    found = splits(Fused(parts), torch.randn(B, S, H))
    assert found["qkv", "o"] == [(HEADS, (H, H, H))]
    assert found["out", "i"] == [(HEADS, (H,))]


def test_a_projection_fused_by_head_splits_plainly():
    model = Fused(lambda y: y.view(B, S, HEADS, 3, D).unbind(3))
    assert splits(model, torch.randn(B, S, H))["qkv", "o"] == [(HEADS, (3 * H,))]


class Grouped(nn.Module):
    """Grouped queries: 6 heads over 2 key heads, by repetition or by the flag."""

    KEY_HEADS = 2

    def __init__(self, repeat, fused=False):
        super().__init__()
        self.repeat, self.fused = repeat, fused
        self.sizes = [H, self.KEY_HEADS * D, self.KEY_HEADS * D]
        if fused:
            self.qkv = nn.Linear(H, sum(self.sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(H, n) for n in self.sizes)
        self.out = nn.Linear(H, H)

    def blocks(self, x):
        if not self.fused:
            return self.q(x), self.k(x), self.v(x)
        y, key = self.qkv(x), self.sizes[1]
        return y[..., :H], y[..., H : H + key], y[..., H + key :]

    def forward(self, x):
        q, k, v = (t.view(B, S, -1, D).transpose(1, 2) for t in self.blocks(x))
        if self.repeat:
            k, v = (self.repeated(t) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=not self.repeat)
        return self.out(y.transpose(1, 2).reshape(B, S, H))

    def repeated(self, t):
        groups = HEADS // self.KEY_HEADS
        wide = t[:, :, None].expand(B, self.KEY_HEADS, groups, S, D)
        return wide.reshape(B, HEADS, S, D)


@pytest.mark.parametrize("repeat", [True, False], ids=["expand and reshape", "enable_gqa"])
def test_key_heads_are_never_cut(repeat):
    found = splits(Grouped(repeat), torch.randn(B, S, H))
    assert found["k", "o"] == found["v", "o"] == [(2, (8,))]
    assert found["q", "o"] == [(2, (24,)), (3, (12, 12))]
    assert found["out", "i"] == found["q", "o"]


@pytest.mark.parametrize("repeat", [True, False], ids=["expand and reshape", "enable_gqa"])
def test_unequal_blocks_split_by_the_key_heads_that_they_share(repeat):
    found = splits(Grouped(repeat, fused=True), torch.randn(B, S, H))
    assert found["qkv", "o"] == [(2, (24, 8, 8))]


class MultiHead(nn.Module):
    """Torch's own, which views batch and heads as one dim and puts the sequence first."""

    def __init__(self, weights):
        super().__init__()
        self.attn, self.weights = nn.MultiheadAttention(H, HEADS), weights

    def forward(self, x):
        return self.attn(x, x, x, need_weights=self.weights)[0]


@pytest.mark.parametrize("weights", [True, False], ids=["bmm", "sdpa"])
def test_multi_head_attention_splits_its_one_projection_by_heads(weights):
    found = splits(MultiHead(weights), torch.randn(S, B, H))
    assert found["attn.linear", "o"][0] == (HEADS, (H, H, H))
    assert found["attn.linear_1", "i"][0] == (HEADS, (H,))


def test_batch_and_heads_of_one_dim_split_apart():
    found = splits(MultiHead(weights=True), torch.randn(S, B, H))
    assert found["attn.bmm", "z"] == [(B, (B * HEADS,)), (HEADS, (HEADS,) * B)]


class Mlp(nn.Module):
    """A gate and a value from one projection, as Phi-3 and many others fuse them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, 16), nn.Linear(8, H)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


def test_a_fused_gate_splits_in_two_blocks():
    found = splits(Mlp(), torch.randn(B, S, H))
    assert found["up", "o"] == [(8, (8, 8))]
    assert found["down", "i"] == [(8, (8,))]


def test_dims_that_no_op_joins_stay_apart():
    found = splits(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(B, S, 6))
    assert found["0", "o"] == found["1", "i"] == [(6, (6,))]


def test_rotary_halves_are_needed_whole():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(H, H)

        def forward(self, x):
            q = self.q(x).view(B, S, HEADS, D)
            first, second = q[..., : D // 2], q[..., D // 2 :]
            q = torch.cat([-second, first], -1) * 2 + q
            return F.scaled_dot_product_attention(q, q, q)

    ways = splits(Rotary(), torch.randn(B, S, H))["q", "o"]
    assert ways == [(HEADS, (H,))]
