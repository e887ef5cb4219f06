"""The user's own training loop, on real ranks: losses, gradients and weights of one device.

AdamW's eps is 1e-3: a key's bias has a true gradient of zero, whose rounding Adam would amplify.
"""

import copy

import torch
from torch.nn.utils import clip_grad_norm_

import autotp
from autotp.layouts import Shard
from tests.end_to_end.models import CLUSTER, assert_near, gpt2, gradients, llama, tokens, whole
from tests.end_to_end.on_ranks import on_ranks

GRIDS = (1, 1), (1, 2), (2, 1), (1, 4), (4, 1), (2, 2)
STEPS = 3


def train(model, inputs):
    """Return the loss, the norm and the gradients of every step, by name."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    seen = {}
    for step in range(STEPS):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        seen |= {f"{name} {step}": g for name, g in gradients(model).items()}
        norm = clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        seen |= {f"loss {step}": loss.detach(), f"norm {step}": whole(norm)}
    return seen


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
