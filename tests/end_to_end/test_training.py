"""The user's own training loop, on real ranks: losses, gradients and weights of one device."""

import copy

import autotp
from autotp.layouts import Shard
from tests.end_to_end.models import CLUSTER, assert_near, gpt2, llama, tokens, train
from tests.end_to_end.on_ranks import on_ranks

GRIDS = (1, 1), (1, 2), (2, 1), (1, 4), (4, 1), (2, 2)


def trains_as_one_device(model, grid):
    inputs = tokens()
    one = copy.deepcopy(model)
    expected = train(one, inputs)
    autotp.parallelize(model, grid, inputs, cluster=CLUSTER)
    assert is_sharded(model.plan) == (grid != (1, 1))
    assert_near(train(model, inputs), expected)
    assert_near(autotp.full_state_dict(model), one.state_dict())


def is_sharded(plan):
    rests = any(isinstance(t, Shard) for r in plan.params.values() for t in r.layout)
    return rests and bool(plan.collectives())


@on_ranks(*GRIDS)
def test_gpt2_trains_as_on_one_device(grid):
    trains_as_one_device(gpt2().train(), grid)


@on_ranks(*GRIDS)
def test_llama_trains_as_on_one_device(grid):
    trains_as_one_device(llama().train(), grid)


@on_ranks((1, 1))
def test_one_rank_moves_nothing(grid):
    model = autotp.parallelize(gpt2(), grid, tokens())
    assert not model.plan.moves
    assert not [n for n in model.graph_module.graph.nodes if "move" in n.meta]
