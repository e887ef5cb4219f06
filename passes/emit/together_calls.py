"""How the moves of a bucket are called: one call for all, and where it is `later` one that waits.

row_awaited = await_gradients([w1, b1], row)                              # before all ops
row_gradients = invariant_to_replicate_together(row_awaited, row, True)   # at the first reader
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import fx

from autotp.plan import Bucket
from autotp.together import (
    all_gather_together,
    await_gradients,
    invariant_to_replicate_together,
)


def shared_call(
    graph: fx.Graph,
    bucket: Bucket,
    sources: Sequence[fx.Node],
    axis: fx.Node,
    arguments: Sequence[Mapping[str, Any]],
) -> fx.Node:
    """Return the node that makes all moves of a bucket, each given the arguments of its own."""
    if bucket.forward == "none":
        given: Any = list(sources)
        if bucket.later:
            given = _awaited(graph, bucket, sources, axis)
        return graph.create_node(
            "call_function",
            invariant_to_replicate_together,
            (given, axis),
            name=f"{bucket.axis}_gradients",
        )
    kwargs: dict[str, Any] = {"dims": [a["dim"] for a in arguments]}
    for many, one, none in (("parts", "parts", ()), ("sizes", "size", None)):
        if any(a[one] != none for a in arguments):
            kwargs[many] = [a[one] for a in arguments]
    kwargs["to"] = arguments[0]["to"]
    kwargs |= {k: way for k, way in (("by", bucket.by), ("back_by", bucket.back_by)) if way}
    return graph.create_node(
        "call_function",
        all_gather_together,
        (list(sources), axis),
        kwargs,
        name=f"{bucket.axis}_shards",
    )


def _awaited(graph: fx.Graph, bucket: Bucket, sources: Sequence[fx.Node], axis: fx.Node) -> fx.Node:
    """Return the parameters of a bucket as they are, from before all ops but those of its kind."""
    calls = (n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    first = next((n for n in calls if n.target is not await_gradients), None)
    args, name = (list(sources), axis), f"{bucket.axis}_awaited"
    with graph.inserting_before(first) if first else nullcontext():
        return graph.create_node("call_function", await_gradients, args, name=name)


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
    """Say whether a node is an item of what one call makes of several parameters."""
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and source.target in SHARED.values()


SHARED: dict[tuple[str, str], Any] = {
    ("I", "R"): invariant_to_replicate_together,
    ("S", "R"): all_gather_together,
    ("S", "I"): all_gather_together,
}
"""The function that makes several moves at once, by the types before and after."""
