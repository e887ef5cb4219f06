"""Attention with its sequence split: the rows alone, or rows and keys on a ring.

    split_s             this rank's queries meet all keys: keys and values are gathered before
    split_s, split_t    keys and values stay split as well; their blocks travel round the ring of
                        `split_t`, and every rank meets one block after the other

On the ring the softmax is taken online: with m the largest score so far, l = sum exp(x - m) and
a = sum exp(x - m) v are rescaled whenever m grows; the result is a / l. Both are kept, for beside
the lowest number of a mask their joint log l + m would lose l. The backward lets keys and values
travel once more, and their gradients with them until they are home:

    p = exp(x - m) / l    dv = p' g    dx = p (g v' - sum(g out))    dq = dx k    dk = dx' q

Source: Li et al. 2021, "Sequence Parallelism", arXiv 2105.13120, for the ring; Milakov and
Gimelshein 2018, arXiv 1805.02867, for the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autotp.first_order import first_order
from autotp.layouts import Range
from autotp.parts import Axes, apply_function, my_range, range_at, widened


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    split_s: Axes,
    size_s: int,
    split_t: Axes = (),
    size_t: int = 0,
) -> Tensor:
    """Attend from `"... s d"` to `"... t d, ... t e"`, each rank from its own rows.

    The mask has this rank's rows and all columns. `dropout_p` must be zero.
    """
    rows = my_range(size_s, split_s)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if split_t:
        causal = rows if is_causal else None
        grouped = enable_gqa and query.shape[-3] != key.shape[-3]
        operands = (query, key, value, attn_mask)
        given = _by_key_heads(*operands) if grouped else operands
        out = apply_function(_Ring, *given, scale, causal, split_t, size_t)
        return out.flatten(-4, -3) if grouped else out
    if is_causal and rows[0]:
        seen = min(rows[1], key.shape[-2])
        key, value = key.narrow(-2, 0, seen), value.narrow(-2, 0, seen)
        attn_mask, is_causal = _lower(rows, (0, seen), query.device), False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _lower(rows: Range, columns: Range, device: torch.device) -> Tensor:
    """Return the block of a causal mask, true where a row may look at a column."""
    row, column = (torch.arange(*r, device=device) for r in (rows, columns))
    return row.unsqueeze(1) >= column


def _by_key_heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the operands with heads `(m g)` of queries as two dims, `m 1` of keys and values."""
    heads = key.shape[-3]
    if mask is not None and mask.ndim > 2:
        mask = mask.unsqueeze(-3) if mask.shape[-3] == 1 else _grouped(mask, heads)
    return _grouped(query, heads), key.unsqueeze(-3), value.unsqueeze(-3), mask


def _grouped(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:-3], heads, -1, *x.shape[-2:])


# The ring --------------------------------------------------------------------------------------


def tour(sizes: Sequence[int]) -> list[int]:
    """Return the axes along which to shift by one, each in turn, to meet every rank once.

    >>> tour((2, 3))
    [1, 1, 0, 1, 1]
    """
    steps: list[int] = []
    for axis, size in enumerate(sizes):
        around = [axis] * (size - 1)
        steps = around + [a for step in steps for a in (step, *around)]
    return steps


def way_home(sizes: Sequence[int]) -> dict[int, int]:
    """Return how far each axis must shift after a tour, so that all is where it was."""
    steps = tour(sizes)
    back = {axis: -steps.count(axis) % size for axis, size in enumerate(sizes)}
    return {axis: by for axis, by in back.items() if by}


def _travel(held: list[Tensor], axes: Axes, size: int) -> Iterator[Range]:
    """Shift what is `held` round all ranks; yield the range of the keys that it belongs to."""
    places = [axis.index for axis in axes]
    yield range_at(size, axes, places)
    for level in tour([axis.size for axis in axes]):
        held[:] = [axes[level].permute(x) for x in held]
        places[level] = (places[level] - 1) % axes[level].size
        yield range_at(size, axes, places)


class _Wire:
    """Keys and values, or their gradients, of one block in one flat tensor of equal length."""

    def __init__(self, key: Tensor, value: Tensor, axes: Axes, size: int) -> None:
        low, high = range_at(size, axes, [0] * len(axes))
        self.shapes = [(*x.shape[:-2], high - low, x.shape[-1]) for x in (key, value)]

    def pack(self, key: Tensor, value: Tensor) -> Tensor:
        """Return both, filled up with zeros to the length of the longest block."""
        longest = self.shapes[0][-2]
        return torch.cat(
            [F.pad(x, (0, 0, 0, longest - x.shape[-2])).reshape(-1) for x in (key, value)]
        )

    def zeros(self, like: Tensor) -> Tensor:
        """Return an empty wire in the precision of `like`."""
        return like.new_zeros(sum(math.prod(shape) for shape in self.shapes))

    def open(self, wire: Tensor, columns: Range) -> tuple[Tensor, Tensor]:
        """Return both as views, as long as they are."""
        length = columns[1] - columns[0]
        at = math.prod(self.shapes[0])
        key, value = wire[:at].view(self.shapes[0]), wire[at:].view(self.shapes[1])
        return key.narrow(-2, 0, length), value.narrow(-2, 0, length)


class _Ring(torch.autograd.Function):
    """Attention over blocks of keys and values that come by, one rank's after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: Range | None,
        axes: Axes,
        size: int,
    ) -> Tensor:
        wire, q = _Wire(key, value, axes, size), widened(query) * scale
        rows, lead = query.shape[-2], _common_lead(query, key, value)
        top = q.new_full((*lead, rows, 1), -math.inf)
        total, out = torch.zeros_like(top), q.new_zeros((*lead, rows, value.shape[-1]))
        held = [wire.pack(key, value)]
        for columns in _travel(held, axes, size):
            if causal and columns[0] >= causal[1]:
                continue
            k, v = wire.open(held[0], columns)
            x = _scores(q, k, mask, causal, columns)
            higher = torch.maximum(top, x.amax(-1, keepdim=True))
            p, shrink = _exp(x, higher), _exp(top, higher)
            total = total * shrink + p.sum(-1, keepdim=True)
            out, top = out * shrink + p @ widened(v), higher
        total = total.masked_fill(total == 0, 1)
        out = (out / total).to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, out, top, total)
        ctx.where = (scale, causal, axes, size)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, top, total = ctx.saved_tensors
        scale, causal, axes, size = ctx.where
        wire, q, grad = _Wire(key, value, axes, size), widened(query) * scale, widened(grad)
        along = (grad * widened(out)).sum(-1, keepdim=True)
        dq = q.new_zeros((*grad.shape[:-1], q.shape[-1]))
        dmask = torch.zeros_like(widened(mask)) if ctx.needs_input_grad[3] else None
        held = [wire.pack(key, value), wire.zeros(q)]
        for columns in _travel(held, axes, size):
            if causal and columns[0] >= causal[1]:
                continue
            k, v = (widened(x) for x in wire.open(held[0], columns))
            dk, dv = wire.open(held[1], columns)
            p = _exp(_scores(q, k, mask, causal, columns), top) / total
            dx = p * (grad @ v.mT - along)
            dq += dx @ k
            dk += (dx.mT @ q).sum_to_size(dk.shape)
            dv += (p.mT @ grad).sum_to_size(dv.shape)
            if dmask is not None:
                block = _columns(dmask, columns)
                block += dx.sum_to_size(block.shape)
        for level, by in way_home([axis.size for axis in axes]).items():
            held[1] = axes[level].permute(held[1], by)
        dk, dv = wire.open(held[1], my_range(size, axes))
        dq = (dq * scale).sum_to_size(query.shape)
        dmask = None if dmask is None else dmask.to(mask.dtype)
        return (dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dmask, *(None,) * 4)


def _common_lead(*operands: Tensor) -> torch.Size:
    """Return the dims before rows and features, broadcast."""
    first, *rest = (x[..., :1, :1] for x in operands)
    return sum(rest, first).shape[:-2]


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: Range | None, columns: Range
) -> Tensor:
    """Return the scores of a block, -inf where a row may not look."""
    x = q @ widened(k).mT
    if mask is not None:
        block = _columns(mask, columns)
        x = x.masked_fill(~block, -math.inf) if mask.dtype is torch.bool else x + block
    if causal and columns[1] - 1 > causal[0]:
        x = x.masked_fill(~_lower(causal, columns, q.device), -math.inf)
    return x


def _columns(mask: Tensor, columns: Range) -> Tensor:
    """Return a mask's columns of one block; one column stands for all."""
    return mask if mask.shape[-1] == 1 else mask.narrow(-1, columns[0], columns[1] - columns[0])


def _exp(x: Tensor, top: Tensor) -> Tensor:
    """Return exp(x - top); where nothing was seen yet, top is -inf and the result zero."""
    return (x - top.masked_fill(top == -math.inf, 0)).exp()
