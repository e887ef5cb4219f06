"""Collectives: every move of `autotp.layouts.MOVES` as a differentiable function of a local tensor.

Each function names its move and fixes its backward: the dual kernel under the same arguments. The
emitted graphs call these functions by name. `dim` is the tensor's, `axis` the grid's; `parts` are
the sizes of the blocks of `dim` as they are when this axis is gathered (none means one block), and
`size` is the gathered length of `dim`, needed only where the ranks hold different lengths. `by` is
the algorithm of the collective, `back_by` that of its gradient's, where not the plain ones.
Uneven chunks are padded to the largest on the wire and cut after it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from autotp.axis import Axis
from autotp.layouts import Range, chunk
from autotp.liveness import caller

Parts = tuple[int, ...]
Kernel = Callable[..., Tensor]
Where = tuple[Any, ...]
Ways = tuple[str, str]
"""The algorithms forward and backward; "" is the plain one."""
Place = tuple[str, int] | None
"""The line of the emitted program that asked for the move: for errors of its backward."""
WholeType = Literal["R", "I"]


class _Move(torch.autograd.Function):
    """Run a linear kernel forward and its dual backward, both on the same arguments."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: Kernel, dual: Kernel, where: Where, ways: Ways, place: Place
    ) -> Tensor:
        ctx.kernel, ctx.dual, ctx.where, ctx.ways, ctx.place = kernel, dual, where, ways, place
        return kernel(x, *where, ways[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        back = _move(grad, ctx.dual, ctx.kernel, ctx.where, ctx.ways[::-1])
        return back, None, None, None, None, None


def _move(x: Tensor, kernel: Kernel, dual: Kernel, where: Where, ways: Ways = ("", "")) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        place = None if torch.compiler.is_compiling() else caller(2)
        out: Tensor = _Move.apply(x, kernel, dual, where, ways, place)  # type: ignore[no-untyped-call]
        return out
    return kernel(x, *where, ways[0])


# The moves -------------------------------------------------------------------------------------


def all_gather(
    x: Tensor,
    axis: Axis,
    dim: int,
    parts: Parts = (),
    size: int | None = None,
    to: WholeType = "R",
    by: str = "",
    back_by: str = "",
) -> Tensor:
    """S -> R (backward reduce-scatter) or S -> I (backward slice)."""
    if axis.size == 1:
        return x
    where = (axis, dim, parts, x.shape[dim] * axis.size if size is None else size)
    return _move(x, _gather, _reduce_scatter if to == "R" else _slice, where, (by, back_by))


def reduce_scatter(
    x: Tensor, axis: Axis, dim: int, parts: Parts = (), by: str = "", back_by: str = ""
) -> Tensor:
    """P -> S; backward all-gather."""
    if axis.size == 1:
        return x
    where = (axis, dim, parts, x.shape[dim])
    return _move(x, _reduce_scatter, _gather, where, (by, back_by))


def all_reduce(
    x: Tensor, axis: Axis, to: WholeType = "R", by: str = "", back_by: str = ""
) -> Tensor:
    """P -> R (backward all-reduce) or P -> I (backward nothing)."""
    if axis.size == 1:
        return x
    return _move(x, _all_reduce, _all_reduce if to == "R" else _nothing, (axis,), (by, back_by))


def invariant_to_replicate(x: Tensor, axis: Axis, back_by: str = "") -> Tensor:
    """I -> R: nothing; backward all-reduce."""
    return x if axis.size == 1 else _move(x, _nothing, _all_reduce, (axis,), ("", back_by))


def replicate_to_invariant(x: Tensor, axis: Axis) -> Tensor:
    """R -> I: nothing; backward keep_one."""
    return x if axis.size == 1 else _move(x, _nothing, _keep_one, (axis,))


def slice_to_shard(
    x: Tensor,
    axis: Axis,
    dim: int,
    parts: Parts = (),
    source: WholeType = "I",
    back_by: str = "",
) -> Tensor:
    """I -> S (backward all-gather) or R -> S (backward pad)."""
    if axis.size == 1:
        return x
    where = (axis, dim, parts, x.shape[dim])
    return _move(x, _slice, _gather if source == "I" else _pad, where, ("", back_by))


def keep_one(x: Tensor, axis: Axis, source: WholeType = "I") -> Tensor:
    """I -> P (backward nothing) or R -> P (backward keep_one): index 0 keeps, the others zero."""
    if axis.index == 0:
        return x
    return _blanked(x) if source == "I" else _move(x, _keep_one, _keep_one, (axis,))


def pad_to_partial(
    x: Tensor, axis: Axis, dim: int, parts: Parts = (), size: int | None = None
) -> Tensor:
    """S -> P: zeros around this rank's chunk; backward slice."""
    if axis.size == 1:
        return x
    where = (axis, dim, parts, x.shape[dim] * axis.size if size is None else size)
    return _move(x, _pad, _slice, where)


def all_to_all(
    x: Tensor,
    axis: Axis,
    split_dim: int,
    concat_dim: int,
    split_parts: Parts = (),
    concat_parts: Parts = (),
    concat_size: int | None = None,
) -> Tensor:
    """S(concat_dim) -> S(split_dim), also of one dim with other parts; backward all-to-all.

    `concat_size` is the gathered length of `concat_dim`, needed where it is uneven.
    """
    if axis.size == 1:
        return x
    gathered = x.shape[concat_dim] * axis.size if concat_size is None else concat_size
    split_size = gathered if split_dim == concat_dim else x.shape[split_dim]
    old, new = (concat_dim, concat_parts, gathered), (split_dim, split_parts, split_size)
    return _move(x, _all_to_all, _all_to_all_back, (axis, old, new))


# The kernels: each takes what its dual takes ---------------------------------------------------

Split = tuple[int, Parts, int]
"""The dim, the parts and the gathered size of a shard."""


def _nothing(x: Tensor, axis: Axis, by: str = "") -> Tensor:
    return x


def _all_reduce(x: Tensor, axis: Axis, by: str = "") -> Tensor:
    return axis.all_reduce(x, by=by)


def _keep_one(x: Tensor, axis: Axis, by: str = "") -> Tensor:
    return x if axis.index == 0 else torch.zeros_like(x)


def _blanked(x: Tensor) -> Tensor:
    """Return zeros in place of `x`, which gets their gradient: that of a copy, blank or not."""
    out = x.clone()
    out.detach().zero_()
    return out


def _gather(x: Tensor, axis: Axis, dim: int, parts: Parts, size: int, by: str = "") -> Tensor:
    wire = axis.all_gather(_fill(x, dim, -(-size // axis.size)), by)
    return _from_wire(wire, dim, parts, size)


def _reduce_scatter(
    x: Tensor, axis: Axis, dim: int, parts: Parts, size: int, by: str = ""
) -> Tensor:
    out = axis.reduce_scatter(_to_wire(x, dim, parts, axis.size), by)
    return _cut(out, dim, _local_size(size, axis))


def _slice(x: Tensor, axis: Axis, dim: int, parts: Parts, size: int, by: str = "") -> Tensor:
    blocks = [x.narrow(dim, a, b - a) for a, b in _ranges(parts or (size,), axis.size, axis.index)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim)


def _pad(x: Tensor, axis: Axis, dim: int, parts: Parts, size: int, by: str = "") -> Tensor:
    out = x.new_zeros((*x.shape[:dim], size, *x.shape[dim + 1 :]))
    taken = 0
    for low, high in _ranges(parts or (size,), axis.size, axis.index):
        out.narrow(dim, low, high - low).copy_(x.narrow(dim, taken, high - low))
        taken += high - low
    return out


def _all_to_all(x: Tensor, axis: Axis, old: Split, new: Split, by: str = "") -> Tensor:
    (concat_dim, concat_parts, concat_size), (split_dim, split_parts, split_size) = old, new
    if concat_dim == split_dim:
        return _reblock(x, axis, concat_dim, concat_parts or (concat_size,), split_parts)
    filled = _fill(x, concat_dim, -(-concat_size // axis.size))
    wire = axis.all_to_all(_to_wire(filled, split_dim, split_parts, axis.size))
    out = _from_wire(wire, concat_dim, concat_parts, concat_size)
    return _cut(out, split_dim, _local_size(split_size, axis))


def _all_to_all_back(x: Tensor, axis: Axis, old: Split, new: Split, by: str = "") -> Tensor:
    return _all_to_all(x, axis, new, old)


# Chunks and wires ------------------------------------------------------------------------------


def _local_size(size: int, axis: Axis) -> int:
    """Return the length of this rank's chunk; blocks are even, so it holds for them too."""
    low, high = chunk(size, axis.size, axis.index)
    return high - low


def _ranges(parts: Parts, ranks: int, index: int) -> list[Range]:
    """Return the ranges of the gathered dim that rank `index` holds, one in each part."""
    out, start = [], 0
    for part in parts:
        low, high = chunk(part, ranks, index)
        out.append((start + low, start + high))
        start += part
    return out


def _fill(x: Tensor, dim: int, length: int) -> Tensor:
    """Return `x` with zeros after it, so that `dim` has `length`."""
    missing = length - x.shape[dim]
    return x if missing == 0 else pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))


def _cut(x: Tensor, dim: int, length: int) -> Tensor:
    return x if x.shape[dim] == length else x.narrow(dim, 0, length)


def _to_wire(x: Tensor, dim: int, parts: Parts, ranks: int) -> Tensor:
    """Return the chunk of every rank side by side: `"... (k n c) ... -> n ... (k c) ..."`."""
    if len(set(parts)) > 1:
        ranges = [r for i in range(ranks) for r in _ranges(parts, ranks, i)]
        x, parts = torch.cat([x.narrow(dim, a, b - a) for a, b in ranges], dim), ()
    blocks, shape = len(parts) or 1, x.shape
    length = -(-shape[dim] // (ranks * blocks))
    lead, tail = shape[:dim], shape[dim + 1 :]
    x = _fill(x, dim, length * ranks * blocks)
    if blocks == 1:
        return x.reshape(*lead, ranks, length, *tail).movedim(dim, 0)
    by_block = x.reshape(*lead, blocks, ranks, length, *tail).movedim(dim + 1, 0)
    return by_block.flatten(dim + 1, dim + 2)


def _from_wire(wire: Tensor, dim: int, parts: Parts, size: int) -> Tensor:
    """Undo `_to_wire`, and leave out what filled uneven chunks up."""
    ranks, *shape = wire.shape
    if len(set(parts)) > 1:
        lengths = [p // ranks for p in parts]
        by_rank = [torch.split(row, lengths, dim) for row in wire.unbind(0)]
        return torch.cat([block for blocks in zip(*by_rank, strict=True) for block in blocks], dim)
    if ranks * shape[dim] != size:
        ends = [chunk(size, ranks, i) for i in range(ranks)]
        filled = zip(wire.unbind(0), ends, strict=True)
        return torch.cat([row.narrow(dim, 0, b - a) for row, (a, b) in filled], dim)
    if len(parts) < 2:
        return wire.movedim(0, dim).flatten(dim, dim + 1)
    block = shape[dim] // len(parts)
    by_block = wire.reshape(ranks, *shape[:dim], len(parts), block, *shape[dim + 1 :])
    return by_block.movedim(0, dim + 1).flatten(dim, dim + 2)


# One dim, other parts --------------------------------------------------------------------------


def _reblock(x: Tensor, axis: Axis, dim: int, old: Parts, new: Parts) -> Tensor:
    """Return this rank's chunk of each of `new` parts, from its chunk of each of `old` parts."""
    new = new or (sum(old),)
    outgoing = [_overlaps(old, new, axis.size, axis.index, j) for j in range(axis.size)]
    incoming = [_overlaps(old, new, axis.size, i, axis.index) for i in range(axis.size)]
    rows = x.movedim(dim, 0)
    starts = [(piece[1], piece[3]) for pieces in outgoing for piece in pieces]
    message = torch.cat([rows.narrow(0, at, length) for at, length in starts])
    got = axis.all_to_all(message, _lengths(outgoing), _lengths(incoming))
    received, start = [], 0
    for pieces in incoming:
        for _, _, to, length in pieces:
            received.append((to, got.narrow(0, start, length)))
            start += length
    ordered = [piece for _, piece in sorted(received, key=lambda r: r[0])]
    return torch.cat(ordered).movedim(0, dim).contiguous()


Overlap = tuple[int, int, int, int]
"""Where it is in the gathered dim, at the sender and at the receiver, and its length."""


@lru_cache(maxsize=1024)
def _overlaps(old: Parts, new: Parts, ranks: int, source: int, target: int) -> tuple[Overlap, ...]:
    """Return the runs of the gathered dim that `source` holds in `old` and `target` in `new`."""
    out, here = [], 0
    for low, high in _ranges(old, ranks, source):
        there = 0
        for a, b in _ranges(new, ranks, target):
            first, last = max(low, a), min(high, b)
            if first < last:
                out.append((first, here + first - low, there + first - a, last - first))
            there += b - a
        here += high - low
    return tuple(out)


def _lengths(peers: list[tuple[Overlap, ...]]) -> list[int]:
    return [sum(piece[3] for piece in pieces) for pieces in peers]
