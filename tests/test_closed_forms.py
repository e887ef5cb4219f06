"""A layer under each scheme sends what its formula says, as an identity of symbols.

g is 2, not 3: autograd keeps what forward gathered. The formulas count T h and h^2; the layer has no
biases and no norm weights, and the row statistics of a split norm (T terms) are not moves.
"""

import functools

import pytest
import sympy
import torch
from autotp import schemes
from autotp.cost_model import closed_forms as cf
from autotp.cost_model.closed_forms import a, b, c, h, p, q, r, s, sent_volume
from autotp.cost_model.cluster import bandwidth_bound
from autotp.grid import as_grid
from autotp.passes.capture import capture
from autotp.passes.factors import infer_factors
from autotp.passes.network import read_network
from autotp.passes.planning import search_plan
from torch import nn
from torch.nn import functional as F

B, S, N, D, V = 8, 12, 4, 5, 7
H = N * D
heads = sympy.Symbol("heads", positive=True)
SYMBOLS = {1: 1, B: b, S: s, N: heads, D: h / heads, H: h, 3 * H: 3 * h, 4 * H: 4 * h, B * S: b * s, V: V}


class Layer(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden, elementwise_affine=False)
        self.ln_2 = nn.LayerNorm(hidden, elementwise_affine=False)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.proj = nn.Linear(hidden, hidden, bias=False)
        self.fc1 = nn.Linear(hidden, 4 * hidden, bias=False)
        self.fc2 = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x):
        qkv = self.qkv(self.ln_1(x)).chunk(3, -1)
        query, key, value = (t.unflatten(-1, (N, -1)).transpose(1, 2) for t in qkv)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.ln_2(x))))


class Model(nn.Module):
    def __init__(self, layers, hidden=H):
        super().__init__()
        self.embed = nn.Embedding(V, hidden)
        self.layers = nn.Sequential(*(Layer(hidden) for _ in range(layers)))

    def forward(self, tokens):
        return self.layers(self.embed(tokens)).square().mean()


@functools.cache
def described(layers):
    tokens = torch.zeros(B, S, dtype=torch.long)
    program = capture(Model(layers), (tokens,), {}, train=True)
    network = read_network(program)
    return program, network, infer_factors(network, program.inputs)


def volume(layers, scheme, grid, ranks):
    """Return the elements that the moves of a plan send, in symbols, `ranks` naming the axes."""
    program, network, factors = described(layers)
    pins = schemes.pins_of(schemes.SCHEMES[scheme], program, network, factors, grid)
    plan = search_plan(program, network, factors, grid, bandwidth_bound(), pins).plan
    found = []
    for move in plan.moves:
        size = sympy.prod(SYMBOLS[k] for k in network.values[move.value].shape)
        for axis, kind in zip(grid.names, move.before, strict=True):
            size /= ranks[axis] if axis != move.axis and str(kind).startswith("S") else 1
        found += [(kind, size, ranks[move.axis]) for kind in (move.forward, move.backward)]
    return sent_volume(found)


FORMULAS = [
    ("megatron", (1, 4), (1, p), cf.megatron_1d()),
    ("megatron_sp", (1, 4), (1, p), cf.megatron_1d()),
    ("summa", (2, 2), (q, q), cf.summa_ab(g=2)),
    ("summa_abt", (2, 2), (q, q), cf.summa_abt(g=2)),
    ("weight_stationary", (2, 4), (r, c), cf.weight_stationary()),
    ("batch_x_tensor", (4, 2), (a, p / a), cf.batch_tensor()),
    ("fsdp", (1, 4), (1, p), cf.fully_sharded(g=2)),
    ("fsdp", (2, 2), (r, c), cf.fully_sharded(r * c, g=2)),
    ("data_parallel", (1, 4), (1, p), cf.batch_tensor(a=p, n=1)),
]


@pytest.mark.parametrize(("scheme", "sizes", "names", "formula"), FORMULAS)
def test_a_layer_sends_what_the_formula_says(scheme, sizes, names, formula):
    grid = as_grid(sizes)
    ranks = dict(zip(grid.names, names, strict=True))
    layer = volume(3, scheme, grid, ranks) - volume(2, scheme, grid, ranks)
    assert sympy.simplify(layer - formula) == 0


def test_every_scheme_has_a_formula():
    assert {scheme for scheme, *_ in FORMULAS} == set(schemes.SCHEMES)
