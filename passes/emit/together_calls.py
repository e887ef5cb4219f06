"""How the moves of a bucket are called: one call for all, and one before it that begins them.

row_begun = begin_replicate([w1, b1], row)                          # before all ops
row_gradients = invariant_to_replicate_together(row_begun, row)     # at the first reader
col_begun = begin_gather([w2], col, dims=[0], to="R")               # before the planned op
col_shards = all_gather_together(col_begun, col, dims=[0], to="R")  # at the first reader

Where each begins says what it runs beside (`passes.overlap`), and where its gradients are awaited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import fx

from autotp.passes.emit.emitter import Emitter, attribute
from autotp.plan import WHERE_MADE, Bucket
from autotp.together import (
    all_gather_together,
    begin_gather,
    begin_replicate,
    invariant_to_replicate_together,
)


def shared_call(
    e: Emitter, bucket: Bucket, sources: Sequence[fx.Node], arguments: Sequence[Mapping[str, Any]]
) -> fx.Node:
    """Return the node that makes all moves of a bucket, each given the arguments of its own."""
    is_gather = bucket.forward != "none"
    given: Any = list(sources)
    if bucket.begins == WHERE_MADE:
        with _where_made(e, sources):
            given = begin_call(e, bucket, sources, arguments)
    given = e.begun.get(bucket.moves[0], given)
    axis, kwargs = attribute(e, bucket.axis), _keywords(bucket, arguments) if is_gather else {}
    name = f"{bucket.axis}_{'shards' if is_gather else 'gradients'}"
    return e.graph.create_node("call_function", END[is_gather], (given, axis), kwargs, name=name)


def begin_call(
    e: Emitter, bucket: Bucket, sources: Sequence[fx.Node], arguments: Sequence[Mapping[str, Any]]
) -> fx.Node:
    """Return the node that begins a bucket."""
    is_gather = bucket.forward != "none"
    axis, kwargs = attribute(e, bucket.axis), _keywords(bucket, arguments) if is_gather else {}
    return e.graph.create_node(
        "call_function",
        BEGIN[is_gather],
        (list(sources), axis),
        kwargs,
        name=f"{bucket.axis}_begun",
    )


def _keywords(bucket: Bucket, arguments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"dims": [a["dim"] for a in arguments]}
    for many, one, none in (("parts", "parts", ()), ("sizes", "size", None)):
        if any(a[one] != none for a in arguments):
            kwargs[many] = [a[one] for a in arguments]
    ways = {"to": arguments[0]["to"], "by": bucket.by, "back_by": bucket.back_by}
    return {**kwargs, **{k: way for k, way in ways.items() if way}}


def _where_made(e: Emitter, sources: Sequence[fx.Node]) -> AbstractContextManager[Any]:
    """Return where in the graph sources are made: parameters before all ops."""
    made = [s for s in sources if s.op != "placeholder"]
    if made:
        return e.graph.inserting_after(made[-1])
    calls = (n for n in e.graph.nodes if n.op not in ("placeholder", "get_attr"))
    first = next((n for n in calls if n.target not in BEGIN), None)
    return e.graph.inserting_before(first) if first else nullcontext()


def source_of(node: fx.Node) -> fx.Node:
    """Return what a node that moves something moves, also as one of several."""
    source, *number = node.args
    if not is_shared(node):
        assert isinstance(source, fx.Node)
        return source
    given: Any = source.args[0]  # type: ignore[union-attr]
    given = given.args[0] if isinstance(given, fx.Node) else given
    found: fx.Node = given[number[0]]
    return found


def is_shared(node: fx.Node) -> bool:
    """Say whether a node is an item of what one call makes of several tensors."""
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and source.target in SHARED.values()


BEGIN = (begin_replicate, begin_gather)
END = (invariant_to_replicate_together, all_gather_together)
"""What begins a move of several tensors, and what makes or ends it: of wholes, and of shards."""

SHARED: dict[tuple[str, str], Any] = {("I", "R"): END[0], ("S", "R"): END[1], ("S", "I"): END[1]}
"""The function that makes several moves at once, by the types before and after."""
