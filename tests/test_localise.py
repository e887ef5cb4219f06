"""A fault at any node of any program, forward or backward: the check names that node first."""

import functools
import operator
import random

import pytest
import torch

from autotp import simulate
from autotp.check import compare, prepare
from autotp.grid import as_grid
from tests.models import build
from tests.random_plans import random_plan

NAMES = ("mlp", "nanogpt", "gpt2", "bert eager", "llama", "encoder, batch first")
GRIDS = ((2,), (2, 2), (3,))


@functools.cache
def subject(name):
    model, inputs = build(name, double=True)
    return prepare(model.train(), (), inputs)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.5 + 0.1


def wrong_value(out):
    return out * 1.5 + 0.1 if isinstance(out, torch.Tensor) else type(out)(map(wrong_value, out))


def wrong_gradient(out):
    if isinstance(out, torch.Tensor):
        return WrongGradient.apply(out) if out.requires_grad else out
    return type(out)(map(wrong_gradient, out))


def damaged(target, fault):
    def wrong(*args, **kwargs):
        return fault(target(*args, **kwargs))

    return wrong


def places(module, fault):
    """Return the nodes whose result is a value of the program, with gradient where that is hit."""
    made = [n for n in module.graph.nodes if n.op == "call_function" and not is_item(n)]
    made = [n for n in made if "value" in n.meta or "results" in n.meta]
    return made if fault is wrong_value else [n for n in made if "op" in n.meta or "move" in n.meta]


def is_item(node):
    return node.target is operator.getitem


def plant(monkeypatch, seed, fault):
    """Damage one node on every rank; return, once it is, the nodes that may be named for it."""
    emit, named = simulate.emit, set()

    def emit_wrong(*args, **options):
        module = emit(*args, **options)
        node = random.Random(seed).choice(places(module, fault))
        named.update(to_blame(module, node, fault))
        node.target = damaged(node.target, fault)
        module.recompile()
        return module

    monkeypatch.setattr(simulate, "emit", emit_wrong)
    return named


def to_blame(module, node, fault):
    """Return the node and what is taken from it, or the makers of what it reads."""
    if fault is wrong_value:
        return {node.name, *(n.name for n in node.users if is_item(n))}
    read = {n.meta.get("value") for n in node.all_input_nodes} - {None}
    return {n.name for n in module.graph.nodes if n.meta.get("value") in read}


def localises(monkeypatch, seed, fault):
    """Return whether the fault showed; hold that it is named where it did."""
    tried = subject(NAMES[seed % len(NAMES)])
    plan = random_plan(tried, as_grid(random.Random(seed).choice(GRIDS)), seed)
    named = plant(monkeypatch, seed, fault)
    report = compare(tried, plan)
    if report.ok:
        return False
    if report.largest <= report.tolerance.value:  # no number moved: the type check alone sees it
        assert any(name in problem for problem in report.problems for name in named), report
        return False
    assert report.first is not None, report
    assert report.first.node in named, f"{sorted(named)}: {report.first}"
    assert report.first.what == ("value" if fault is wrong_value else "gradient")
    return True


@pytest.mark.parametrize("fault", (wrong_value, wrong_gradient))
def test_a_fault_is_named(monkeypatch, fault):
    shown = 0
    for seed in range(len(NAMES)):
        with monkeypatch.context() as patch:
            shown += localises(patch, seed, fault)
    assert shown >= len(NAMES) // 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", (wrong_value, wrong_gradient))
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_faults_are_named(monkeypatch, seed, fault):
    localises(monkeypatch, seed, fault)
