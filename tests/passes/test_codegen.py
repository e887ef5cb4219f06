"""What the emitted programs look like."""

import operator

import pytest
import torch
from torch import nn

from autotp.axis import run_ranks
from autotp.cost_model.cluster import gloo_loopback
from autotp.errors import LayoutError
from autotp.grid import as_grid
from autotp.passes.capture.model import capture
from autotp.passes.emit.codegen import emit, program_nodes
from autotp.passes.emit.verify import verify
from autotp.passes.factors import infer_factors
from autotp.passes.network import read_network
from autotp.passes.planning import search_plan


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x))).square().sum()


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        y = self.fc(x + torch.rand_like(x))
        y = y + torch.bernoulli(y.detach().sigmoid()) + torch.randn(8)
        return self.drop(y).sum()


class Qkv(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        heads = [t.unflatten(-1, (4, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]
        y = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2)).square().sum()


def planned(model, x, grid, pins=None):
    program = capture(model, (x,), {}, train=True)
    network = read_network(program)
    factors = infer_factors(network, program.inputs)
    plan = search_plan(program, network, factors, as_grid(grid), gloo_loopback(), pins).plan
    return program, network, factors, plan


def emitted(program, network, plan):
    def one(rank, axes):
        return emit(program, network, plan, plan.grid.coords(rank), axes)

    return run_ranks(plan.grid, one)


COLUMN_ROW = {
    "fc1": {"col": "o"},
    "fc2": {"col": "i"},
    "fc1.weight": {"col": "S(0)"},
    "fc2.weight": {"col": "S(1)"},
}


def called(module):
    return [n.target.__name__.removesuffix(".default") for n in program_nodes(module)]


def test_column_and_row_parallel_need_one_collective_each_way():
    program, network, _, plan = planned(Mlp(), torch.randn(4, 8), (1, 2), COLUMN_ROW)
    assert plan["fc1"].factors == {"col": "o"} and plan["fc2"].factors == {"col": "i"}
    assert plan.collectives() == ["all_reduce"]
    module = emitted(program, network, plan)[0]
    assert called(module).count("all_reduce") == 1


def test_fused_projection_splits_by_heads_inside_each_block():
    pins = {
        "qkv": {"col": "o"},
        "out": {"col": "i"},
        "qkv.weight": {"col": "S(0)"},
        "out.weight": {"col": "S(1)"},
    }
    program, network, factors, plan = planned(Qkv(), torch.randn(2, 6, 8), (1, 2), pins)
    assert str(plan.params["qkv.weight"].layout[1]) == "S(0:3*8)"
    assert plan.collectives() == ["all_reduce"]
    for module in emitted(program, network, plan):
        verify(module, network, factors, plan.grid)
        shapes = [n.args[1] for n in program_nodes(module) if "reshape" in str(n.target)]
        assert all(8 not in shape[1:-1] for shape in shapes)


def test_uneven_chunks_give_each_rank_its_own_sizes():
    model = nn.Sequential(nn.Linear(8, 7), nn.Unflatten(1, (7, 1)), nn.Flatten(), nn.Linear(7, 8))
    pins = {"0": {"col": "o"}, "3": {"col": "i"}}
    program, network, _, plan = planned(model, torch.randn(4, 8), (1, 2), pins)
    sizes = [
        [n.args[1] for n in program_nodes(module) if "reshape" in str(n.target)]
        for module in emitted(program, network, plan)
    ]
    assert sizes == [[[4, 4, 1], [4, 4]], [[4, 3, 1], [4, 3]]]


def test_every_random_op_draws_the_same_on_every_rank():
    model = Noisy()
    program, network, _, plan = planned(model, torch.randn(4, 8), (2, 2))

    def run(rank, axes):
        module = emit(program, network, plan, plan.grid.coords(rank), axes)
        module.meta["rng"].step_seed = 3
        return module(torch.ones(8, 8), torch.ones(8), torch.ones(4, 8))[0].item()

    assert len(set(run_ranks(plan.grid, run))) == 1


def test_a_grid_of_one_emits_no_move():
    program, network, _, plan = planned(Mlp(), torch.randn(4, 8), (1, 1))
    module = emitted(program, network, plan)[0]
    assert plan.moves == () and not [n for n in program_nodes(module) if "move" in n.meta]


def test_a_damaged_program_does_not_pass_the_type_check():
    program, network, factors, plan = planned(Mlp(), torch.randn(4, 8), (1, 2), COLUMN_ROW)
    module = emitted(program, network, plan)[0]
    (reduce,) = [n for n in program_nodes(module) if n.target.__name__ == "all_reduce"]
    reduce.replace_all_uses_with(reduce.args[0])
    for user in list(reduce.args[0].users):
        if "operands" in user.meta:
            user.meta["operands"] = tuple(
                reduce.args[0] if n is reduce else n for n in user.meta["operands"]
            )
    with pytest.raises(LayoutError, match="has no rule"):
        verify(module, network, factors, plan.grid)


def test_results_of_an_op_with_several_are_read_by_getitem():
    program, network, _, plan = planned(Qkv(), torch.randn(2, 6, 8), (2, 1))
    module = emitted(program, network, plan)[0]
    assert sum(n.target is operator.getitem for n in module.graph.nodes) == 3
