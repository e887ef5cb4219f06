"""What local programs share: which part of a dim a rank holds, sums over ranks, precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autotp.axis import Axis
from autotp.layouts import Range, chunk

Axes = tuple[Axis, ...]

NONE, MEAN = 0, 1
"""ATen's numbers for the reductions of losses; 2 is the sum."""


def my_range(size: int, axes: Axes) -> Range:
    """Return the range of a dim of `size` that this rank holds."""
    return range_at(size, axes, [axis.index for axis in axes])


def range_at(size: int, axes: Axes, places: Sequence[int]) -> Range:
    """Return the range of a dim of `size` that the rank at `places` on `axes` holds."""
    low, high = 0, size
    for axis, place in zip(axes, places, strict=True):
        a, b = chunk(high - low, axis.size, place)
        low, high = low + a, low + b
    return low, high


def total_over(x: Tensor, axes: Axes, op: str = "sum") -> Tensor:
    """Return the sum (or max) of `x` over all ranks of `axes`; not differentiable."""
    for axis in axes:
        x = axis.all_reduce(x, op) if axis.size > 1 else x
    return x


def widened(x: Tensor) -> Tensor:
    """Return `x` in the precision that statistics are taken in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def owned(indices: Tensor, mine: Range, size: int) -> Tensor:
    """Say which `indices` into a dim of `size` lie in the range `mine`.

    Raises RuntimeError, on the device, for an index that no rank owns.
    """
    known = ((indices >= 0) & (indices < size)).all()
    torch._assert_async(known, f"an index lies outside a split dim of size {size}")
    return (indices >= mine[0]) & (indices < mine[1])


def targets_here(target: Tensor, valid: Tensor, mine: Range, classes: int) -> tuple[Tensor, Tensor]:
    """Say which valid targets are among the classes `mine`, and where there; others are at zero."""
    here = owned(torch.where(valid, target, 0), mine, classes) & valid
    return here, torch.where(here, target - mine[0], 0)


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """Call a custom autograd function, typed."""
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out
