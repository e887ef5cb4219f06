"""What local programs send, on real ranks: rows to their experts, blocks round a ring."""

import pytest
import torch

import autotp
from tests.end_to_end.on_ranks import on_ranks
from tests.models import MODELS
from tests.zoo import experts

EXPERTS = {"model.layers.*.mlp.experts.grouped_mm*": {"col": "t+e"}}


def losses(model, inputs):
    """Return the losses of two steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = []
    for _ in range(2):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


def check_training(build, grid, pins_of):
    torch.manual_seed(0)
    model, inputs = build()
    torch.manual_seed(0)
    alone, _ = build()
    pins = pins_of(model, grid, inputs)
    split = autotp.parallelize(model.train(), grid, inputs, cluster="gloo_loopback", pins=pins)
    assert losses(split, inputs) == pytest.approx(losses(alone.train(), inputs), rel=1e-5)


@on_ranks((1, 2))
def test_experts_train_on_their_ranks(grid):
    check_training(experts.MODELS["mixtral"], grid, lambda *_: EXPERTS)


@on_ranks((1, 2))
def test_a_ring_trains_a_split_sequence(grid):
    check_training(MODELS["llama"], grid, autotp.schemes.ring_attention)
