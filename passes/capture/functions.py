"""Custom autograd functions: torch.export keeps their forward and loses their backward.

Where autograd of the forward gives what the function's own backward gives, nothing is lost, and the
forward is captured. That is tried on numbers, as rules are. What differs, and what takes more than
tensors and plain values, is refused by name.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, _SingleLevelFunction
from torch.utils import _pytree as pytree

from autotp.errors import CaptureError

SCALES = (0.1, 1.0, 10.0)
"""Sizes of the numbers on which a backward is tried: a function may clamp or round."""
GRADIENTS = (1e-3, 1.0, 1e4)
"""Sizes of the gradients that it is sent: a backward may clamp or rescale them."""
TOLERANCE = 1e-5
"""How far the two gradients may be apart: their constants are written in a few digits."""

Call = tuple[type[Function], tuple[Any, ...], str]
"""A function, its arguments with tensors described, and the user's line."""


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor argument: enough to make another like it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def sample(self, scale: float) -> Tensor:
        """Return random numbers, in float64 where they are floats."""
        if self.dtype.is_floating_point:
            made = torch.randn(self.shape, dtype=torch.float64) * scale
            return made.requires_grad_(self.requires_grad)
        return torch.randint(2, self.shape).to(self.dtype)


@contextlib.contextmanager
def captured_functions(current_line: Callable[[], str]) -> Iterator[None]:
    """Capture the forward of custom autograd functions; refuse them where that loses a backward.

    Those of torch.library ops stay: an op is one node, which finds its backward again. A bound
    `apply` may be kept by the model, so what it calls is replaced. `current_line` is the user's.

    Raises: CaptureError.
    """
    functions = Functions()
    original: Any = vars(torch._C._FunctionBase)["apply"]

    def apply(function: type[Any], *args: Any) -> Any:
        if function.__module__ == "torch._library.autograd":
            return original.__get__(None, function)(*args)
        return functions.apply(function, args, current_line())

    with mock.patch.object(_SingleLevelFunction, "apply", classmethod(apply)):
        yield
    functions.refuse()


@dataclass(slots=True)
class Functions:
    """The custom functions that a model calls while it is exported, each call of a kind once."""

    calls: dict[str, Call] = field(default_factory=dict)

    def apply(self, function: type[Function], args: tuple[Any, ...], line: str) -> Any:
        """Note a call and return what its forward gives, differentiable by autograd."""
        if not all(isinstance(a, Tensor | int | float | str | tuple | None) for a in args):
            raise refusal([(function, args, line)])
        given = tuple(described(a) if isinstance(a, Tensor) else a for a in args)
        self.calls.setdefault(f"{name_of(function)}{given}", (function, given, line))
        return forward(function, args)

    def refuse(self) -> None:
        """Raise CaptureError, with every function whose backward is not that of its forward."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            wrong = [call for call in self.calls.values() if not agrees(*call[:2])]
        if wrong:
            raise refusal(wrong)


def refusal(calls: Sequence[Call]) -> CaptureError:
    """Return the error that names the functions whose backward would be lost."""
    names = dict.fromkeys(function.__name__ for function, _, _ in calls)
    verb = "is a custom autograd function" if len(names) == 1 else "are custom autograd functions"
    return CaptureError(
        f"{', '.join(names)} {verb}: its backward would be lost",
        at=[(line, name_of(function)) for function, _, line in calls],
        remedy="write its forward in differentiable ops, or make it a torch.library custom op",
    )


def name_of(function: type[Function]) -> str:
    """Return the qualified name of a function."""
    return f"{function.__module__}.{function.__qualname__}"


def described(x: Tensor) -> Described:
    """Describe a tensor; a size that varies is that of the example."""
    shape = tuple(n if isinstance(n, int) else int(n.node.hint) for n in x.shape)
    return Described(shape, x.dtype, x.requires_grad)


def forward(function: type[Function], args: Sequence[Any]) -> Any:
    """Run a function's forward as plain ops."""
    plain: Any = function
    if function.setup_context is not Function.setup_context:
        return plain.forward(*args)
    context: Any = FunctionCtx()
    context.needs_input_grad = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)
    return plain.forward(context, *args)


def agrees(function: type[Function], args: Sequence[Any]) -> bool:
    """Say whether autograd of the forward gives the results and gradients of the function."""
    for scale, gradient in itertools.product(SCALES, GRADIENTS):
        given = [a.sample(scale) if isinstance(a, Described) else a for a in args]
        try:
            own = list(step(lambda f, *rest: f.apply(*rest), function, given, gradient))
            plain = list(step(lambda f, *rest: forward(f, rest), function, given, gradient))
        except Exception:  # whatever it asks of its arguments that random ones lack
            return False
        if not all(map(is_close, own, plain)):
            return False
    return True


def step(
    run: Callable[..., Any], function: type[Function], given: Sequence[Any], gradient: float
) -> Iterator[Tensor]:
    """Yield what a function makes, then the gradient of each argument that has one.

    `gradient` is the largest element of what is sent back from each result.
    """
    leaves = [a for a in given if isinstance(a, Tensor) and a.requires_grad]
    with torch.enable_grad():
        outputs = pytree.tree_leaves(run(function, *given))
        made = [y for y in outputs if isinstance(y, Tensor)]
        back = [torch.linspace(-gradient, gradient, y.numel()).reshape(y.shape) for y in made]
        loss = torch.stack([(y * g).sum() for y, g in zip(made, back, strict=True)]).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
    yield from (y.detach() for y in made)
    for leaf, grad in zip(leaves, grads, strict=True):
        yield torch.zeros_like(leaf) if grad is None else grad


def is_close(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors are equal, beside the largest of their finite elements."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    largest = float(one.abs().nan_to_num(0, 0, 0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * largest, equal_nan=True)
