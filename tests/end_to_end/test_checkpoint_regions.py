"""Regions under torch.utils.checkpoint: recomputed on every rank, and priced as that."""

import copy
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import autotp
from autotp.check import compare, prepare, take_step
from autotp.cost_model.cluster import bandwidth_bound
from autotp.errors import CaptureError
from autotp.grid import as_grid
from autotp.passes.capture.model import capture
from autotp.passes.capture.regions import fold_regions
from autotp.passes.planning import search_plan
from tests.end_to_end.models import CLUSTER, assert_near, gpt2, gradients, loss_of, tokens
from tests.end_to_end.on_ranks import on_ranks
from tests.random_plans import random_plan

WIDTH, DEPTH = 8, 3
CHIPS = bandwidth_bound(1e9, flops_per_s=1e9)


class Blocks(nn.Module):
    """Residual blocks with dropout, each under a checkpoint if `call` is one."""

    def __init__(self, call):
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.call = call

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(x).pow(2).mean()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.25)


CALLS = {
    "plain": lambda block, x: block(x),
    "kept": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
}


def subject_of(call, rng="exact"):
    torch.manual_seed(0)
    model = Blocks(CALLS[call]).double().train()
    return prepare(model, (torch.randn(4, 6, WIDTH, dtype=torch.float64),), {}, rng)


@pytest.mark.parametrize("call", ("kept", "reentrant"))
def test_regions_compute_what_the_model_computes_under_random_plans(call):
    subject = subject_of(call)
    assert set(subject.program.regions.values()) == {f"blocks.{n}" for n in range(DEPTH)}
    for seed, sizes in enumerate(((2, 2), (1, 3))):
        report = compare(subject, random_plan(subject, as_grid(sizes), seed))
        assert report.ok, report


def test_a_region_has_sizes_that_vary():
    torch.manual_seed(0)

    def call(block, x):
        return checkpoint(lambda x: block(x).flatten(0, 1), x, use_reentrant=False).view(x.shape)

    report = autotp.check(
        Blocks(call).eval(), (1, 2), (torch.randn(4, 6, WIDTH),), dynamic={"x": {0: "batch"}}
    )
    assert report.ok, report


def saved_bytes(execute):
    """Return a way to execute a program that counts, by rank, what autograd keeps."""
    counts = Counter()

    def counting(rank, module, values):
        def pack(t):
            counts[rank] += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return execute(module, values)

    return counting, counts


def folded(module, values):
    return fold_regions(module)(*values)


@pytest.mark.parametrize("rng", ("fast", "exact"))
def test_a_region_keeps_less_draws_the_same_and_its_moves_are_sent_again(rng):
    subject = replace(subject_of("kept"), rng=rng)
    plan = random_plan(subject, as_grid((2, 2)), 3)
    runs, kept = {}, {}
    for name, execute in (("folded", folded), ("flat", lambda m, values: m(*values))):
        counting, kept[name] = saved_bytes(execute)
        runs[name] = take_step(subject, plan, counting)
    assert 3 * kept["folded"][0] < kept["flat"][0]
    for name, grad in runs["flat"].gradients.items():
        assert torch.equal(grad, runs["folded"].gradients[name]), name
    sent = runs["folded"].ranks[0].sent
    assert sent == {k: n for k, n in plan.sent().items() if n}
    assert sum(sent.values()) > sum(runs["flat"].ranks[0].sent.values())


def test_a_plan_of_regions_keeps_less_and_takes_longer():
    plans = {}
    for call in ("plain", "kept"):
        s = subject_of(call)
        plans[call] = search_plan(s.program, s.network, s.factors, as_grid((1, 2)), CHIPS).plan
    assert plans["kept"].memory.activations < 0.7 * plans["plain"].memory.activations
    assert plans["kept"].step_time_s > plans["plain"].step_time_s


def test_a_plan_shows_what_is_computed_again_and_keeps_it(tmp_path):
    texts = {}
    for call in ("plain", "kept"):
        s = subject_of(call)
        plan = search_plan(s.program, s.network, s.factors, as_grid((1, 2)), CHIPS).plan
        plan.save(tmp_path / call)
        loaded = autotp.plan_file.load(tmp_path / call)
        assert loaded == plan and {d.region for d in loaded} == {d.region for d in plan}
        texts[call] = str(loaded)
    again = [line for line in texts["kept"].splitlines() if "again in backward" in line]
    *lines, total = again
    ops = [line for line in lines if "->" not in line]  # what enters a block moves again in it
    assert "again" not in texts["plain"]
    assert ops and not any(re.match(" *(stem|head)", line) for line in ops)
    assert any(re.match(" *norm:.*layer_norm", line) for line in ops)
    assert re.fullmatch(r"  again    blocks.*: computed again in backward \(checkpoint\)", total)


# Refused -----------------------------------------------------------------------------------------


def nested(block, x):
    return checkpoint(CALLS["kept"], block, x, use_reentrant=False)


def selective(block, x):
    contexts = partial(
        create_selective_checkpoint_contexts, lambda *a, **k: CheckpointPolicy.MUST_SAVE
    )
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def counting(block, x):
    if not hasattr(block, "calls"):
        block.register_buffer("calls", torch.zeros(()))

    def run(x):
        block.calls += 1
        return block(x)

    return checkpoint(run, x, use_reentrant=False)


def cut_off(block, x):
    return checkpoint(block, x.detach(), use_reentrant=True)


REFUSED = {
    "checkpoint within checkpoint": nested,
    "with a context_fn": selective,
    "writes blocks.0.calls": counting,
    "inputs without gradient": cut_off,
}


@pytest.mark.parametrize(("said", "call"), REFUSED.items())
def test_what_cannot_be_honoured_is_refused(said, call):
    model = Blocks(call)
    if call is counting:
        for block in model.blocks:
            block.register_buffer("calls", torch.zeros(()))
    with pytest.raises(CaptureError, match=said):
        capture(model, (torch.randn(4, 6, WIDTH),), {}, train=True)


# Real ranks --------------------------------------------------------------------------------------


@on_ranks((1, 2))
def test_a_transformer_with_gradient_checkpointing_is_what_one_device_trains(grid):
    model, inputs = gpt2(dropout=0.2).train(), tokens()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    one = copy.deepcopy(model)
    ours = autotp.parallelize(model, grid, inputs, cluster=CLUSTER, rng="exact")
    assert "checkpoint_transformer_h_1" in ours.graph_module.code
    found = []
    for net in (one, ours):
        torch.manual_seed(3)
        loss = loss_of(net(**inputs))
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(net)})
    assert_near(found[1], found[0], bound=1e-4)
