"""Batch normalisation in training, its batch split: the statistics are those of the whole batch.

Every rank sums what it holds; the sums are all-reduced, forward for mean and variance and backward
for the two sums of the gradient. So each rank makes the same running statistics, bit for bit.
A parameter `split_f` is the tuple of axes that split factor f, outermost first, and `size_f` its
whole size; the factors are n, the batch, and x0, x1, x2, the dims of space.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from autotp.first_order import first_order
from autotp.parts import Axes, total_over, widened

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]
"""A normalised tensor, and per channel the mean, 1 / sqrt(var + eps) and var."""

Running = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""A normalised tensor, mean, 1 / sqrt(var + eps), and the new running mean and variance."""


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    **splits: Any,
) -> Running:
    """Normalise `"n c x..., c, c, c, c"`; return also the statistics and the new running ones."""
    if not training:
        op = torch.ops.aten._native_batch_norm_legit_functional.default
        made: Running = op(x, weight, bias, running_mean, running_var, False, momentum, eps)
        return made
    count = _count(x, splits)
    out, mean, scale, var = _normalise(x, weight, bias, eps, count, _axes(splits))
    var = var * (count / (count - 1))
    return (
        out,
        mean,
        scale,
        torch.lerp(running_mean, mean.to(running_mean.dtype), momentum),
        torch.lerp(running_var, var.to(running_var.dtype), momentum),
    )


def batch_norm_untracked(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    _training: bool,
    _momentum: float,
    eps: float,
    **splits: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise `"n c x..., c, c"`, which has no running statistics."""
    return _normalise(x, weight, bias, eps, _count(x, splits), _axes(splits))[:3]


def _axes(splits: dict[str, Any]) -> Axes:
    return tuple(a for name, axes in splits.items() if name.startswith("split_") for a in axes)


def _count(x: Tensor, splits: dict[str, Any]) -> int:
    """Return the elements per channel on all ranks together."""
    names = ["n", "", *(f"x{d}" for d in range(x.ndim - 2))]
    sizes: list[int] = [
        splits.get(f"size_{name}", n) for name, n in zip(names, x.shape, strict=True)
    ]
    return math.prod(sizes) // sizes[1]


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, count: int, axes: Axes
) -> Statistics:
    out: Statistics = _BatchNorm.apply(x, weight, bias, eps, count, axes)  # type: ignore[no-untyped-call]
    return out


class _BatchNorm(torch.autograd.Function):
    """xhat = (x - mean) / sqrt(var + eps), and y = xhat w + b, per channel.

    With h = g w over n elements, dx = (h - sum(h)/n - xhat sum(h xhat)/n) / sqrt(var + eps).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        count: int,
        axes: Axes,
    ) -> Statistics:
        dims = [d for d in range(x.ndim) if d != 1]
        mean = total_over(widened(x).sum(dims), axes) / count
        centered = widened(x) - _channels(mean, x)
        var = total_over(centered.square().sum(dims), axes) / count
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.count, ctx.axes = count, axes
        ctx.bias_dtype = None if bias is None else bias.dtype
        out = centered * _channels(scale, x)
        out = out if weight is None else out * _channels(weight, x)
        out = out if bias is None else out + _channels(bias, x)
        ctx.mark_non_differentiable(mean, scale, var)
        return out.to(x.dtype), mean, scale, var

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dims = [d for d in range(x.ndim) if d != 1]
        xhat, grad = (widened(x) - _channels(mean, x)) * _channels(scale, x), widened(grad)
        db, dw = grad.sum(dims), (grad * xhat).sum(dims)
        flat, along = total_over(torch.stack([db, dw]), ctx.axes) / ctx.count
        dx = grad - _channels(flat, x) - xhat * _channels(along, x)
        dx = dx * _channels(scale if weight is None else scale * weight, x)
        needed = ctx.needs_input_grad
        return (
            dx.to(x.dtype),
            dw.to(weight.dtype) if needed[1] else None,
            db.to(ctx.bias_dtype) if needed[2] else None,
            *(None,) * 3,
        )


def _channels(v: Tensor, like: Tensor) -> Tensor:
    """Return a vector over channels in a shape that broadcasts."""
    return v.reshape(-1, *(1,) * (like.ndim - 2))
