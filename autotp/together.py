"""Moves of several tensors by one collective, over one buffer; begun early and ended late.

    invariant_to_replicate_together   I -> R of each: nothing; backward one all-reduce
    all_gather_together               S -> R or I of each: one all-gather; backward one
                                        reduce-scatter, or slices
    begin_replicate, begin_gather     the same moves, only begun: what they return is given to the
                                        move, which ends it

What stands between the two calls runs while the collective is on its way: forward, and backward
too, where autograd comes to the move first and to what began it last. So an all-gather is begun
before other ops in the program, and gradients are awaited after those ops' backward: at the end of
all where the first call stands before all ops. Gradients on their way go back from the move to what
began it and nowhere else (`passes.emit.verify` holds it); who reads them after that, a hook or an
optimizer, reads them complete. Where gradients are differentiated again, looked at by anomaly
detection, or traced by torch.compile, nothing is begun early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp.axis import Axis
from autotp.collectives import (
    Parts,
    Split,
    Ways,
    WholeType,
    _cut,
    _fill,
    _from_wire,
    _local_size,
    _slice,
    _to_wire,
    all_reduce,
    reduce_scatter,
    slice_to_shard,
)
from autotp.liveness import caller

Gradients = Sequence[Tensor | None]
"""Those that backward has: what does not reach the result has none."""
Landing = Callable[[], Sequence[Tensor]]
"""Waits for tensors that are on their way."""


class Begun(list[Tensor]):
    """Tensors whose move is begun; `flight` is where it is."""

    def __init__(self, xs: Sequence[Tensor], flight: Flight) -> None:
        super().__init__(xs)
        self.flight = flight


# The calls of emitted programs -------------------------------------------------------------------


def invariant_to_replicate_together(xs: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """I -> R of each: nothing; backward one all-reduce of all."""
    if axis.size == 1:
        return list(xs)
    return _ended(xs, lambda: _ToReplicate(axis))


def begin_replicate(xs: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Begin I -> R: nothing; backward waits here for the gradients."""
    return _begun(xs, _ToReplicate(axis))


def all_gather_together(
    xs: Sequence[Tensor],
    axis: Axis,
    dims: Sequence[int],
    parts: Sequence[Parts] = (),
    sizes: Sequence[int | None] = (),
    to: WholeType = "R",
    by: str = "",
    back_by: str = "",
) -> list[Tensor]:
    """S -> R (backward one reduce-scatter) or S -> I (backward slices) of each.

    `parts` and `sizes` are those of `all_gather`, where any of the tensors has some; so are the
    algorithms.
    """
    if axis.size == 1:
        return list(xs)
    ways = by, back_by
    return _ended(xs, lambda: _Gather(axis, _splits(xs, axis, dims, parts, sizes), to, ways))


def begin_gather(
    xs: Sequence[Tensor],
    axis: Axis,
    dims: Sequence[int],
    parts: Sequence[Parts] = (),
    sizes: Sequence[int | None] = (),
    to: WholeType = "R",
    by: str = "",
    back_by: str = "",
) -> list[Tensor]:
    """Begin S -> R or I: the all-gather is on its way; backward waits here for the gradients."""
    return _begun(xs, _Gather(axis, _splits(xs, axis, dims, parts, sizes), to, (by, back_by)))


def _splits(
    xs: Sequence[Tensor],
    axis: Axis,
    dims: Sequence[int],
    parts: Sequence[Parts],
    sizes: Sequence[int | None],
) -> list[Split]:
    blocks, lengths = parts or [()] * len(xs), sizes or [None] * len(xs)
    return [
        (dim, tuple(some), x.shape[dim] * axis.size if size is None else size)
        for x, dim, some, size in zip(xs, dims, blocks, lengths, strict=True)
    ]


def _begun(xs: Sequence[Tensor], kind: Kind) -> list[Tensor]:
    if kind.axis.size == 1 or torch.compiler.is_compiling():
        return list(xs)
    flight = Flight(kind, is_early=True)
    flight.depart(xs)
    return Begun(_through(_Begin, flight, xs, xs), flight)


def _ended(xs: Sequence[Tensor], kind: Callable[[], Kind]) -> list[Tensor]:
    flight = xs.flight if isinstance(xs, Begun) else Flight(kind())
    return _through(_End, flight, xs, flight.land(xs))


def _through(
    function: type[torch.autograd.Function],
    flight: Flight,
    xs: Sequence[Tensor],
    made: Sequence[Tensor],
) -> list[Tensor]:
    """Return what was made of each of `xs`, so that the gradients of those trained find back."""
    trained = [k for k, x in enumerate(xs) if x.requires_grad] if torch.is_grad_enabled() else []
    if not trained:
        return list(made)
    place = None if torch.compiler.is_compiling() else caller(3)
    results, given = [made[k] for k in trained], [xs[k] for k in trained]
    out = function.apply(flight, trained, place, results, *given)  # type: ignore[no-untyped-call]
    found = dict(zip(trained, out, strict=True))
    return [found.get(k, y) for k, y in enumerate(made)]


# The way there and back --------------------------------------------------------------------------


@dataclass(slots=True)
class Flight:
    """One move on its way: what forward began of it, and what backward began.

    is_early   says that what began it stands before it, and awaits the gradients
    """

    kind: Kind
    is_early: bool = False
    ahead: Landing | None = None
    back: Landing | None = None

    def depart(self, xs: Sequence[Tensor]) -> None:
        """Begin the move."""
        with torch.no_grad():
            self.ahead = self.kind.begin(xs)

    def land(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """End the move, which may not have begun; what it does not change are `xs` themselves."""
        if self.ahead is None:
            self.depart(xs)
        ahead, self.ahead = self.ahead, None
        with torch.no_grad():
            return ahead() if ahead else xs


class _Begin(torch.autograd.Function):
    """Hand tensors on to where their move ends; wait for their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        flight: Flight,
        numbers: list[int],
        place: tuple[str, int] | None,
        made: list[Tensor],
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.flight, ctx.place = flight, place
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        flight: Flight = ctx.flight
        back, flight.back = flight.back, None
        return None, None, None, None, *(grads if back is None else _filled(grads, back()))


class _End(torch.autograd.Function):
    """Hand on what the move made; begin the dual move of its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        flight: Flight,
        numbers: list[int],
        place: tuple[str, int] | None,
        made: list[Tensor],
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.flight, ctx.numbers, ctx.place = flight, numbers, place
        ctx.shapes = [x.shape for x in xs]
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        flight: Flight = ctx.flight
        present = {k: g for k, g in zip(ctx.numbers, grads, strict=True) if g is not None}
        if not present:
            return None, None, None, None, *grads
        if torch.is_grad_enabled():  # to be differentiated again: one by one
            back = [flight.kind.back_one(k, g) for k, g in present.items()]
        else:
            landing = flight.kind.begin_back(present)
            if flight.is_early and not torch.is_anomaly_enabled():
                flight.back = landing
                blank = next(iter(present.values())).new_full((), torch.nan)
                pairs = zip(ctx.shapes, grads, strict=True)
                back = [blank.expand(shape) for shape, g in pairs if g is not None]
            else:
                back = list(landing())
        return None, None, None, None, *_filled(grads, back)


def _filled(grads: Gradients, found: Sequence[Tensor]) -> Gradients:
    """Return what was found in place of the gradients that there are."""
    each = iter(found)
    return [None if g is None else next(each) for g in grads]


# The moves: one buffer for all -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ToReplicate:
    """I -> R."""

    axis: Axis

    def begin(self, xs: Sequence[Tensor]) -> None:
        """Forward has nothing to send."""

    def begin_back(self, grads: Mapping[int, Tensor]) -> Landing:
        """Begin the sums of gradients over ranks."""
        shapes = [g.shape for g in grads.values()]
        flat = [g.reshape(-1) for g in grads.values()]
        buffer = torch.cat(flat) if len(flat) > 1 else flat[0].clone()
        finish = self.axis.begin("all_reduce", buffer)
        return lambda: _apart(finish(), shapes)

    def back_one(self, number: int, grad: Tensor) -> Tensor:
        """Return one gradient moved so that it may be differentiated again."""
        return all_reduce(grad, self.axis, to="I")


@dataclass(frozen=True, slots=True)
class _Gather:
    """S -> R or I; `shards` say how each tensor is split, `ways` by which algorithms it moves."""

    axis: Axis
    shards: Sequence[Split]
    to: WholeType
    ways: Ways

    def begin(self, xs: Sequence[Tensor]) -> Landing:
        n = self.axis.size
        filled = [
            _fill(x, dim, -(-size // n)) for x, (dim, _, size) in zip(xs, self.shards, strict=True)
        ]
        flat = [x.reshape(-1) for x in filled]
        whole = torch.cat(flat) if len(flat) > 1 else flat[0]
        finish = self.axis.begin("all_gather", whole, self.ways[0])
        shapes = [x.shape for x in filled]

        def land() -> list[Tensor]:
            wires = torch.split(finish(), [shape.numel() for shape in shapes], 1)
            return [
                _from_wire(w.reshape(n, *shape), *shard)
                for w, shape, shard in zip(wires, shapes, self.shards, strict=True)
            ]

        return land

    def begin_back(self, grads: Mapping[int, Tensor]) -> Landing:
        """Begin the sums of gradients over ranks, scattered; or take the parts of equal ones."""
        axis, shards = self.axis, [self.shards[k] for k in grads]
        if self.to == "I":
            parts = [_slice(g, axis, *s) for g, s in zip(grads.values(), shards, strict=True)]
            return lambda: parts
        wires = [
            _to_wire(g, dim, blocks, axis.size)
            for g, (dim, blocks, _) in zip(grads.values(), shards, strict=True)
        ]
        flat = [w.reshape(axis.size, -1) for w in wires]
        wire = torch.cat(flat, 1) if len(flat) > 1 else flat[0]
        finish = axis.begin("reduce_scatter", wire, self.ways[1])
        shapes = [w.shape[1:] for w in wires]

        def land() -> list[Tensor]:
            pieces = _apart(finish(), shapes)
            return [
                _cut(piece, dim, _local_size(size, axis))
                for piece, (dim, _, size) in zip(pieces, shards, strict=True)
            ]

        return land

    def back_one(self, number: int, grad: Tensor) -> Tensor:
        """Return one gradient moved so that it may be differentiated again."""
        axis, (dim, parts, _size) = self.axis, self.shards[number]
        if self.to == "I":
            return slice_to_shard(grad, axis, dim, parts)
        return reduce_scatter(grad, axis, dim, parts, *self.ways[::-1])


Kind = _ToReplicate | _Gather


def _apart(buffer: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = torch.split(buffer.reshape(-1), [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
