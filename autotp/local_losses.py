"""Losses of classes with rows, space or the classes split.

Scores are `"t v x..."`, targets class numbers `"t x..."`. A mean divides by the weights of all
ranks' targets. A parameter `split_f` is the tuple of axes that split factor f, outermost first, and
`size_f` its whole size.

    cross_entropy   a partial sum over t and x, the same on all ranks of v
    nll_loss        a partial sum over t, v and x
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from autotp import local_programs
from autotp.parts import MEAN, NONE, Axes, my_range, targets_here, total_over, widened


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    **splits: Any,
) -> Tensor:
    """Return the loss of logits against class numbers, or probabilities of whole classes."""
    if target.is_floating_point():
        return _soft_cross_entropy(logits, target, weight, reduction, label_smoothing, splits)
    rows = local_programs.cross_entropy(
        logits.movedim(1, -1).reshape(-1, logits.shape[1]),
        target.reshape(-1),
        weight,
        reduction,
        ignore_index,
        label_smoothing,
        split_t=_row_axes(splits),
        split_v=splits.get("split_v", ()),
        size_v=splits.get("size_v"),
    )
    return rows.reshape(target.shape) if reduction == NONE else rows


def _soft_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    smoothing: float,
    splits: dict[str, Any],
) -> Tensor:
    """Return the loss against probabilities, whose mean divides by the rows of all ranks."""
    loss = torch.ops.aten.cross_entropy_loss
    rows: Tensor = loss(logits, target, weight, NONE, -100, smoothing)
    if reduction != MEAN:
        return rows if reduction == NONE else rows.sum()
    names = ["t", *(f"x{d}" for d in range(rows.ndim - 1))]
    sizes: list[int] = [
        splits.get(f"size_{name}", n) for name, n in zip(names, rows.shape, strict=True)
    ]
    return rows.sum() / math.prod(sizes)


def nll_loss(
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    **splits: Any,
) -> Tensor:
    """Return minus the scores of the targets, those of other ranks' classes as zero."""
    axes = splits.get("split_v", ())
    size = splits.get("size_v", scores.shape[1])
    mine, at = targets_here(target, target != ignore_index, my_range(size, axes), size)
    share = mine if weight is None else widened(weight)[at] * mine
    picked = scores.gather(1, at.unsqueeze(1)).squeeze(1)
    rows = -(picked.masked_fill(~mine, 0) * share)  # the gradient of others is 0, also of inf
    if reduction != MEAN:
        return rows if reduction == NONE else rows.sum()
    return (rows.sum() / total_over(share.sum(), (*axes, *_row_axes(splits)))).to(scores.dtype)


def _row_axes(splits: dict[str, Any]) -> Axes:
    """Return the axes that split rows or space."""
    names = ("split_t", "split_x0", "split_x1", "split_x2")
    return tuple(axis for name in names for axis in splits.get(name, ()))
