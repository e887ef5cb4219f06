import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autotp.passes.capture.model import capture
from autotp.passes.network import read_network
from autotp.passes.roofline import is_function, narrowest


class Ops(nn.Module):
    """One op under test, after a product that gives it a gradient."""

    def __init__(self, op):
        super().__init__()
        self.op, self.first = op, nn.Linear(16, 64)

    def forward(self, x):
        return self.op(self.first(x))


def last_op(op):
    program = capture(Ops(op), (torch.randn(4, 8, 16),), {}, train=True)
    return read_network(program).ops[-1]


@pytest.mark.parametrize(
    ("op", "size"),
    [
        (lambda y: F.linear(y, torch.ones(24, 64)), 24),  # rows are 4 x 8
        (lambda y: y @ y.transpose(1, 2), 8),  # a batch is no dim of the product
        (lambda y: torch.einsum("bsd,btd->st", y, y), 8),  # here b d is what is summed
        (lambda y: F.conv1d(y, torch.ones(3, 8, 1)), None),
    ],
)
def test_the_narrowest_dim_of_one_product(op, size):
    found = last_op(op)
    assert narrowest(found, found.signature.sizes) == size


@pytest.mark.parametrize(
    ("op", "is_one"),
    [(F.gelu, True), (torch.tanh, True), (lambda y: y.softmax(-1), True), (F.relu, False)],
)
def test_functions_are_told_by_their_names(op, is_one):
    assert is_function(last_op(op)) == is_one
