"""Moves of several parameters by one collective, over one buffer; their gradients too.

    invariant_to_replicate_together   I -> R of each: nothing; backward one all-reduce
    all_gather_together               S -> R or I of each: one all-gather; backward one
                                        reduce-scatter, or slices
    await_gradients                   parameters as they are; backward waits for their gradients

Where parameters come from `await_gradients`, the all-reduce is only started when the gradients of
a bucket are there; what is still on its way goes back to that call and nowhere else
(`passes.emit.verify` holds it). It stands before all ops: autograd runs last what was called first,
so that it waits when the rest of backward is done, and whoever reads a gradient, a hook or an
optimizer, reads it complete. Where gradients are differentiated again, looked at by anomaly
detection, or traced by torch.compile, nothing is started early.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autotp.axis import Axis
from autotp.collectives import (
    Parts,
    Place,
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
)
from autotp.liveness import caller

Gradients = Sequence[Tensor | None]
"""Those that backward has: what does not reach the result has none."""


class Awaited(list[Tensor]):
    """Parameters whose gradients `await_gradients` waits for."""


# The calls of emitted programs -------------------------------------------------------------------


def invariant_to_replicate_together(xs: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """I -> R of each: nothing; backward one all-reduce of all, only started if `xs` await it."""
    if axis.size == 1:
        return list(xs)
    later = isinstance(xs, Awaited) and not torch.compiler.is_compiling()
    return _differentiably(xs, _ToReplicate, axis, later, _place())


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
    shards = [
        (dim, tuple(blocks), x.shape[dim] * axis.size if size is None else size)
        for x, dim, blocks, size in zip(
            xs, dims, parts or [()] * len(xs), sizes or [None] * len(xs), strict=True
        )
    ]
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in xs)):
        return _gather(xs, axis, shards, by)
    ways = (by, back_by)
    return list(_Gather.apply(axis, shards, to, ways, _place(), *xs))  # type: ignore[no-untyped-call]


def await_gradients(xs: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Return parameters as they are; backward waits until their gradients have come over `axis`."""
    if axis.size == 1 or torch.compiler.is_compiling():
        return list(xs)
    return Awaited(_differentiably(xs, _Await, axis, _place()))


def _differentiably(
    xs: Sequence[Tensor], function: type[torch.autograd.Function], *where: Any
) -> list[Tensor]:
    """Return what a function makes of those that are trained, and the others as they are."""
    trained = [x for x in xs if x.requires_grad] if torch.is_grad_enabled() else []
    if not trained:
        return list(xs)
    moved = iter(function.apply(*where, *trained))  # type: ignore[no-untyped-call]
    return [next(moved) if x.requires_grad else x for x in xs]


def _place() -> Place:
    """Return the line of the emitted program that calls what asks: for errors of its backward."""
    return None if torch.compiler.is_compiling() else caller(2)


# Their backward ----------------------------------------------------------------------------------


class _ToReplicate(torch.autograd.Function):
    """Hand parameters on; sum their gradients over the ranks of an axis."""

    @staticmethod
    def forward(ctx: Any, axis: Axis, later: bool, place: Place, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.later, ctx.place = axis, later, place
        ctx.set_materialize_grads(False)
        return xs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        axis: Axis = ctx.axis
        if torch.is_grad_enabled():  # to be differentiated again: one by one
            return None, None, None, *_each(grads, lambda g: all_reduce(g, axis, to="I"))
        later = ctx.later and not torch.is_anomaly_enabled()
        return None, None, None, *_some(grads, lambda given: _all_reduce(given, axis, later))


class _Await(torch.autograd.Function):
    """Hand parameters on; wait for their gradients."""

    @staticmethod
    def forward(ctx: Any, axis: Axis, place: Place, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.place = axis, place
        ctx.set_materialize_grads(False)
        return xs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return None, None, *_each(grads, ctx.axis.landed)


class _Gather(torch.autograd.Function):
    """Gather shards; scatter the sums of their gradients, or slice them."""

    @staticmethod
    def forward(
        ctx: Any,
        axis: Axis,
        shards: Sequence[Split],
        to: WholeType,
        ways: Ways,
        place: Place,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.axis, ctx.shards, ctx.to, ctx.ways, ctx.place = axis, shards, to, ways, place
        ctx.set_materialize_grads(False)
        made = _gather(xs, axis, shards, ways[0])
        frozen = zip(made, ctx.needs_input_grad[-len(xs) :], strict=True)
        ctx.mark_non_differentiable(*(y for y, needed in frozen if not needed))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        axis: Axis = ctx.axis
        needed = ctx.needs_input_grad[-len(grads) :]
        present = [g if need else None for g, need in zip(grads, needed, strict=True)]
        shards = [s for s, g in zip(ctx.shards, present, strict=True) if g is not None]
        if ctx.to == "I":
            back = [_slice(g, axis, *s) for g, s in zip(_given(present), shards, strict=True)]
        elif torch.is_grad_enabled():  # to be differentiated again: one by one
            pairs = zip(_given(present), shards, strict=True)
            by = ctx.ways[::-1]
            back = [reduce_scatter(g, axis, dim, parts, *by) for g, (dim, parts, _) in pairs]
        else:
            back = _reduce_scatter(_given(present), axis, shards, ctx.ways[1])
        return None, None, None, None, None, *_some(present, lambda _: back)


def _given(grads: Gradients) -> list[Tensor]:
    return [g for g in grads if g is not None]


def _some(grads: Gradients, change: Callable[[list[Tensor]], Sequence[Tensor]]) -> Gradients:
    """Change all gradients that there are at once; the others stay none."""
    given = _given(grads)
    changed = iter(change(given) if given else ())
    return [None if g is None else next(changed) for g in grads]


def _each(grads: Gradients, change: Callable[[Tensor], Tensor]) -> Gradients:
    """Change each gradient that there is."""
    return [None if g is None else change(g) for g in grads]


# The kernels: one buffer for all -----------------------------------------------------------------


def _all_reduce(xs: Sequence[Tensor], axis: Axis, later: bool) -> list[Tensor]:
    """Return the sums over ranks; with `later` they are complete once `axis.landed` returns."""
    shapes = [x.shape for x in xs]
    buffer = xs[0].new_empty(sum(x.numel() for x in xs))
    for place, x in zip(_apart(buffer, shapes), xs, strict=True):
        place.copy_(x)
    out = axis.start_all_reduce(buffer)
    return _apart(out if later else axis.landed(out), shapes)


def _gather(xs: Sequence[Tensor], axis: Axis, shards: Sequence[Split], by: str) -> list[Tensor]:
    filled = [
        _fill(x, dim, -(-size // axis.size)) for x, (dim, _, size) in zip(xs, shards, strict=True)
    ]
    wire = axis.all_gather(torch.cat([x.reshape(-1) for x in filled]), by)
    wires = torch.split(wire, [x.numel() for x in filled], 1)
    return [
        _from_wire(w.reshape(axis.size, *x.shape), *shard)
        for w, x, shard in zip(wires, filled, shards, strict=True)
    ]


def _reduce_scatter(
    xs: Sequence[Tensor], axis: Axis, shards: Sequence[Split], by: str
) -> list[Tensor]:
    wires = [
        _to_wire(x, dim, parts, axis.size) for x, (dim, parts, _) in zip(xs, shards, strict=True)
    ]
    out = axis.reduce_scatter(torch.cat([w.reshape(axis.size, -1) for w in wires], 1), by)
    pieces = _apart(out, [w.shape[1:] for w in wires])
    return [
        _cut(piece, dim, _local_size(size, axis))
        for piece, (dim, _, size) in zip(pieces, shards, strict=True)
    ]


def _apart(buffer: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = torch.split(buffer, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
