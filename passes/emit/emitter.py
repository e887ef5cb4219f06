"""What is known while the program of one rank is emitted, and what each of its nodes is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from autotp.grid import Coords, Grid
from autotp.layouts import I, Layout
from autotp.passes.capture.size_nodes import SizeWriter
from autotp.passes.emit.sites import Sites
from autotp.passes.network import Network
from autotp.passes.program import Program
from autotp.plan import Bucket, Plan, PlannedMove

Key = tuple[str, Layout]
"""A value as it lies in one layout."""


@dataclass(slots=True)
class Emitter:
    """The program of one rank as far as it is emitted.

    nodes      what holds a value in a layout; `made` is the layout in which each was made
    moves      of each value, the planned ones; `buckets` those that share a call, by what they make
    hubs       the layout that the readers of a value share
    entered    the checkpoint regions that were begun
    begins     the buckets that begin before an op, by its plan name
    begun      the buckets that have begun, by the first of their moves
    """

    program: Program
    network: Network
    plan: Plan
    coords: Coords
    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[Key, fx.Node] = field(default_factory=dict)
    attributes: dict[str, fx.Node] = field(default_factory=dict)
    moves: dict[str, list[PlannedMove]] = field(default_factory=dict)
    buckets: dict[Key, Bucket] = field(default_factory=dict)
    entered: set[str] = field(default_factory=set)
    begins: dict[str, list[Bucket]] = field(default_factory=dict)
    begun: dict[int, fx.Node] = field(default_factory=dict)
    hubs: Mapping[str, Layout] = field(default_factory=dict)
    made: dict[str, Layout] = field(default_factory=dict)
    sites: Sites = field(init=False)
    sizes: SizeWriter = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = SizeWriter(
            self.graph,
            self.program.varying,
            lambda name: self.nodes[name, self.whole],
            lambda name: attribute(self, name),
        )

    @property
    def grid(self) -> Grid:
        """The grid of the plan."""
        return self.plan.grid

    @property
    def whole(self) -> Layout:
        """The layout of what every rank holds whole."""
        return (I,) * len(self.grid.sizes)


def note(e: Emitter, value: str, layout: Layout, made: fx.Node, origin: fx.Node) -> None:
    """Note that `made` holds a value in a layout, and where in the user's code it comes from."""
    e.nodes[value, layout] = made
    e.made[value] = layout
    made.meta["layout"] = layout
    made.meta["value"] = value
    for key in ("stack_trace", "nn_module_stack"):
        if key in origin.meta:
            made.meta[key] = origin.meta[key]


def attribute(e: Emitter, name: str) -> fx.Node:
    """Return the node that reads an axis, or the random state, placed before all ops."""
    if name not in e.attributes:
        last = [n for n in e.graph.nodes if n.op in ("placeholder", "get_attr")][-1]
        with e.graph.inserting_after(last):
            e.attributes[name] = e.graph.create_node("get_attr", name, name=name)
    return e.attributes[name]


def node_name(name: str) -> str:
    """Return the name of a node for a module path."""
    return name.replace(".", "_") or "root"
