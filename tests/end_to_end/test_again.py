"""Programs that make tensors again in backward train what one device trains, and hold less."""

import copy
import functools
import random

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autotp
from autotp.check import compare, prepare, take_step
from autotp.grid import as_grid
from autotp.passes.emit.again import runnable
from autotp.passes.planning import search_plan
from tests.end_to_end.models import (
    CLUSTER,
    assert_near,
    gpt2,
    gradients,
    llama,
    loss_of,
    tokens,
    whole,
)
from tests.end_to_end.on_ranks import on_ranks
from tests.random_plans import Plans

EVERYTHING = {"*": {"backward": "again"}}
MODELS = {"gpt2": functools.partial(gpt2, dropout=0.2), "llama": llama}


@functools.cache
def subject_of(name):
    torch.manual_seed(0)
    return prepare(MODELS[name]().train(), (), tokens(), "exact")


@functools.cache
def still(name):
    """Return a model without draws: a step of it sends and holds what any does."""
    torch.manual_seed(0)
    return prepare({"gpt2": gpt2, "llama": llama}[name]().train(), (), tokens(), "fast")


def some_again(subject, seed):
    """Return pins that make a random half of what can be made again, patterns skip what cannot."""
    rng = random.Random(seed)
    names = [subject.program.names[op.name] for op in subject.network.ops]
    names += subject.program.params.values()
    return {f"{name[:-1]}?": "again" for name in names if rng.random() < 0.5}


@pytest.mark.parametrize("sizes", [(2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_random_layouts_and_random_again_compute_what_the_model_computes(name, sizes):
    subject = subject_of(name)
    plan = Plans(subject, as_grid(sizes)).random(sum(sizes), some_again(subject, 1))
    assert any(d.again for d in plan) or any(m.again for m in plan.moves)
    report = compare(subject, plan)
    assert report.ok, report


def test_a_weight_whose_gather_begins_after_its_activations_came_is_read_after_it():
    subject = subject_of("llama")
    plan = Plans(subject, as_grid((2, 2))).random(7, some_again(subject, 7))
    report = compare(subject, plan)
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sizes", [(2, 2), (1, 4), (3, 1)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_many_random_sets(name, sizes, seed):
    subject = subject_of(name)
    plan = Plans(subject, as_grid(sizes)).random(seed, some_again(subject, seed))
    report = compare(subject, plan)
    assert report.ok, report


class Live(TorchDispatchMode):
    """Notes the memory of every tensor that is made: what is still there can be asked."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            ref = StorageWeakRef(t.untyped_storage())
            self.made[ref.cdata] = (ref, t.untyped_storage().nbytes())
        return out

    def nbytes(self):
        return sum(n for ref, n in self.made.values() if not ref.expired())


def run(subject, plan, as_planned=True):
    """Return a step of all ranks, and what each holds when its forward ends."""
    held = {}

    def execute(rank, module, values):
        with Live() as live:
            ready = runnable(module, subject.network) if as_planned else module
            outputs = ready(*values)
            held[rank] = live.nbytes()
        return outputs

    return take_step(subject, plan, execute), held


@pytest.mark.parametrize("name", MODELS)
def test_what_is_made_again_is_not_held_and_is_sent_as_planned(name):
    subject = still(name)
    found = subject.program, subject.network, subject.factors
    plan = search_plan(*found, as_grid((2, 2)), CLUSTER, EVERYTHING).plan
    again, held = run(subject, plan)
    kept, all_held = run(subject, plan, as_planned=False)
    for grad, other in zip(again.gradients.values(), kept.gradients.values(), strict=True):
        assert torch.equal(grad, other)
    assert again.ranks[0].sent == {k: n for k, n in plan.sent().items() if n}
    free = search_plan(*found, as_grid((2, 2)), CLUSTER).plan
    fewer = free.memory.activations - plan.memory.activations
    assert fewer > 0.1 * free.memory.activations
    for rank, least in held.items():
        assert all_held[rank] - least >= 0.8 * fewer


# Real ranks --------------------------------------------------------------------------------------


@on_ranks((2, 2))
def test_a_model_that_backward_makes_again_trains_as_on_one_device(grid):
    model, inputs = gpt2(dropout=0.2).train(), tokens()
    one = copy.deepcopy(model)
    ours = autotp.parallelize(model, grid, inputs, cluster=CLUSTER, rng="exact", pins=EVERYTHING)
    assert any(d.again for d in ours.plan) and "recalled(" in ours.graph_module.code
    found = []
    for net in (one, ours):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, eps=1e-3)
        torch.manual_seed(3)
        loss = loss_of(net(**inputs))
        loss.backward()
        optimizer.step()
        stepped = {f"{n} after a step": whole(p).detach() for n, p in net.named_parameters()}
        found.append({"loss": loss.detach(), **gradients(net), **stepped})
    assert_near(found[1], found[0], bound=1e-4)


@on_ranks((1, 2))
def test_under_torch_compile_such_a_program_runs_in_eager_and_says_so(grid):
    model, inputs = gpt2().train(), tokens()
    ours = autotp.parallelize(model, grid, inputs, cluster=CLUSTER, pins=EVERYTHING)
    loss_of(ours(**inputs)).backward()
    expected = gradients(ours)
    ours.zero_grad()
    compiled = torch.compile(ours, backend="eager")
    for axis in ours._autotp.axes.values():
        axis.reset_sent()
    with pytest.warns(UserWarning, match="runs in eager"):
        loss_of(compiled(**inputs)).backward()
    assert_near(gradients(ours), expected)
    sent = sum(sum(axis.sent.values()) for axis in ours._autotp.axes.values())
    assert sent == ours.plan.comm_bytes
