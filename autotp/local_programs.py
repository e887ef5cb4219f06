"""Local programs: ops that no sentence can split, as small distributed programs of one rank.

Each is differentiable, takes the op's own arguments, and one keyword tuple of axes per factor that
is split (outermost first) with the factor's whole size. Operands with the factor are shards.
Statistics are taken in float32 at least and are complete on every rank of the split.

    vocab_embedding     v split: foreign rows are zero, the result is a partial sum
    cross_entropy       t or v split: the loss is partial over t, the same on all ranks of v
    layer_norm, rms_norm, softmax, log_softmax    the normalised dim split: so is the result
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autotp.errors import LayoutError
from autotp.first_order import first_order
from autotp.parts import (
    MEAN,
    NONE,
    Axes,
    apply_function,
    my_range,
    owned,
    targets_here,
    total_over,
    widened,
)

# Embedding -------------------------------------------------------------------------------------


def vocab_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    split_v: Axes,
    size_v: int,
) -> Tensor:
    """Look up `"v d, ... -> ... d"` with v split: partial over `split_v`."""
    low, high = my_range(size_v, split_v)
    mine = owned(indices, (low, high), size_v)
    padding = padding_idx - low if low <= padding_idx < high else -1
    foreign = 0
    if scale_grad_by_freq:  # a row of its own, or foreign tokens would count as row 0's
        weight, foreign = F.pad(weight, (0, 0, 0, 1)), high - low
    local = torch.where(mine, indices - low, foreign)
    rows = torch.embedding(weight, local, padding, scale_grad_by_freq, sparse)
    return rows.masked_fill(~mine.unsqueeze(-1), 0)


# Cross-entropy ---------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    split_t: Axes = (),
    split_v: Axes = (),
    size_v: int | None = None,
    size_t: int | None = None,
) -> Tensor:
    """Return the loss of `logits` `"t v"` against class numbers `"t"`, class weights being `"v"`.

    Over `split_t` a mean or sum is partial (the mean divides by the valid weight of all ranks) and
    "none" a shard; over `split_v` the loss is invariant. `size_t` is accepted as every whole size
    is, and not needed.

    Raises LayoutError for logits with further dims and for class probabilities as target.
    """
    if logits.ndim != 2 or target.ndim != 1 or target.is_floating_point():
        fact = f"logits {list(logits.shape)}, target {target.dtype} {list(target.shape)}"
        raise LayoutError(
            "only cross-entropy of [tokens, classes] against class numbers can be split",
            at=[("cross_entropy", fact)],
            remedy="flatten the logits to two dims, or pin the loss to run whole",
        )
    weight = None if weight is None else weight.detach()
    valid = target != ignore_index
    options = (size_v or logits.shape[1], label_smoothing, split_v)
    if split_v:
        rows, row_weight = _split_rows(logits, target, valid, weight, *options)
    else:
        rows, row_weight = _whole_rows(logits, target, weight, ignore_index, label_smoothing)
    if reduction != MEAN:
        return rows if reduction == NONE else rows.sum()
    return (widened(rows).sum() / total_over(row_weight.sum(), split_t)).to(rows.dtype)


def _whole_rows(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return each row's loss and the weight it has in a mean, the classes whole."""
    loss = torch.ops.aten.cross_entropy_loss
    rows = loss(logits, target, weight, NONE, ignore_index, smoothing)
    valid = target != ignore_index
    target_weight = 1 if weight is None else widened(weight)[torch.where(valid, target, 0)]
    return rows, valid * target_weight


def _split_rows(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    classes: int,
    smoothing: float,
    axes: Axes,
) -> tuple[Tensor, Tensor]:
    """Return each row's loss and the weight it has in a mean, the classes split over `axes`."""
    mine, at = targets_here(target, valid, my_range(classes, axes), classes)
    args = (logits, at, mine, valid, weight, classes, smoothing, axes)
    rows, row_weight = _RowLosses.apply(*args)  # type: ignore[no-untyped-call]
    return rows, valid if weight is None else row_weight


class _RowLosses(torch.autograd.Function):
    """The loss of each row, and the weight of its target class, with the classes split.

    With w the class weights, W their sum, s the smoothing and C classes, a valid row of target t
    loses (1-s) w_t (lse - x_t) + s/C (W lse - sum_c w_c x_c). Its gradient in x_c is
    (1-s) w_t (p_c - [c = t]) + s/C (W p_c - w_c).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        at: Tensor,
        mine: Tensor,
        valid: Tensor,
        weight: Tensor | None,
        classes: int,
        smoothing: float,
        axes: Axes,
    ) -> tuple[Tensor, Tensor]:
        x = widened(logits)
        w = None if weight is None else weight.to(x.dtype)
        top = total_over(x.amax(1), axes, "max")
        sums = [(x - top.unsqueeze(1)).exp_().sum(1)]
        sums.append(x.gather(1, at.unsqueeze(1)).squeeze(1).masked_fill(~mine, 0))
        if w is not None:
            sums.append(w[at].masked_fill(~mine, 0))
        if smoothing:
            sums.append(x.sum(1) if w is None else x @ w)
            sums.append(x.new_full((len(x),), x.shape[1]) if w is None else w.sum().expand(len(x)))
        sums = list(total_over(torch.stack(sums), axes))
        lse = sums[0].log() + top
        row_weight = valid.to(x.dtype) if w is None else sums[2]
        rows = (1 - smoothing) * row_weight * (lse - sums[1])
        all_weight = sums[-1][0] if smoothing else lse.new_zeros(())
        if smoothing:
            rows += (smoothing / classes) * (lse * all_weight - sums[-2])
        rows = rows.masked_fill(~valid, 0).to(logits.dtype)
        ctx.save_for_backward(logits, at, mine, valid, weight, lse, row_weight, all_weight)
        ctx.smoothing, ctx.uniform = smoothing, smoothing / classes
        ctx.mark_non_differentiable(row_weight)
        return rows, row_weight

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, at, mine, valid, weight, lse, row_weight, all_weight = ctx.saved_tensors
        grad = widened(grad).masked_fill(~valid, 0).unsqueeze(1)  # infinite where no target counts
        hit = (1 - ctx.smoothing) * row_weight.unsqueeze(1)
        out = (widened(logits) - lse.unsqueeze(1)).exp_()
        out.mul_(hit + ctx.uniform * all_weight)
        if ctx.uniform:
            out.sub_(ctx.uniform * (1.0 if weight is None else weight.to(out.dtype)))
        out.scatter_add_(1, at.unsqueeze(1), (-hit).masked_fill(~mine.unsqueeze(1), 0))
        return (out.mul_(grad).to(logits.dtype), *(None,) * 7)


# Norms -----------------------------------------------------------------------------------------


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
    *,
    split_d: Axes,
    size_d: int,
) -> Tensor:
    """Normalise `"... d"` with its last dim split; of `normalized_shape` only the length counts."""
    where = (len(normalized_shape), size_d, eps, True, split_d)
    return apply_function(_Norm, x, weight, bias, *where)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    split_d: Axes,
    size_d: int,
) -> Tensor:
    """Divide `"... d"` by its root mean square with its last dim split."""
    eps = torch.finfo(widened(x).dtype).eps if eps is None else eps
    where = (len(normalized_shape), size_d, eps, False, split_d)
    return apply_function(_Norm, x, weight, None, *where)


class _Norm(torch.autograd.Function):
    """xhat = (x - mean) / sqrt(var + eps), and y = xhat w + b; without the mean it is rms_norm.

    With h = g w over n elements, dx = (h - sum(h)/n - xhat sum(h xhat)/n) / sqrt(var + eps).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        ndim: int,
        size: int,
        eps: float,
        centered: bool,
        axes: Axes,
    ) -> Tensor:
        dims = tuple(range(x.ndim - ndim, x.ndim))
        count = size * x.shape[dims[0] : -1].numel()
        wide, mean = widened(x), None
        if centered:
            mean = total_over(wide.sum(dims, keepdim=True), axes) / count
            wide = wide - mean
        scale = (total_over(wide.square().sum(dims, keepdim=True), axes) / count + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.dims, ctx.count, ctx.axes = dims, count, axes
        ctx.bias_dtype = None if bias is None else bias.dtype
        out = wide * scale
        out = out if weight is None else out * weight
        out = out if bias is None else out + bias
        return out.to(x.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dims, count = ctx.dims, ctx.count
        xhat = (widened(x) if mean is None else widened(x) - mean) * scale
        grad = widened(grad)
        h = grad if weight is None else grad * weight
        sums = [(h * xhat).sum(dims, keepdim=True)]
        sums += [] if mean is None else [h.sum(dims, keepdim=True)]
        along, *flat = total_over(torch.stack(sums), ctx.axes) / count
        dx = h - xhat * along
        dx = (dx if not flat else dx - flat[0]) * scale
        shape, needed = x.shape[dims[0] :], ctx.needs_input_grad
        dw = (grad * xhat).sum_to_size(shape).to(weight.dtype) if needed[1] else None
        db = grad.sum_to_size(shape).to(ctx.bias_dtype) if needed[2] else None
        return (dx.to(x.dtype), dw, db, *(None,) * 5)


# Softmax ---------------------------------------------------------------------------------------


def softmax(
    x: Tensor, dim: int, dtype: torch.dtype | None = None, *, split_d: Axes, size_d: int = 0
) -> Tensor:
    """Return the softmax over the split `dim`; `size_d` is not needed."""
    return apply_function(_Softmax, x if dtype is None else x.to(dtype), dim, False, split_d)


def log_softmax(
    x: Tensor, dim: int, dtype: torch.dtype | None = None, *, split_d: Axes, size_d: int = 0
) -> Tensor:
    """Return the log of the softmax over the split `dim`; `size_d` is not needed."""
    return apply_function(_Softmax, x if dtype is None else x.to(dtype), dim, True, split_d)


class _Softmax(torch.autograd.Function):
    """y = exp(x - lse), with dx = y (g - sum(g y)); its logarithm, with dx = g - y sum(g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, log: bool, axes: Axes) -> Tensor:
        wide = widened(x)
        centered = wide - total_over(wide.amax(dim, keepdim=True), axes, "max")
        exp = centered.exp()
        total = total_over(exp.sum(dim, keepdim=True), axes)
        out = (centered - total.log() if log else exp / total).to(x.dtype)
        ctx.save_for_backward(out)
        ctx.dim, ctx.log, ctx.axes = dim, log, axes
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        y, g = widened(out), widened(grad)
        y = y.exp() if ctx.log else y
        total = total_over((g if ctx.log else g * y).sum(ctx.dim, keepdim=True), ctx.axes)
        dx = g - y * total if ctx.log else y * (g - total)
        return dx.to(out.dtype), None, None, None
