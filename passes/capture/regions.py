"""Regions under torch.utils.checkpoint: marked when captured, folded into submodules when emitted.

    marked_regions   while torch.export runs, each call of checkpoint leaves a mark at both its ends
    read_regions     give the nodes between two marks the number of their region; drop the marks
    name_regions     name each region after the innermost module that all of it lies in
    fold_regions     an emitted program whose regions are submodules, run by autotp.recompute

torch.export itself drops checkpoint in silence: it keeps what the function computes, and only that.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as torch_checkpoint

from autotp.errors import CaptureError
from autotp.passes.capture.names import module_path, numbered
from autotp.recompute import run_region

REGION = "region"
"""The key of a node's meta under which the region it lies in stands."""
CALLS = ("call_function", "call_method")

WITHOUT_REENTRANT = "_checkpoint_without_reentrant_generator"
"""What torch.utils.checkpoint runs around a function whose backward is not reentrant."""

torch.library.define("autotp::mark", "(int region, bool enters) -> ()")
MARK = torch.ops.autotp.mark.default
torch.fx.node.has_side_effect(MARK)
torch.library.register_fake("autotp::mark", lambda region, enters: None)


@torch.library.impl("autotp::mark", "CompositeExplicitAutograd")
def _mark(region: int, enters: bool) -> None:
    """Stand between the ops of a graph."""


# While torch.export runs -------------------------------------------------------------------------


@dataclass(slots=True)
class _Marker:
    """Stands in for both ways in which torch.utils.checkpoint runs a function."""

    line: Callable[[], str]
    count: int = 0
    inside: bool = False

    @contextmanager
    def region(self, context_fn: Any = None) -> Iterator[None]:
        """Mark what is traced within."""
        if context_fn not in (None, torch_checkpoint.noop_context_fn):
            raise CaptureError(
                "selective checkpointing cannot be honoured",
                at=[(self.line(), "checkpoint with a context_fn")],
                remedy="checkpoint without context_fn: all of the region is recomputed",
            )
        if self.inside:
            raise CaptureError(
                "a checkpoint region within another cannot be honoured",
                at=[(self.line(), "checkpoint within checkpoint")],
                remedy="checkpoint the outer or the inner function, not both",
            )
        self.count += 1
        number, self.inside = self.count, True
        MARK(number, True)
        try:
            yield
            MARK(number, False)
        finally:
            self.inside = False

    def without_reentrant(
        self, fn: Any, preserve: bool = True, context_fn: Any = None, *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        """Stand in for what checkpoint does around the function."""
        with self.region(context_fn):
            yield

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Stand in for the autograd function of checkpoint(..., use_reentrant=True)."""
        with self.region():
            out = function(*args)
        if not any_grad(args) and any_grad(out):
            raise CaptureError(
                "a reentrant checkpoint of inputs without gradient loses its parameters' gradients",
                at=[(self.line(), "checkpoint(..., use_reentrant=True)")],
                remedy="use_reentrant=False",
            )
        return out


def any_grad(values: Any) -> bool:
    """Say whether a tensor among `values` requires gradient."""
    return any(isinstance(v, Tensor) and v.requires_grad for v in pytree.tree_leaves(values))


@contextmanager
def marked_regions(line: Callable[[], str]) -> Iterator[None]:
    """Mark the calls of torch.utils.checkpoint.checkpoint; `line` says where the user's code is."""
    marker = _Marker(line)
    patch = mock.patch.object
    with (
        patch(
            torch_checkpoint, "_checkpoint_without_reentrant_generator", marker.without_reentrant
        ),
        patch(torch_checkpoint, "CheckpointFunction", marker),
    ):
        yield


# In the captured graph ---------------------------------------------------------------------------


def read_regions(graph: fx.Graph) -> None:
    """Note in the meta of each node the region in which it lies, and erase the marks."""
    region = None
    for node in list(graph.nodes):
        if node.target is MARK:
            region = node.args[0] if node.args[1] else None
            graph.erase_node(node)
        elif region is not None:
            node.meta[REGION] = region


def members_of(calls: Sequence[fx.Node]) -> dict[Any, Sequence[fx.Node]]:
    """Return region -> its nodes, with the sizes and blanks that were put in between them."""
    marked = [(k, n.meta[REGION]) for k, n in enumerate(calls) if REGION in n.meta]
    last = {region: k for k, region in marked}
    first = {region: k for k, region in reversed(marked)}
    return {r: calls[first[r] : last[r] + 1] for r in sorted(first, key=first.__getitem__)}


def name_regions(graph: fx.Graph, mutations: Mapping[str, str]) -> dict[str, str]:
    """Return node -> name of its region; `mutations` are the nodes that buffers are written from.

    Raises: CaptureError for a region that writes buffers: the original writes them twice.
    """
    members = members_of([node for node in graph.nodes if node.op in CALLS])
    names: dict[int, str] = {}
    for region, nodes in members.items():
        path = shared_path([module_path(node) for node in nodes]) or "region"
        names[region] = next(n for n in numbered(path) if n not in names.values())
    found = {node.name: names[region] for region, nodes in members.items() for node in nodes}
    at = [(found[node], f"writes {buffer}") for node, buffer in mutations.items() if node in found]
    if at:
        raise CaptureError(
            "a checkpoint region writes buffers: the original writes them again when it recomputes",
            at=at,
            remedy="keep what writes buffers (BatchNorm in training, counters) out of the region",
        )
    return found


def shared_path(paths: Sequence[str]) -> str:
    """Return the longest dotted path that all of `paths` begin with.

    >>> shared_path(["h.0.ln", "h.0.mlp.fc"])
    'h.0'
    """
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in itertools.takewhile(lambda n: len(set(n)) == 1, levels))


# In the emitted graph ----------------------------------------------------------------------------


def note_region(graph: fx.Graph, last: fx.Node | None, region: str) -> None:
    """Note the region of what was emitted after `last`; attributes are read before all ops."""
    for made in itertools.takewhile(lambda made: made is not last, reversed(graph.nodes)):
        if made.op in CALLS:
            made.meta[REGION] = region


def fold_regions(module: fx.GraphModule) -> fx.GraphModule:
    """Return an emitted program with each of its regions as a submodule that backward recomputes.

    Raises: CaptureError for a region that something outside cuts in two.
    """
    if not any(REGION in node.meta for node in module.graph.nodes):
        return module
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    root = {n.target: getattr(module, n.target) for n in module.graph.find_nodes(op="get_attr")}
    members = members_of([n for n in module.graph.nodes if n.op in CALLS])
    regions = {node: region for region, nodes in members.items() for node in nodes}
    for region, group in itertools.groupby(list(module.graph.nodes), regions.get):
        if region is None:
            for node in group:
                env[node] = graph.node_copy(node, env.__getitem__)
            continue
        name = f"checkpoint_{region.replace('.', '_')}"
        if name in root:
            raise CaptureError(
                "a checkpoint region is cut in two",
                at=[(region, "what lies outside of it runs between its ops")],
                remedy="checkpoint a function of one block of code",
            )
        nodes = list(group)
        read, made, attributes = _ends(nodes)
        root[name] = _body(nodes, read, made, {str(n.target): root[n.target] for n in attributes})
        rng = next((env[n] for n in attributes if n.target == "rng"), None)
        call = graph.call_function(
            run_region, (graph.get_attr(name), rng, *(env[n] for n in read)), name=name
        )
        for k, node in enumerate(made):
            env[node] = graph.call_function(operator.getitem, (call, k))
            env[node].meta = dict(node.meta)
    folded = fx.GraphModule(root, graph, class_name=type(module).__name__)
    folded.meta = dict(module.meta)
    return folded


def _ends(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
    """Return what a region reads from outside, what outside reads of it, and its attributes."""
    own = set(nodes)
    given = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in own)
    read = [n for n in given if n.op != "get_attr"]
    made = [n for n in nodes if not own.issuperset(n.users)]
    return read, made, [n for n in given if n.op == "get_attr"]


def _body(
    nodes: Sequence[fx.Node],
    read: Sequence[fx.Node],
    made: Sequence[fx.Node],
    attributes: Mapping[str, Any],
) -> fx.GraphModule:
    """Return a region as a module from what it reads to what it makes."""
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in read}
    by_name = {name: graph.get_attr(name) for name in attributes}

    def inside(node: fx.Node) -> fx.Node:
        return by_name[str(node.target)] if node.op == "get_attr" else env[node]

    for node in nodes:
        env[node] = graph.node_copy(node, inside)
    graph.output(tuple(env[node] for node in made))
    return fx.GraphModule(dict(attributes), graph)
