"""check_numerics=True: the first value that is not finite, its line, and the ranks that made it."""

import torch
from torch import nn

import autotp
from tests.end_to_end.models import CLUSTER, assert_near, gradients
from tests.end_to_end.on_ranks import on_ranks
from tests.faults.table import fault

PINS = {"fc1": {"col": "o"}, "fc2": {"col": "i"}}


class Logs(nn.Module):
    """Its hidden values are 1 in the first half, and `rest` in the second: that of rank 1."""

    def __init__(self, rest, function=torch.log):
        super().__init__()
        self.fc1, self.fc2, self.function = nn.Linear(8, 32), nn.Linear(32, 8), function
        nn.init.zeros_(self.fc1.weight)
        with torch.no_grad():
            self.fc1.bias.copy_(torch.tensor([1.0] * 16 + [rest] * 16))

    def forward(self, x):
        return self.fc2(self.function(self.fc1(x))).mean()


def parallel(model, grid):
    inputs = (torch.randn(4, 8),)
    made = autotp.parallelize(model, grid, inputs, cluster=CLUSTER, pins=PINS, check_numerics=True)
    return made(*inputs)


@on_ranks((1, 2))
@fault(
    "An infinite value in the part of one rank",
    """
    NumericsError: the first value that is not finite in forward is that of log
      at      your code   test_numerics.py:...
      at      rank 1      64 of 64 elements are infinite, held as I,S(1)
      remedy  autotp.check(model, grid, inputs) says whether the unsharded model makes it too
      remedy  torch.autograd.set_detect_anomaly(True) on the original model, if it does
    """,
)
def test_infinite(grid):
    parallel(Logs(rest=0.0), grid)


@on_ranks((1, 2))
@fault(
    "NaN in the part of one rank",
    """
    NumericsError: the first value that is not finite in forward is that of log
      at      your code   test_numerics.py:...
      at      rank 1      64 of 64 elements are NaN, held as I,S(1)
      remedy  autotp.check(model, grid, inputs) says whether the unsharded model makes it too
      remedy  torch.autograd.set_detect_anomaly(True) on the original model, if it does
    """,
)
def test_nan(grid):
    parallel(Logs(rest=-1.0), grid)


@on_ranks((1, 2))
@fault(
    "A weight that is NaN already",
    """
    NumericsError: the first value that is not finite in forward is that of fc2.bias
      at      rank 0   8 of 8 elements are NaN, before any op, held as I,I
      at      rank 1   8 of 8 elements are NaN, before any op, held as I,I
      remedy  autotp.check(model, grid, inputs) says whether the unsharded model makes it too
      remedy  torch.autograd.set_detect_anomaly(True) on the original model, if it does
    """,
)
def test_given(grid):
    model = Logs(rest=1.0)
    nn.init.constant_(model.fc2.bias, float("nan"))
    parallel(model, grid)


@on_ranks((1, 2))
@fault(
    "A gradient that is not finite",
    """
    NumericsError: the first value that is not finite in backward is that of fc1
      at      your code   test_numerics.py:...
      at      rank 1      gradient: 64 of 64 elements are NaN or infinite, held as I,S(1)
      remedy  autotp.check(model, grid, inputs) says whether the unsharded model makes it too
      remedy  torch.autograd.set_detect_anomaly(True) on the original model, if it does
    """,
)
def test_backward(grid):
    parallel(Logs(rest=0.0, function=torch.sqrt), grid).backward()


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        mask = torch.ones(8, 8, dtype=torch.bool).tril()
        scores = (self.fc1(x) @ x.transpose(1, 2)).masked_fill(~mask, float("-inf"))
        return self.fc2(scores.softmax(-1) @ x).square().mean()


@on_ranks((1, 2))
def test_masks_may_be_infinite_and_all_is_as_without(grid):
    torch.manual_seed(0)
    one, x = Masked(), torch.randn(2, 8, 8)
    torch.manual_seed(0)
    ours = autotp.parallelize(Masked(), grid, (x,), cluster=CLUSTER, check_numerics=True)
    for model in (one, ours):
        for _ in range(2):
            model(x).backward()
    assert_near(gradients(ours), gradients(one))
