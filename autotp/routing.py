"""Rows that go where data says: lookups in a split table, and experts that are split.

    exchange          rows to the ranks that want them; who wants which is known on all ranks
    split_index       `table[indices]` with the looked-up dim split: foreign rows are zero, the
                      result is a partial sum; with the indices split too, their owners send them
    split_index_add   rows added to a split table: sent to the owners, who add them
    grouped_mm        products of consecutive groups of rows with one matrix each: rows, experts
                      or both split; with both, every row visits its expert's rank and comes back

How many rows go from one rank to another depends on the data; what is counted is an even exchange
of the largest chunk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autotp.first_order import first_order
from autotp.layouts import Range
from autotp.parts import Axes, apply_function, my_range, owned, range_at

# The exchange ----------------------------------------------------------------------------------


def exchange(rows: Tensor, source: Tensor, target: Tensor, axes: Axes, largest: int) -> Tensor:
    """Send row k of a list from rank `source[k]` to rank `target[k]`; differentiable.

    Ranks are numbered over `axes`, outermost first; each holds the rows of which it is the source,
    in the list's order, and gets those of which it is the target. `largest` rows are counted.
    """
    return apply_function(_Exchange, rows, source, target, axes, largest)


class _Exchange(torch.autograd.Function):
    """Rows there, and their gradients back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, source: Tensor, target: Tensor, axes: Axes, largest: int
    ) -> Tensor:
        ctx.where = (target, source, axes, largest)
        return _send(rows, source, target, axes, largest)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _send(grad, *ctx.where), None, None, None, None


def _send(rows: Tensor, source: Tensor, target: Tensor, axes: Axes, largest: int) -> Tensor:
    """Go along one axis after the other."""
    me = _rank([axis.index for axis in axes], axes)
    counted = largest * math.prod(rows.shape[1:]) * rows.itemsize
    for level, axis in enumerate(axes):
        stride = math.prod(a.size for a in axes[level + 1 :])
        old, new = source // stride % axis.size, target // stride % axis.size
        moved = source + (new - old) * stride
        leaving, coming = new[source == me], old[moved == me]
        send, receive = (_counts(x, axis.size) for x in (leaving, coming))
        message = rows[leaving.argsort(stable=True)]
        got = axis.all_to_all(message, send, receive, counted)
        rows = torch.empty_like(got)
        rows[coming.argsort(stable=True)] = got
        source = moved
    return rows


def _counts(places: Tensor, size: int) -> list[int]:
    counts: list[int] = torch.bincount(places, minlength=size).tolist()
    return counts


def _common(one: Axes, two: Axes) -> Axes:
    """Return the axes that split both of two factors."""
    return tuple(a for a in one if a in two)


def _peer_ranges(size: int, axes: Axes, shared: Axes) -> list[Range]:
    """Return what each rank of `shared` holds of a dim that `axes` split, in their order."""
    every = itertools.product(*(range(a.size) if a in shared else (a.index,) for a in axes))
    return [range_at(size, axes, places) for places in every]


def _rank(places: Sequence[Any], axes: Axes) -> Any:
    """Number the ranks of `axes`, outermost first; places are numbers, or tensors of them."""
    rank: Any = 0
    for axis, place in zip(axes, places, strict=True):
        rank = rank * axis.size + place
    return rank


def owner_places(index: Tensor, size: int, axes: Axes) -> list[Tensor]:
    """Return on which rank of each axis the elements of a dim of `size` lie."""
    places, length = [], torch.full_like(index, size)
    for axis in axes:
        step = -((-length) // axis.size)
        place = index // step
        index, length = index - place * step, torch.minimum(step, length - place * step)
        places.append(place)
    return places


# Lookups ---------------------------------------------------------------------------------------


def split_index(
    table: Tensor,
    indices: Sequence[Tensor | None],
    *,
    split_v: Axes,
    size_v: int,
    split_i0: Axes = (),
    size_i0: int = 0,
) -> Tensor:
    """Look up `table[..., index]`, its looked-up dim v split, and perhaps the index's first too.

    Partial over the axes that split v alone.
    """
    ((dim, index),) = [(d, i) for d, i in enumerate(indices) if i is not None]
    index = torch.where(index < 0, index + size_v, index)
    rows, mine = table.movedim(dim, 0), my_range(size_v, split_v)
    if _common(split_v, split_i0):
        found = _fetched(rows, index, split_v, size_v, split_i0, size_i0)
    else:
        here = owned(index, mine, size_v)
        found = rows[torch.where(here, index - mine[0], 0)]
        found = found.masked_fill(~here.reshape(*here.shape, *[1] * (rows.ndim - 1)), 0)
    return found.movedim(tuple(range(index.ndim)), tuple(range(dim, dim + index.ndim)))


def split_index_select(
    table: Tensor,
    dim: int,
    index: Tensor,
    *,
    split_v: Axes,
    size_v: int,
    split_k: Axes = (),
    size_k: int = 0,
) -> Tensor:
    """Do what `split_index` does for one dim by number."""
    indices = [None] * (dim % table.ndim) + [index]
    sizes = {"size_v": size_v, "size_i0": size_k}
    return split_index(table, indices, split_v=split_v, split_i0=split_k, **sizes)


def split_index_add(
    table: Tensor,
    dim: int,
    index: Tensor,
    source: Tensor,
    alpha: float = 1,
    *,
    split_v: Axes,
    size_v: int,
    split_k: Axes = (),
    size_k: int = 0,
) -> Tensor:
    """Add rows to those of a table that the index names: their owners get them, and add them."""
    routes = _routes(index, split_v, size_v, split_k, size_k or len(index))
    given = source.movedim(dim, 0)[routes.place[routes.asker == routes.me]]
    got = exchange(given, routes.asker, routes.owner, routes.shared, routes.largest)
    rows = routes.row[routes.owner == routes.me]
    return table.index_add(dim, rows, got.movedim(0, dim), alpha=alpha)


@dataclass(frozen=True, slots=True)
class _Routes:
    """Every index that a rank of `shared` has for a row of this group: who asks, and who owns it.

    place   where it stands in its asker's index, flat
    row     the row in its owner's chunk, right where this rank is the owner
    """

    asker: Tensor
    owner: Tensor
    place: Tensor
    row: Tensor
    me: int
    shared: Axes
    largest: int


def _routes(index: Tensor, split_v: Axes, size_v: int, split_i: Axes, size_i: int) -> _Routes:
    """Return who needs which rows, known to all ranks that share both splits."""
    shared = _common(split_v, split_i)
    ranges, most = _peer_ranges(size_i, split_i, shared), _longest(size_i, split_i)
    width, low = math.prod(index.shape[1:]), my_range(size_v, split_v)[0]
    counts = [(b - a) * width for a, b in ranges]
    wanted = _gathered(index, shared, most, ranges).reshape(-1)
    places = owner_places(wanted, size_v, split_v)
    here = owned(wanted, (0, size_v), size_v)
    for axis, place in zip(split_v, places, strict=True):
        here = here if axis in shared else here & (place == axis.index)
    owner = [p for a, p in zip(split_v, places, strict=True) if a in shared]
    asker = _repeated(counts, wanted.device)
    place = torch.cat([torch.arange(n, device=wanted.device) for n in counts])
    return _Routes(
        asker=asker[here],
        owner=(_rank(owner, shared) if shared else asker)[here],
        place=place[here],
        row=wanted[here] - low,
        me=_rank([a.index for a in shared], shared),
        shared=shared,
        largest=most * width,
    )


def _fetched(
    rows: Tensor, index: Tensor, split_v: Axes, size_v: int, split_i: Axes, size_i: int
) -> Tensor:
    """Return the rows that this rank's indices name, zero where another group has them."""
    routes = _routes(index, split_v, size_v, split_i, size_i)
    given = rows[routes.row[routes.owner == routes.me]]
    got = exchange(given, routes.owner, routes.asker, routes.shared, routes.largest)
    found = got.new_zeros(index.numel(), *rows.shape[1:])
    found = found.index_copy(0, routes.place[routes.asker == routes.me], got)
    return found.reshape(*index.shape, *rows.shape[1:])


def _longest(size: int, axes: Axes) -> int:
    low, high = range_at(size, axes, [0] * len(axes))
    return high - low


def _repeated(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return each rank's number as often as it counts."""
    numbers = torch.arange(len(counts), device=device)
    return numbers.repeat_interleave(torch.tensor(counts, device=device))


def _gathered(x: Tensor, axes: Axes, most: int, ranges: Sequence[Range]) -> Tensor:
    """Return the rows of all ranks of `axes`, one rank's after the other."""
    wire = F.pad(x, (0, 0) * (x.ndim - 1) + (0, most - x.shape[0]))
    for axis in reversed(axes):
        wire = axis.all_gather(wire)
    blocks = wire.reshape(-1, most, *x.shape[1:]).unbind(0)
    return torch.cat([b[: high - low] for b, (low, high) in zip(blocks, ranges, strict=True)])


# Experts ---------------------------------------------------------------------------------------

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
ALIGNMENT_BYTES = 16
"""What aten's grouped product asks of the strides of its operands."""


def grouped_mm(
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    *,
    split_t: Axes = (),
    size_t: int = 0,
    split_e: Axes = (),
    size_e: int = 0,
    split_i: Axes = (),
    size_i: int = 0,
    split_o: Axes = (),
    size_o: int = 0,
) -> Tensor:
    """Multiply rows `"t i"` up to each of the offsets by their expert's `"e i o"`.

    Partial over the axes that split e alone, or i.
    """
    if not split_t and not split_e:
        return _aligned_product(x, weight, offs)
    return _routed(_aligned_product, x, weight, offs, split_t, size_t, split_e, size_e)


def grouped_mm_fallback(
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    *,
    split_t: Axes = (),
    size_t: int = 0,
    split_e: Axes = (),
    size_e: int = 0,
) -> Tensor:
    """Do what `grouped_mm` does by the op that transformers has for other precisions."""
    product = torch.ops.transformers.grouped_mm_fallback
    return _routed(product, x, weight, offs, split_t, size_t, split_e, size_e)


def _routed(
    product: Product,
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    split_t: Axes,
    size_t: int,
    split_e: Axes,
    size_e: int,
) -> Tensor:
    """Send rows to the ranks of their experts, multiply there, and send the products back.

    A size of zero is that of a dim that is whole here.
    """
    size_t, size_e = size_t or x.shape[0], size_e or weight.shape[0]
    shared = _common(split_t, split_e)
    ranges = _peer_ranges(size_t, split_t, shared)
    row = torch.cat([torch.arange(*r, device=x.device) for r in ranges])
    expert = torch.searchsorted(offs, row.to(offs.dtype), right=True)
    places = owner_places(expert.clamp(max=size_e - 1), size_e, split_e)
    here = expert < size_e
    for axis, place in zip(split_e, places, strict=True):
        here = here if axis in shared else here & (place == axis.index)
    source = _repeated([b - a for a, b in ranges], x.device)[here]
    owner = [p for a, p in zip(split_e, places, strict=True) if a in shared]
    target = _rank(owner, shared)[here] if shared else source
    me, most = _rank([a.index for a in shared], shared), _longest(size_t, split_t)
    own = row[here][source == me] - my_range(size_t, split_t)[0]
    got = exchange(x[own], source, target, shared, most)
    mine = expert[here][target == me] - my_range(size_e, split_e)[0]
    ends = torch.bincount(mine, minlength=weight.shape[0]).cumsum(0).to(offs.dtype)
    made = product(got, weight, ends) if len(got) else got @ weight[0]
    back = exchange(made, target, source, shared, most)
    return back.new_zeros(x.shape[0], weight.shape[-1]).index_copy(0, own, back)


def _aligned_product(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Fill rows and columns up to what the kernel can read, and cut the result."""
    step = ALIGNMENT_BYTES // x.itemsize
    i, o = (-n % step for n in weight.shape[1:])
    if i or o:
        x, weight = F.pad(x, (0, i)), F.pad(weight, (0, o, 0, i))
    out: Tensor = torch.ops.aten._grouped_mm(x, weight, offs)
    return out[:, : out.shape[1] - o] if o else out
