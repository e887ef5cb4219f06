"""A layer under each scheme sends what its formula says, as an identity of symbols.

g is 2 where autograd keeps what forward gathered, and 3 where backward gathers it again. The
formulas count T h and h^2: layers have no bias and no norm weights, and the row statistics of a
split norm (T terms) are not among the moves.
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
from autotp.passes.capture.model import capture
from autotp.passes.factors import infer_factors
from autotp.passes.network import read_network
from autotp.passes.planning import search_plan
from tests.blocks import HEADS, VOCABULARY, Blocks

B, S, D = 8, 12, 5
H = HEADS * D
heads = sympy.Symbol("heads", positive=True)
SYMBOLS = {B: b, S: s, B * S: b * s, HEADS: heads, D: h / heads, VOCABULARY: sympy.Symbol("v")}
SYMBOLS |= {k * H: k * h for k in (1, 3, 4)}


@functools.cache
def described(layers):
    tokens = torch.zeros(B, S, dtype=torch.long)
    program = capture(Blocks(layers, H), (tokens,), {}, train=True)
    network = read_network(program)
    return program, network, infer_factors(network, program.inputs)


def volume(layers, scheme, grid, ranks, more=None):
    """Return the elements that the moves of a plan send, in symbols, `ranks` naming the axes."""
    program, network, factors = described(layers)
    pins = schemes.pins_of(schemes.SCHEMES[scheme], program, network, factors, grid)
    pins = {**pins, **(more or {})}
    plan = search_plan(program, network, factors, grid, bandwidth_bound(), pins).plan
    found = []
    for move in plan.moves:
        size = sympy.prod(SYMBOLS[k] for k in network.values[move.value].shape)
        for axis, kind in zip(grid.names, move.before, strict=True):
            size /= ranks[axis] if axis != move.axis and str(kind).startswith("S") else 1
        kinds = [move.forward] * (1 + move.again) + [move.backward]
        found += [(kind, size, ranks[move.axis]) for kind in kinds]
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
    ("fsdp_again", (1, 4), (1, p), cf.fully_sharded(g=3)),
    ("fsdp_again", (2, 2), (r, c), cf.fully_sharded(r * c, g=3)),
    ("data_parallel", (1, 4), (1, p), cf.batch_tensor(a=p, n=1)),
    ("ring_attention", (1, 4), (1, p), cf.batch_tensor(a=p, n=1)),  # beside the ring
]


@pytest.mark.parametrize(("scheme", "sizes", "names", "formula"), FORMULAS)
def test_a_layer_sends_what_the_formula_says(scheme, sizes, names, formula):
    grid = as_grid(sizes)
    ranks = dict(zip(grid.names, names, strict=True))
    layer = volume(3, scheme, grid, ranks) - volume(2, scheme, grid, ranks)
    assert sympy.simplify(layer - formula) == 0


AGAIN = {"*": {"backward": "again"}}


@pytest.mark.parametrize(
    ("scheme", "formula"),
    [
        ("summa", cf.summa_ab(g=3)),
        # the gradient of what fc2 scatters is gathered once, for both of its operands
        ("summa_abt", cf.summa_abt(g=3) - (q - 1) / q**2 * b * s * h),
    ],
)
def test_summa_sends_what_the_formula_says_where_backward_gathers_again(scheme, formula):
    grid, ranks = as_grid((2, 2)), {"row": q, "col": q}
    layer = volume(3, scheme, grid, ranks, AGAIN) - volume(2, scheme, grid, ranks, AGAIN)
    assert sympy.simplify(sympy.nsimplify(layer, tolerance=1e-9) - formula) == 0


def test_a_ring_sends_what_its_formula_says():
    grid, (program, network, factors) = as_grid((1, 4)), described(2)
    pins = schemes.pins_of(schemes.SCHEMES["ring_attention"], program, network, factors, grid)
    plan = search_plan(program, network, factors, grid, bandwidth_bound(), pins).plan
    ring = [n for name, _, kind, n in plan.internal if kind == "permute" and ".0" in name]
    elements = cf.ring_attention().subs({p: 4, b: B, s: S, h: H})
    assert sum(ring) == 4 * elements > 0


def test_every_scheme_has_a_formula():
    assert {scheme for scheme, *_ in FORMULAS} == set(schemes.SCHEMES)
