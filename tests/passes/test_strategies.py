"""The tables of the search: shared between layers, priced once, narrowed by pins, charged once."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from autotp.cost_model.cluster import gloo_loopback
from autotp.errors import BudgetError, PinError
from autotp.grid import as_grid
from autotp.layouts import I, P, R, Shard
from autotp.passes.capture.model import capture
from autotp.passes.factors import infer_factors
from autotp.passes.moves import Moves
from autotp.passes.network import read_network
from autotp.passes.pins import irreducible
from autotp.passes.planning import search_plan
from autotp.passes.pricing import RESULT, saved_positions, typing_of
from autotp.passes.strategies import Limits, build_model


class Mlp(nn.Module):
    def __init__(self, layers=2, width=16):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.fc1 = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.fc2 = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))

    def forward(self, x):
        for norm, fc1, fc2 in zip(self.norms, self.fc1, self.fc2, strict=True):
            x = x + fc2(torch.relu(fc1(norm(x))))
        return x.square().mean()


class Subject:
    """A captured model; `model` makes its search problem and `plan` its plan."""

    def __init__(self, module, *inputs, grid=(2, 2)):
        self.module, self.grid = module, as_grid(grid)
        self.program = capture(module, inputs, {}, train=True)
        self.network = read_network(self.program)
        self.factors = infer_factors(self.network, self.program.inputs)

    def model(self, **limits):
        known = (self.network, self.factors, self.grid, gloo_loopback(), self.program.params)
        return build_model(*known, Limits(**limits))

    def plan(self, pins=None, memory_bytes=math.inf):
        cluster = dataclasses.replace(gloo_loopback(), memory_bytes=memory_bytes)
        known = (self.program, self.network, self.factors, self.grid, cluster)
        return search_plan(*known, pins)


@pytest.fixture(scope="module")
def mlp():
    return Subject(Mlp(), torch.randn(8, 16))


def test_equal_layers_share_every_table(mlp):
    one, many = mlp.model(), Subject(Mlp(6), torch.randn(8, 16)).model()

    def arrays(m):
        return {id(t) for t in (*m.problem.unary, *(t for _, _, t in m.problem.pairs))}

    assert len(many.variables) > 2 * len(one.variables)
    assert len(arrays(many)) <= len(arrays(one)) + 4


def test_moves_are_the_cheapest_ways():
    moves = Moves(as_grid((2, 2)), gloo_loopback())
    types = ((I, R, P, Shard(0), Shard(1)),) * 2
    table = moves.table((8, 6), torch.float32, True, types)
    s, n = table.seconds, len(table.layouts)
    assert np.isfinite(s).all() and (np.diag(s) == 0).all()
    assert (s[:, None, :] <= (s[:, :, None] + s[None, :, :]) * (1 + 1e-9)).all()
    for a in range(n):
        for b in range(n):
            steps = moves.path(table, table.layouts[a], table.layouts[b], (8, 6), torch.float32)
            kinds = [(k, t) for t in steps for k in (t.forward, t.backward)]
            spent = sum(moves.kind_s(k, t.size_bytes, t.axis) for k, t in kinds)
            assert spent == pytest.approx(s[a, b], rel=1e-9, abs=1e-15)


def test_limits_keep_what_they_allow(mlp):
    def first_only(_subject, choices):
        return [0]

    model = mlp.model(op=first_only, rest=first_only)
    assert all(len(v.table.seconds) == 1 for v in model.variables if v.kind != "copy")


def test_a_fixed_resting_layout_is_the_only_one(mlp):
    name = next(n for n, fqn in mlp.program.params.items() if fqn == "fc1.0.weight")
    rest = {v.name: v for v in mlp.model(fixed={name: (I, Shard(0))}).variables if v.kind == "rest"}
    assert list(rest[name].table.results[0]) == [(I, Shard(0))]


class Shared(nn.Module):
    """One value that three products keep, and a sum that keeps nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.pre = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        y = self.pre(x)
        return (self.a(y) + self.b(y) + self.c(y)).sum()


def test_what_three_ops_keep_is_counted_once():
    subject = Subject(Shared(), torch.randn(8, 16), grid=(1, 1))
    planned = subject.plan()
    x = y = 8 * 16 * 4
    assert planned.plan.memory.activations == x + y
    charged = [v for v in planned.model.variables if v.kind == "copy" and v.table.memory.any()]
    assert [list(v.table.memory) for v in charged] == [[y] * len(charged[0].table.memory)]


def test_saved_activations_are_those_of_autograd():
    module, x = Mlp(3).train(), torch.randn(8, 16)
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    for p in module.parameters():
        held.pop(p.untyped_storage().data_ptr(), None)
    counted = Subject(module, x, grid=(1, 1)).plan().plan.memory.activations
    assert counted == pytest.approx(sum(size for size, _ in held.values()), rel=0.1)


def test_a_product_with_a_number_keeps_nothing():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return (2 * self.w * x).exp().sum()

    network = Subject(Scaled(), torch.randn(4)).network
    kept = {op.call.op.name(): [] for op in network.ops}
    for op in network.ops:
        kept[op.call.op.name()].append(saved_positions(op, typing_of(network, op)))
    assert kept["aten::mul.Tensor"] == [[], [1]]  # 2 w keeps nothing; (2 w) x keeps x alone
    assert kept["aten::exp"] == [[RESULT]]


def test_the_plan_fits_the_budget_by_its_own_count(mlp):
    free = mlp.plan().plan
    least = mlp.plan(memory_bytes=0.7 * free.memory.total).plan
    assert least.memory.total <= 0.7 * free.memory.total
    assert least.step_time_s >= free.step_time_s
    with pytest.raises(BudgetError):
        mlp.plan(memory_bytes=10)


def test_search_time_is_the_solver_alone(mlp):
    planned = mlp.plan()
    assert planned.plan.search_s == planned.solution.seconds > 0


def refused(mlp, pins):
    with pytest.raises(PinError) as error:
        mlp.plan(pins)
    return error.value


def test_contradicting_pins_are_named_and_no_others(mlp):
    pins = {
        "norms.?": {"row": "I"},
        "fc1.?": {"col": "o"},
        "fc1.0": {"col": "i"},
        "fc2.?": {"col": "i"},
    }
    assert {at for at, _ in refused(mlp, pins).at} == {"fc1.?", "fc1.0"}
    assert mlp.plan({k: v for k, v in pins.items() if k != "fc1.0"}).plan["fc1.1"].choices[1] == "o"


def test_contradicting_pins_on_a_parameter(mlp):
    error = refused(mlp, {"fc2.1.weight": {"col": "S(0)"}, "fc2.*.weight": {"col": "I"}})
    assert error.at == (
        ("fc2.1.weight", "'S(0)' on axis 'col'"),
        ("fc2.*.weight", "'I' on axis 'col'"),
    )


def test_a_pin_that_nothing_fits_is_told_what_is_legal(mlp):
    ((name, fact),) = refused(mlp, {"fc1.0": {"col": "nonsense"}}).at
    assert name == "fc1.0" and "legal are I, R" in fact


def test_irreducible_leaves_only_pins_that_are_needed():
    pins = {"a": {"row": "1", "col": "2"}, "b": {"row": "3"}, "c": {"row": "4"}}

    def is_possible(p):
        return not ("2" in p.get("a", {}).values() and "c" in p)

    assert [(p.pattern, p.wanted) for p in irreducible(pins, is_possible)] == [
        ("a", "2"),
        ("c", "4"),
    ]


class Spare(Mlp):
    """Has a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.pooler = nn.Linear(16, 16)


def test_parameters_that_nothing_reads_rest_in_shards():
    plan = Subject(Spare(), torch.randn(8, 16)).plan()
    assert all(isinstance(t, Shard) for t in plan.plan.params["pooler.weight"].layout)
