"""Every rule that draws: what ranks draw apart has the structure of what one device draws."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from autotp.grid import as_grid
from autotp.passes.capture.model import capture
from autotp.passes.factors import infer_factors
from autotp.passes.network import read_network
from autotp.passes.rules import find, rows
from autotp.simulate import run_grid
from tests.random_plans import random_plan
from tests.rules.draws import CALLS, assert_drawn_like_one

aten = torch.ops.aten


@pytest.mark.parametrize(("op", "args", "kwargs"), CALLS, ids=[str(op) for op, *_ in CALLS])
def test_ranks_draw_together_what_one_device_could(op, args, kwargs):
    assert_drawn_like_one(op, args, kwargs)


def test_every_row_that_draws_has_a_call():
    assert {rule.op for rule in rows() if rule.random} == {op for op, *_ in CALLS}


def test_a_channel_that_is_dropped_in_part_is_noticed():
    op = aten.feature_dropout.default
    ((_, args, kwargs),) = [call for call in CALLS if call[0] is op]
    with pytest.raises(AssertionError):
        assert_drawn_like_one(op, args, kwargs, replace(find(op), sentence="n c x -> n c x"))


class Twice(torch.nn.Module):
    """Each op that draws by another program, at two sites."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, 4, 8, 8))

    def forward(self):
        w = self.weight
        attend = lambda: F.scaled_dot_product_attention(w, w, w, None, 0.5)  # noqa: E731
        draws = (lambda: F.dropout(w), lambda: F.alpha_dropout(w, training=True), attend)
        return tuple(draw() for draw in draws for _ in range(2))


@pytest.mark.parametrize("rng", ["fast", "exact"])
def test_sites_of_a_program_draw_apart_and_every_step_anew(rng):
    program = capture(Twice(), (), {}, train=True)
    network = read_network(program)
    subject = SimpleNamespace(program=program, network=network, factors=infer_factors(network))
    plan = random_plan(subject, as_grid((1,)), 0)  # all on one rank: the sites alone differ
    state = {"weight": torch.ones(1, 4, 8, 8)}
    steps = [run_grid(program, network, plan, state, (), seed, rng=rng) for seed in (1, 2, 1)]
    first, second, again = (step.ranks[0].outputs for step in steps)
    assert all(map(torch.equal, first, again))
    for site in (0, 2, 4):
        drawn = (*first[site : site + 2], *second[site : site + 2])
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
