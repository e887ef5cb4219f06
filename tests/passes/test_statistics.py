"""Running statistics of a split batch: those of the whole batch, equal on every rank."""

import pytest
import torch
from torch import nn

from autotp.check import compare, prepare
from autotp.grid import as_grid
from tests.random_plans import random_plan

NORMS = {
    "momentum": lambda: nn.BatchNorm2d(6),
    "cumulative": lambda: nn.BatchNorm2d(6, momentum=None),
    "bare": lambda: nn.BatchNorm2d(6, affine=False),
    "untracked": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "instances": lambda: nn.InstanceNorm2d(6, affine=True),
    "tracked instances": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
}


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("name", NORMS)
def test_statistics_are_those_of_the_whole_batch(name, train):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), NORMS[name](), nn.ReLU()).double().train(train)
    subject = prepare(model, (torch.randn(5, 3, 5, 4, dtype=torch.float64),), {})
    tracked = sum(n.split(".")[-1] != "num_batches_tracked" for n, _ in model.named_buffers())
    assert len([n for n in subject.program.mutations.values() if "running" in n]) == train * tracked
    for seed, grid in enumerate(((2,), (2, 2), (3,), (2, 3))):
        report = compare(subject, random_plan(subject, as_grid(grid), seed))
        assert report.ok, report


def test_a_frozen_norm_keeps_its_statistics():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).train()
    model[1].eval()
    subject = prepare(model, (torch.randn(4, 3, 5, 5),), {})
    assert not subject.program.mutations
