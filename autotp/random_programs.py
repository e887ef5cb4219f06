"""Programs of ops that draw random numbers, for ranks that draw apart and for ranks that agree.

Fast: each place of the tensor has its own seed, so that masks differ where the tensor is split.

    dropout, sdpa_dropout    the op's own arguments, then rng, site and the axes that split

Exact: every rank draws the whole tensor's numbers, by the op that the original calls, and keeps its
part. `wholes` has a `Whole` per tensor operand, `results` the part of each result.

    exact_dropout, exact_sdpa    draw the whole mask and apply its part
    exact_part                   any op that draws as often whatever it reads: run on blanks around
                                 this rank's part
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autotp.axis import Axis
from autotp.layouts import Range
from autotp.parts import apply_function
from autotp.randomness import (
    RandomState,
    default_generator_seeded,
    drawn_call,
    keep_mask,
    site_seed,
)

aten = torch.ops.aten

Axes = tuple[Axis, ...]
Part = Sequence[tuple[int, Sequence[Range]]]
"""What a rank holds of a tensor: of each dim that is split, the ranges."""
Whole = tuple[Sequence[int], Sequence[int], Part]
"""The whole tensor's shape and strides, and the part of it."""


# Fast --------------------------------------------------------------------------------------------


def dropout(
    x: Tensor, p: float, train: bool, *, rng: RandomState, split: Axes = (), site: int
) -> Tensor:
    """Zero elements with probability `p` and scale the rest, alike on the replicas of `x`."""
    if not train or p == 0:
        return x
    if p == 1:
        return x * 0
    return _masked(x, keep_mask(x, p, rng, site, split), 1 / (1 - p))


def _masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return apply_function(_Masked, x, mask, scale)


class _Masked(torch.autograd.Function):
    """x * mask * scale, which saves one byte per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return x * mask * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return grad * mask * ctx.scale, None, None


def sdpa_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    rng: RandomState,
    split: Axes = (),
    site: int,
) -> Tensor:
    """Return scaled dot product attention, its dropout alike on the replicas of `query`."""
    seed = site_seed(rng.step_seed, site, [axis.index for axis in split])
    with default_generator_seeded(seed, query.device):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


# Exact -------------------------------------------------------------------------------------------


def exact_dropout(
    x: Tensor,
    p: float,
    train: bool,
    *,
    rng: RandomState,
    wholes: Sequence[Whole],
    results: Sequence[Part],
) -> Tensor:
    """Zero and scale the elements of `x` that the original does."""
    noise = drawn_call(aten.dropout.default, blank(x, wholes[0]), p, train, rng=rng)
    return x * cut(noise, results[0])


def exact_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    rng: RandomState,
    wholes: Sequence[Whole],
    results: Sequence[Part],
) -> Tensor:
    """Return attention whose weights "b n s t" are dropped as the original's on a CPU are.

    Source: at::_scaled_dot_product_attention_math, which drops the weights after the softmax.
    """
    shape = (*wholes[0][0][:-1], wholes[1][0][-2])
    ones = torch.ones(shape, dtype=query.dtype, device=query.device)
    noise = cut(drawn_call(aten.dropout.default, ones, dropout_p, True, rng=rng), results[0])
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights: Tensor = aten._safe_softmax(scores, -1)
    return (weights * noise) @ value


def exact_part(
    op: Any,
    *args: Any,
    rng: RandomState,
    wholes: Sequence[Whole],
    results: Sequence[Part],
    **kwargs: Any,
) -> Any:
    """Run `op` on whole operands, blank but for this rank's parts; return the parts of results."""
    rest = iter(wholes)
    args = tuple(put(a, next(rest)) if isinstance(a, Tensor) else a for a in args)
    made = drawn_call(op, *args, rng=rng, **kwargs)
    if isinstance(made, Tensor):
        return cut(made, results[0])
    return tuple(cut(m, part) for m, part in zip(made, results, strict=True))


def blank(like: Tensor, whole: Whole) -> Tensor:
    """Return ones of the whole's shape and order in memory."""
    shape, stride, _ = whole
    made = torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)
    return made.fill_(1)


def put(x: Tensor, whole: Whole) -> Tensor:
    """Return a blank with `x` in its place."""
    shape, _, part = whole
    ranges = {d: [range(a, b) for a, b in held] for d, held in part}
    index = [
        torch.tensor([i for r in ranges.get(d, [range(n)]) for i in r], device=x.device)
        for d, n in enumerate(shape)
    ]
    return blank(x, whole).index_put_(torch.meshgrid(*index, indexing="ij"), x) if index else x


def cut(x: Tensor, part: Part) -> Tensor:
    """Return the part of `x`, in memory of its own."""
    for dim, ranges in part:
        x = torch.cat([x.narrow(dim, a, b - a) for a, b in ranges], dim)
    return x
