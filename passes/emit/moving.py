"""Moves in an emitted program: each value is brought to a layout once, parameters together."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from autotp.layouts import AxisType, Layout, Shard, kind
from autotp.passes.emit.emitter import Emitter, attribute, node_name
from autotp.passes.emit.move_calls import TARGETS, move_args
from autotp.passes.emit.together_calls import begin_call, shared_call
from autotp.plan import Bucket, PlannedMove


def fetch(e: Emitter, value: str, layout: Layout) -> fx.Node:
    """Return the node that holds `value` in `layout`, moving it there once."""
    if (value, layout) not in e.nodes:
        if value in e.hubs and layout != e.hubs[value]:
            fetch(e, value, e.hubs[value])
        for move in _route(e, value, layout):
            if (value, move.after) in e.buckets and (value, move.after) not in e.nodes:
                _emit_bucket(e, e.buckets[value, move.after])
            if (value, move.after) not in e.nodes:
                source = e.nodes[value, move.before]
                made = _emit_move(e, move, source)
                made.meta.update(layout=move.after, value=value, move=move)
                e.nodes[value, move.after] = made
    return e.nodes[value, layout]


def needed(e: Emitter, value: str, layout: Layout) -> Iterator[fx.Node]:
    """Yield the nodes that are there already of what fetching a value reads."""
    if (value, layout) in e.nodes:
        yield e.nodes[value, layout]
        return
    if value in e.hubs and layout != e.hubs[value]:
        yield from needed(e, value, e.hubs[value])
    for move in _route(e, value, layout):
        if (value, move.before) in e.nodes:
            yield e.nodes[value, move.before]
        bucket = e.buckets.get((value, move.after))
        if bucket is not None and bucket.moves[0] in e.begun:
            yield e.begun[bucket.moves[0]]
        elif bucket is not None:
            for other in (e.plan.moves[n] for n in bucket.moves if e.plan.moves[n] != move):
                yield from needed(e, other.value, other.before)


def _route(e: Emitter, value: str, layout: Layout) -> list[PlannedMove]:
    """Return the planned moves that lead from a layout that is there to `layout`."""
    back = {m.after: m for m in reversed(e.moves.get(value, []))}
    route: list[PlannedMove] = []
    at = layout
    while (value, at) not in e.nodes:
        assert at in back, (value, layout)
        route.append(back[at])
        at = back[at].before
    return route[::-1]


def _emit_move(e: Emitter, move: PlannedMove, source: fx.Node) -> fx.Node:
    axis = e.grid.axis(move.axis)
    before, after = move.before[axis], move.after[axis]
    args = move_args(move, e.network.values[move.value].shape, e.grid, e.coords)
    target = TARGETS[kind(before), kind(after)]
    kwargs = {k: e.sizes.write(v) for k, v in args.items() if v not in ((), None)}
    kwargs |= {k: way for k, way in (("by", move.by), ("back_by", move.back_by)) if way}
    return e.graph.create_node(
        "call_function",
        target,
        (source, attribute(e, move.axis)),
        kwargs,
        name=_move_name(e, move),
    )


def _move_name(e: Emitter, move: PlannedMove) -> str:
    axis = e.grid.axis(move.axis)
    ends = f"{_label(move.before[axis])}_to_{_label(move.after[axis])}"
    return f"{node_name(_value_label(e, move.value))}_{ends}"


def begin_before(e: Emitter, op: str) -> None:
    """Begin the buckets that begin before an op, and have not ended yet."""
    for bucket in e.begins.get(op, ()):
        first = e.plan.moves[bucket.moves[0]]
        if (first.value, first.after) not in e.nodes:
            e.begun[bucket.moves[0]] = begin_call(e, bucket, *_moved(e, bucket))


def drop_unread(e: Emitter) -> None:
    """Take out what was begun for ops that were left out: nobody ends it, on any rank."""
    for node in e.begun.values():
        if not node.users:
            e.graph.erase_node(node)


def _moved(e: Emitter, bucket: Bucket) -> tuple[list[fx.Node], list[dict[str, Any]]]:
    """Return what the moves of a bucket move, and the arguments of each."""
    moves = [e.plan.moves[n] for n in bucket.moves]
    sources = [fetch(e, m.value, m.before) for m in moves]
    return sources, [move_args(m, e.network.values[m.value].shape, e.grid, e.coords) for m in moves]


def _emit_bucket(e: Emitter, bucket: Bucket) -> None:
    """Make all moves of a bucket by one call."""
    call = shared_call(e, bucket, *_moved(e, bucket))
    for k, move in enumerate(e.plan.moves[n] for n in bucket.moves):
        made = e.graph.create_node(
            "call_function", operator.getitem, (call, k), name=_move_name(e, move)
        )
        made.meta.update(layout=move.after, value=move.value, move=move)
        e.nodes[move.value, move.after] = made


def enter_region(e: Emitter, region: str | None) -> None:
    """Make the buckets of what a checkpoint region reads before it: others share them."""
    if region is None or region in e.entered:
        return
    e.entered.add(region)
    for op, decision in zip(e.network.ops, e.plan.decisions, strict=True):
        if e.program.regions.get(op.name) == region:
            for move in (m for v in decision.reads for m in e.moves.get(v, [])):
                key = move.value, move.after
                if key in e.buckets and key not in e.nodes:
                    _emit_bucket(e, e.buckets[key])


def _label(t: AxisType) -> str:
    return f"S{t.dim}" if isinstance(t, Shard) else str(t)


def _value_label(e: Emitter, value: str) -> str:
    node, _, k = value.partition(".")
    return e.program.params.get(node, e.program.names.get(node, node)) + (f"_{k}" if k else "")
