"""What a plan says: golden text, exact formulas, layers folded, choices explained."""

import re
from dataclasses import replace
from fractions import Fraction

import pytest
import sympy
import torch
from torch import nn

import autotp
from autotp.cost_model.closed_forms import megatron_1d
from autotp.cost_model.cluster import bandwidth_bound
from autotp.errors import PlanError
from autotp.formula import layer_formula, repeated_layer
from autotp.plan import Plan
from autotp.repeats import place_moves, sections

CLUSTER = bandwidth_bound(1e9, flops_per_s=1e12)
MEGATRON = {
    "*.q": {"col": "o"},
    "*.fc1": {"col": "o"},
    "*.out": {"col": "i"},
    "*.fc2": {"col": "i"},
}


class MLP(nn.Module):
    def __init__(self, h=64):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Block(nn.Module):
    """Two branches on a residual stream, as in a transformer."""

    def __init__(self, h):
        super().__init__()
        self.ln_1, self.q, self.out = nn.LayerNorm(h), nn.Linear(h, h), nn.Linear(h, h)
        self.ln_2, self.mlp = nn.LayerNorm(h), MLP(h)

    def forward(self, x):
        x = x + self.out(torch.tanh(self.q(self.ln_1(x))))
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    def __init__(self, layers=3, h=64):
        super().__init__()
        self.emb = nn.Embedding(128, h)
        self.h = nn.ModuleList(Block(h) for _ in range(layers))
        self.ln_f = nn.LayerNorm(h)

    def forward(self, tokens):
        x = self.emb(tokens)
        for block in self.h:
            x = block(x)
        return self.ln_f(x).square().mean()


def plan_mlp():
    pins = {"fc1": {"col": "o"}, "fc2": {"col": "i"}}
    return autotp.plan(MLP(), (1, 4), (torch.randn(8, 16, 64),), cluster=CLUSTER, pins=pins)


def plan_stack(grid=(1, 4), pins=MEGATRON, cluster=CLUSTER, layers=3):
    tokens = torch.randint(128, (8, 16))
    return autotp.plan(Stack(layers), grid, (tokens,), cluster=cluster, pins=pins)


def bytes_of_layer(plan):
    """The bytes of the first layer's moves and local programs, counted; all, if none repeats."""
    layer = repeated_layer(plan)
    if layer is None:
        return plan.comm_bytes
    names = {d.name for d in layer.ops}
    moves = [m for name, placed in place_moves(plan).items() if name in names for m in placed]
    internal = [row[3] for row in plan.internal if row[0] in names]
    return sum((size for m in moves for _, size in m.sent), Fraction(0)) + sum(internal)


GOLDEN = """\
plan of one training step on grid 1x4 (row 1, col 4) of bandwidth_bound

  fc1:   f32[8,16,256/col]    = linear(x, weight, bias)     # o/col  2.1 us   b s o/col
  relu:  f32[8,16,256/col]    = relu(fc1)                   # o/col  0 s      b s o/col
  fc2:   f32[8,16,64]{P:col}  = linear(relu, weight, bias)  # i/col  3.15 us  b s o
  fc2:   f32[8,16,64]         = all_reduce(fc2, "col")      # P->I   49.2 us  49.2 kB sent

parameters at rest, bytes per rank
  fc1.weight:  f32[256/col,64]  16.4 kB
  fc1.bias:    f32[256/col]     256 B
  fc2.weight:  f32[64,256/col]  16.4 kB
  fc2.bias:    f32[64]          256 B

one step, per rank
  time     54.4 us predicted, 54.4 us at least (optimal), found by elimination
  sent     49.2 kB: all_reduce col 49.2 kB
  memory   199 kB: parameters 33.3 kB, gradients 33.3 kB, optimizer 66.6 kB, activations 65.5 kB
  split    100.0% of the products' flops, 99.8% of the parameters
"""


def test_golden_text_of_an_mlp():
    assert str(replace(plan_mlp(), search_s=0.0)) == GOLDEN.rstrip("\n")


def test_text_is_the_same_for_equal_plans():
    one, two = (replace(plan_stack(), search_s=0.0) for _ in range(2))
    assert str(one) == str(two)


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_layers_that_are_alike_are_printed_once(layers):
    text = str(plan_stack(layers=layers))
    assert f"h.{{0..{layers - 1}}}   x {layers}," in text
    assert len(re.findall(r"^  mlp\.fc1: ", text, flags=re.M)) == 1
    assert f"h.{{0..{layers - 1}}}.mlp.fc1.weight:" in text and "h.1." not in text.split("ln_f")[0]


def test_every_op_is_in_one_section():
    plan = plan_stack()
    found = [d for s in sections(plan, place_moves(plan)) for layer in s.layers for d in layer]
    assert found == list(plan.decisions)


def test_every_move_is_placed_once():
    plan = plan_stack(grid=(2, 2), pins=None, cluster="gloo_loopback")
    placed = [m for moves in place_moves(plan).values() for m in moves]
    assert sorted(map(repr, placed)) == sorted(map(repr, plan.moves))


def test_a_layer_that_chooses_otherwise_is_not_folded():
    text = str(plan_stack(pins={**MEGATRON, "h.1.ln_1": {"col": "R"}}))
    assert "h.{" not in text


# Formulas ----------------------------------------------------------------------------------------


def test_megatron_sends_its_closed_form():
    assert sympy.simplify(plan_stack().formula() - megatron_1d()) == 0


@pytest.mark.parametrize(
    "grid, pins, cluster",
    [
        ((1, 4), MEGATRON, CLUSTER),
        ((2, 2), MEGATRON, CLUSTER),
        ((2, 2), None, "gloo_loopback"),
        ((4, 2), None, CLUSTER),
        ((2, 2), {"*.ln_?": {"row": "d"}, "*.fc1": {"row": "i", "col": "o"}}, CLUSTER),
        ((1, 3), {"*.fc1": {"col": "o"}, "*.fc2": {"col": "i"}}, CLUSTER),
    ],
)
def test_formulas_give_the_bytes_exactly(grid, pins, cluster):
    plan = plan_stack(grid, pins, cluster)
    sizes = plan.formula_sizes()
    assert plan.formula("bytes").subs(sizes) == bytes_of_layer(plan)
    assert plan.formula_total("bytes").subs(sizes) == plan.comm_bytes


def test_a_formula_of_a_loaded_plan_is_the_same(tmp_path):
    plan = plan_stack()
    plan.save(tmp_path / "plan.json")
    assert layer_formula(Plan.load(tmp_path / "plan.json")) == plan.formula()


def test_formula_refuses_other_units():
    with pytest.raises(PlanError, match="elements"):
        plan_mlp().formula("GB")


# Explanations ------------------------------------------------------------------------------------


def test_explain_sets_a_choice_against_worse_ones():
    plan = plan_stack(pins=None, cluster="gloo_loopback")
    found = plan.explain("h.1.mlp.fc1")
    times = [a.step_time_s for a in (found.chosen, *found.runners_up)]
    assert found.chosen.step_time_s == plan.step_time_s and len(found.runners_up) == 3
    assert times == sorted(times)
    assert len({a.choice for a in (found.chosen, *found.runners_up)}) == 4


def test_a_runner_up_is_what_pinning_it_gives():
    plan = plan_stack(pins=None, cluster="gloo_loopback")
    other = plan.explain("h.1.mlp.fc1").runners_up[0]
    choice = other.choice.partition("/")[0]
    pinned = plan_stack(pins={"h.1.mlp.fc1": {"col": choice}}, cluster="gloo_loopback")
    assert pinned.step_time_s == pytest.approx(other.step_time_s)


def test_explain_names_the_nearest_op():
    with pytest.raises(PlanError, match="fc1"):
        plan_mlp().explain("fc3")


def test_a_loaded_plan_says_how_to_explain(tmp_path):
    plan_mlp().save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="plan the model again"):
        Plan.load(tmp_path / "plan.json").explain("fc1")
