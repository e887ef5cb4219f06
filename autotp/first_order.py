"""First order only: a backward that nobody may differentiate refuses at once.

torch's own `once_differentiable` raises where the missing second derivative is reached, and drops
it in silence where `torch.autograd.grad` is given its inputs by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from autotp.errors import RuntimeStateError


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backward raise RuntimeStateError where its own derivative may be asked for."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def refusing(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeStateError(
                "a second derivative is asked for of an op whose split dim has a first one only",
                at=[("backward of", type(ctx).__name__), ("asked by", "create_graph=True")],
                remedy="pin the op so that the dim is whole on every rank, or use a grid of one",
            )
        return once(ctx, *gradients)

    return refusing
