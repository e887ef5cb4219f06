"""Custom autograd functions are captured where autograd of their forward has their gradients."""

import pytest
import torch
from torch import nn

from autotp.check import compare, prepare
from autotp.errors import CaptureError
from autotp.grid import as_grid
from autotp.passes.capture.model import capture
from tests.random_plans import random_plan


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x**3 * scale

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x**2 * ctx.scale, None


class Halves(torch.autograd.Function):
    """In the newer style, with two results, one of which has no gradient."""

    @staticmethod
    def forward(x, mask):
        return torch.where(mask, x, x / 2), x.argmax(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, g, _):
        return torch.where(ctx.saved_tensors[0], g, g / 2), None


class Rounded(torch.autograd.Function):
    """Passes gradients straight through, as quantisation does."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Clamped(torch.autograd.Function):
    """Differs from its forward far from zero only."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-9, 9)

    @staticmethod
    def backward(ctx, g):
        return g


class Bounded(torch.autograd.Function):
    """Differs from its forward for large gradients only."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-2, 2)


class Told(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function):
        return function(x)

    @staticmethod
    def backward(ctx, g):
        return g, None


class Model(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call, self.fc = call, nn.Linear(6, 8)

    def forward(self, x):
        return self.call(self.fc(x))


@pytest.mark.parametrize(
    "call", (lambda x: Cube.apply(x, 2.0), lambda x: Halves.apply(x, x > 0)), ids=("old", "new")
)
def test_a_function_with_the_gradient_of_its_forward_is_captured(call):
    subject = prepare(Model(call).double(), (torch.randn(4, 6, dtype=torch.float64),), {})
    for seed, grid in enumerate(((2, 2), (4,))):
        assert compare(subject, random_plan(subject, as_grid(grid), seed)).ok


@pytest.mark.parametrize(
    "call", (Rounded.apply, Clamped.apply, Bounded.apply, lambda x: Told.apply(x, torch.sin))
)
def test_any_other_is_refused(call):
    with pytest.raises(CaptureError, match="is a custom autograd function"):
        capture(Model(call), (torch.randn(4, 6),), {}, train=True)
