"""Algorithms: what a collective may be made of where its plain one is not the fastest.

    gather      all_gather       exchange: an all-to-all of copies; ring: n-1 permutes
    scatter     reduce_scatter   exchange: an all-to-all and a local sum; all_reduce: of all, a part
    reduce      all_reduce       scatter_gather, scatter_exchange, scatter_ring: a reduce-scatter,
                                 and an all-gather, plain or by what is named
    all three                    nodes_of_m: over two levels, m ranks in each node, both plain
                                 (`autotp.cost_model.levels`)

They are written over the raw collectives of an axis (`autotp.axis`), which counts what is sent and
by which algorithm. Every rank gets the same bits of a sum: it is made once, or on all in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from autotp.cost_model.levels import members_of


class Raw(Protocol):
    """The raw collectives of an axis, as its backend runs them; what is begun returns its end."""

    size: int
    index: int

    def _count(self, kind: str, x: Tensor, size_bytes: int | None = None, by: str = "") -> None: ...

    def over_nodes(self, members: int, /) -> tuple[Raw, Raw]:
        """Return the axes inside a node of so many ranks, and between nodes."""
        ...

    def _begin_permute(
        self, x: Tensor, send: list[int], receive: list[int]
    ) -> Callable[[], Tensor]: ...

    def _all_gather(self, x: Tensor) -> Tensor: ...

    def _reduce_scatter(self, wire: Tensor) -> Tensor: ...

    def _all_reduce(self, x: Tensor, op: str) -> Tensor: ...

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor: ...


def gather(axis: Raw, x: Tensor, by: str = "") -> Tensor:
    """Return the wire of every rank's `x`."""
    if members := members_of(by):
        return _gather_over_nodes(axis, x, members)
    return GATHER[by](axis, x) if by else axis._all_gather(x)


def scatter(axis: Raw, wire: Tensor, by: str = "") -> Tensor:
    """Return the sum over ranks of the block that is addressed to this one."""
    if members := members_of(by):
        return _scatter_over_nodes(axis, wire, members)
    return SCATTER[by](axis, wire) if by else axis._reduce_scatter(wire)


def reduce(axis: Raw, x: Tensor, by: str = "") -> Tensor:
    """Return the sum over ranks of `x`."""
    if not by:
        return axis._all_reduce(x, "sum")
    count = x.numel()
    flat = pad(x.reshape(-1), (0, -count % axis.size))
    if members := members_of(by):
        whole = _reduce_over_nodes(axis, flat, members)
    else:
        part = axis._reduce_scatter(flat.reshape(axis.size, -1))
        whole = gather(axis, part, REDUCE[by])
    return whole.reshape(-1)[:count].reshape(x.shape)


def permuted(axis: Raw, x: Tensor, by: int) -> Tensor:
    """Send `x` to the rank that is `by` further on, round the end; return what came in.

    An all-to-all in which all but one message are empty.
    """
    return axis._all_to_all(x.reshape(-1), *_round(axis, x.numel(), by)).reshape(x.shape)


def _round(axis: Raw, count: int, by: int) -> tuple[list[int], list[int]]:
    """Return how many elements go to each rank, and come from each, round the ring."""
    send, receive = [0] * axis.size, [0] * axis.size
    send[(axis.index + by) % axis.size] = receive[(axis.index - by) % axis.size] = count
    return send, receive


def ring_gather(axis: Raw, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield every rank's `x` with its index, this rank's first; the next comes in meanwhile."""
    axis._count("all_gather", x, x.nbytes * axis.size, "ring")
    ends, block = _round(axis, x.numel(), 1), x
    for step in range(axis.size):
        is_last = step == axis.size - 1
        end = None if is_last else axis._begin_permute(block.reshape(-1), *ends)
        yield (axis.index - step) % axis.size, block
        if end is not None:
            block = end().reshape(x.shape)


def ring_scatter(axis: Raw, make: Callable[[int], Tensor]) -> Tensor:
    """Return the sum over ranks of `make(this rank's index)`; what others want is made on the way.

    A sum goes round and every rank adds its term to it, which it makes while the sum comes in.
    """
    total = make((axis.index - 1) % axis.size).contiguous()
    axis._count("reduce_scatter", total, total.nbytes * axis.size, "ring")
    ends = _round(axis, total.numel(), 1)
    for step in range(1, axis.size):
        end = axis._begin_permute(total.reshape(-1), *ends)
        term = make((axis.index - 1 - step) % axis.size)
        total = end().reshape(total.shape) + term
    return total


def _gather_by_exchange(axis: Raw, x: Tensor) -> Tensor:
    ones = [1] * axis.size
    return axis._all_to_all(x.expand(axis.size, *x.shape).contiguous(), ones, ones)


def _gather_by_ring(axis: Raw, x: Tensor) -> Tensor:
    blocks = [x]
    for _ in range(axis.size - 1):
        blocks.append(permuted(axis, blocks[-1], 1))
    return torch.stack([blocks[(axis.index - i) % axis.size] for i in range(axis.size)])


def scatter_by_exchange(axis: Raw, wire: Tensor) -> Tensor:
    """Exchange blocks and sum those that arrive: gloo's own sends twice the bytes."""
    ones = [1] * axis.size
    return axis._all_to_all(wire, ones, ones).sum(0, dtype=wire.dtype)


def _scatter_by_all_reduce(axis: Raw, wire: Tensor) -> Tensor:
    return axis._all_reduce(wire, "sum")[axis.index].clone()


# Two levels: index = node * members + place ------------------------------------------------------


def _gather_over_nodes(axis: Raw, x: Tensor, members: int) -> Tensor:
    """Gather between nodes, then inside: what comes is `"place node ..."`."""
    inside, between = axis.over_nodes(members)
    wire = inside._all_gather(between._all_gather(x))
    return wire.transpose(0, 1).reshape(axis.size, *x.shape)


def _scatter_over_nodes(axis: Raw, wire: Tensor, members: int) -> Tensor:
    """Sum inside nodes what is addressed to each place in any node, then between nodes."""
    inside, between = axis.over_nodes(members)
    by_place = wire.reshape(-1, members, *wire.shape[1:]).transpose(0, 1)
    return between._reduce_scatter(inside._reduce_scatter(by_place.contiguous()))


def _reduce_over_nodes(axis: Raw, flat: Tensor, members: int) -> Tensor:
    """Sum parts inside nodes, each part between nodes, and gather them inside."""
    inside, between = axis.over_nodes(members)
    part = inside._reduce_scatter(flat.reshape(members, -1))
    return inside._all_gather(between._all_reduce(part, "sum"))


GATHER: dict[str, Callable[[Raw, Tensor], Tensor]] = {
    "exchange": _gather_by_exchange,
    "ring": _gather_by_ring,
}
SCATTER: dict[str, Callable[[Raw, Tensor], Tensor]] = {
    "all_reduce": _scatter_by_all_reduce,
    "exchange": scatter_by_exchange,
}
REDUCE = {"scatter_exchange": "exchange", "scatter_gather": "", "scatter_ring": "ring"}
"""By which algorithm the sums are gathered."""
