"""What it takes that a product makes the move beside it: seconds beyond those of the product apart.

With n ranks, hops h of a block each, the product p in blocks of b (n of them, or of panels), o the
overlap of the cluster:

    ring     h (n-1) + b n - o (n-1) min(h, b) - p      each way; backward of a gather makes the
                                                        gradient that it scatters beside it, that
                                                        of a scatter both gradients
    panels   the collectives of each panel, one after the other, and those of what was gathered
             once more in backward

Blocks are products of their own, with their own narrowest dim, and what they make is put together:
written once more where it is a block of the result, added where it is a term of it. No ring takes
less than its hops less what the cluster hides of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from autotp.cost_model.compute import op_s
from autotp.layouts import Layout, Shard, largest_shape
from autotp.passes.moves import Moves
from autotp.passes.network import Network
from autotp.passes.pricing import RESULT
from autotp.passes.products import Pair, chunk_of, roles
from autotp.plan import Decision, PlannedMove
from autotp.products import panels_of

SIDES = {"x": "ti", "weight": "io", "result": "to"}
"""The dims of what a product reads and makes: t of its rows, i summed, o made."""


@dataclass(frozen=True, slots=True)
class Price:
    """The seconds of a move within a product, and of the product that it runs beside, each way."""

    seconds: float
    beside_s: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class _Case:
    """One product and one move of it, as numbers: equal ones have one price.

    sizes    of t, i and o on one rank, what is moved being whole
    moved    "x", "weight" or "result", and `factor` which of its dims moves
    kinds    the collectives forward and backward
    grads    whether x and the weight have gradients, the result has
    """

    sizes: tuple[int, int, int]
    moved: str
    factor: str
    kinds: tuple[str, str]
    grads: tuple[bool, bool, bool]
    in_order: bool
    panels: int
    size_bytes: int
    axis: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of products that make moves, each worked out once."""

    network: Network
    planned: Moves
    _known: dict[tuple[_Case, str], Price] = field(default_factory=dict)

    def __call__(self, pair: Pair, d: Decision, m: PlannedMove, how: str) -> Price:
        """Return the price of a pair by a schedule."""
        key = self.case(pair, d, m), how
        if key not in self._known:
            price = _ring if how == "ring" else _panels
            self._known[key] = price(key[0], self.planned)
        return self._known[key]

    def case(self, pair: Pair, d: Decision, m: PlannedMove) -> _Case:
        """Return all that the price of a pair depends on."""
        op, grid = self.network.ops[pair.op], self.planned.grid
        found = roles(op)
        assert found is not None
        x, weight, result = (
            self.network.values[v]
            for v in (op.operands[found.x], op.operands[found.weight], op.results[0])
        )
        rows = largest_shape(x.shape, d.operands[found.x], grid)
        made = largest_shape(result.shape, d.results[0], grid)
        axis = grid.axis(m.axis)
        layout = m.after if pair.slot == RESULT else m.before
        dim, last = _dim(layout, axis), len(x.shape) - 1
        if pair.slot == found.weight:
            moved, factor = "weight", ("oi" if found.transposed else "io")[dim]
        else:
            moved = "result" if pair.slot == RESULT else "x"
            factor = "t" if dim < last else SIDES[moved][1]
        return _Case(
            (math.prod(rows[:-1]), rows[-1], made[-1]),
            moved,
            factor,
            (m.forward, m.backward),
            (x.grad, weight.grad, result.grad),
            dim == 0,
            panels_of(chunk_of(self.network, m, self.planned)),
            m.size_bytes,
            axis,
            result.dtype,
        )


def gathers_again(pair: Pair, network: Network) -> bool:
    """Say whether backward needs what panels gathered: for the gradient of the other factor."""
    op = network.ops[pair.op]
    found = roles(op)
    assert found is not None
    if pair.slot == RESULT or not network.values[op.results[0]].grad:
        return False
    other = found.weight if pair.slot == found.x else found.x
    return network.values[op.operands[other]].grad


def _dim(layout: Layout, axis: int) -> int:
    t = layout[axis]
    assert isinstance(t, Shard)
    return t.dim


# Schedules ---------------------------------------------------------------------------------------


def _ring(c: _Case, planned: Moves) -> Price:
    ranks = planned.grid.sizes[c.axis]
    block_s, extra_s = _block(c, ranks, planned)
    seconds, beside = [], []
    for kind, products in zip(c.kinds, _products(c), strict=True):
        if kind == "none":
            seconds.append(0.0)
            beside.append(0.0)
            continue
        hops_s = planned.hops_s(kind, c.size_bytes, c.axis)
        beside_s = min(hops_s, products * block_s * (ranks - 1))
        beside.append(beside_s)
        seconds.append(hops_s - planned.cluster.overlap * beside_s + products * extra_s)
    put_s = sum(_put_s(c, side, ranks, planned) for side in _made(c))
    if c.moved != "result" and c.grads[2] and _other_grad(c):
        put_s += _pass_s(c.size_bytes * c.in_order, ranks, planned)  # what backward needs whole
    return Price(sum(seconds) + put_s, (beside[0], beside[1]))


def _panels(c: _Case, planned: Moves) -> Price:
    _, extra_s = _block(c, c.panels, planned)
    again = _gathers_again(c)
    kinds = [*c.kinds, *([c.kinds[0]] if again else [])]
    each_s = sum(planned.plain_s(k, c.size_bytes // c.panels, c.axis) for k in kinds)
    products = sum(n for n, k in zip(_products(c), c.kinds, strict=True) if k != "none") + again
    made = [*_made(c), *([_other(c)] if again else [])]
    put_s = sum(_put_s(c, side, c.panels, planned) for side in made)
    return Price(each_s * c.panels + products * extra_s + put_s)


def _products(c: _Case) -> tuple[int, int]:
    """Return how many products are made in blocks beside each way's exchange."""
    return 1, (1 if c.moved != "result" else sum(c.grads[:2]))


def _other(c: _Case) -> str:
    return "weight" if c.moved == "x" else "x"


def _other_grad(c: _Case) -> bool:
    return c.grads[1] if c.moved == "x" else c.grads[0]


def _gathers_again(c: _Case) -> bool:
    return c.moved != "result" and c.grads[2] and _other_grad(c)


def _made(c: _Case) -> Sequence[str]:
    """Return what is put together of blocks: what a gather makes of each, both ways."""
    if c.moved != "result":
        return ["result"]
    grads = zip(("x", "weight"), c.grads, strict=False)
    return [side for side, grad in grads if grad] if c.kinds[1] != "none" else []


def _block(c: _Case, count: int, planned: Moves) -> tuple[float, float]:
    """Return the seconds of one of `count` blocks, and those that all take beyond the whole."""
    t, i, o = (n / count if f == c.factor else n for f, n in zip("tio", c.sizes, strict=True))
    block_s, whole_s = _product_s((t, i, o), c, planned), _product_s(c.sizes, c, planned)
    return block_s, max(0.0, count * block_s - whole_s)


def _product_s(sizes: Sequence[float], c: _Case, planned: Moves) -> float:
    t, i, o = sizes
    moved = (t * i + i * o + t * o) * c.dtype.itemsize
    narrow = max(1, int(min(sizes))) if planned.cluster.narrow_flops_per_s else None
    return float(op_s(2 * t * i * o, moved, c.dtype, planned.cluster, narrowest=narrow))


def _put_s(c: _Case, side: str, count: int, planned: Moves) -> float:
    """Return the seconds of putting `side` together: of blocks, or of terms of a sum."""
    sizes = dict(zip("tio", c.sizes, strict=True))
    size_bytes = math.prod(sizes[f] for f in SIDES[side]) * c.dtype.itemsize
    if c.factor in SIDES[side]:
        return _pass_s(size_bytes, count, planned)
    return _pass_s((count - 1) * size_bytes * 3 / 2, count - 1, planned)


def _pass_s(size_bytes: float, calls: int, planned: Moves) -> float:
    """Return the seconds of reading and writing bytes once, in so many calls."""
    cluster = planned.cluster
    return 2 * size_bytes / cluster.memory_bandwidth_bytes_per_s + calls * cluster.op_overhead_s
