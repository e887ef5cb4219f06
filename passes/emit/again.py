"""Give the program what backward makes again: recipes, and the calls that forget what they make.

gelu_again = Recipe([], False)                                    # how backward makes it again
gelu = recalled(aten.gelu.default, gelu_again, [], fc1)           # makes it, and keeps only fc1
fc2 = recalled(aten.linear.default, None, [gelu_again], gelu, w)  # forgets gelu

In: an emitted and verified program. Out: the same with the calls that the plan marks `again`, and
those whose backward needs what they make, wrapped in `autotp.recall`. What lies in a checkpoint
region is left to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from autotp.passes.capture.names import numbered
from autotp.passes.capture.regions import REGION, fold_regions
from autotp.passes.emit.together_calls import is_shared, source_of
from autotp.passes.kept import ALIASES, renames
from autotp.passes.network import Network, Op, is_getitem
from autotp.passes.pricing import RESULT, needed_positions, typing_of
from autotp.recall import Recipe, recalled

RECALLS = "recalls"
"""The key in the meta of a program that forgets what backward makes again."""

Recipes = tuple[fx.Node, ...]
"""Nodes that make recipes, in order."""


def runnable(module: fx.GraphModule, network: Network) -> fx.GraphModule:
    """Return an emitted and verified program as ranks run it, its regions folded."""
    return fold_regions(remember(module, network))


def remember(module: fx.GraphModule, network: Network) -> fx.GraphModule:
    """Return a program that backward helps itself to: what is marked `again` is not kept."""
    if not any(_is_again(node) for node in module.graph.nodes):
        return module
    root = {n.target: getattr(module, n.target) for n in module.graph.find_nodes(op="get_attr")}
    writer = _Writer(network, {call: node for call, node in _calls(module.graph)})
    for node in module.graph.nodes:
        writer.copy(node)
    root |= {str(node.target): function for function, node in writer.functions.items()}
    made = fx.GraphModule(root, writer.graph, class_name=type(module).__name__)
    made.meta = {**module.meta, RECALLS: True}
    return made


def _is_again(node: fx.Node) -> bool:
    """Say whether backward makes by itself what a node makes."""
    if REGION in node.meta or is_shared(node):
        return False
    found = node.meta.get("decision") or node.meta.get("move")
    return found is not None and bool(found.again)


def _calls(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the calls of ops with the nodes that stand for their results: the mean, if scaled."""
    for node in graph.nodes:
        op: Op | None = node.meta.get("op")
        if op is not None and REGION not in node.meta:
            averages = op.rule.average and op.rule.average(op.call)
            scaled = averages and node.target is torch.ops.aten.mul.Tensor
            yield (node.args[0] if scaled else node), node


@dataclass(slots=True)
class _Writer:
    """The program as far as it is written.

    results   the node of the result of each call of an op
    env       by node of the old program, that of the new; `makes` the recipes in whose results
              it lies
    sends     whether a recipe calls collectives
    functions those that are called through `recalled`
    """

    network: Network
    results: dict[fx.Node, fx.Node]
    graph: fx.Graph = field(default_factory=fx.Graph)
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)
    makes: dict[fx.Node, Recipes] = field(default_factory=dict)
    sends: dict[fx.Node, bool] = field(default_factory=dict)
    functions: dict[Any, fx.Node] = field(default_factory=dict)

    def copy(self, node: fx.Node) -> None:
        """Write one node, wrapped where it is made again, or needs what is."""
        recipe = self._recipe(node) if _is_again(node) else None
        needs = self._needed(node, recipe)
        self.makes[node] = self._within(node) if recipe is None else (recipe,)
        if recipe is None and not needs:
            self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
            return
        target = self._function(node.target)
        args = fx.map_arg(node.args, self.env.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.env.__getitem__)
        made = self.graph.create_node(
            "call_function",
            recalled,
            (target, recipe, list(needs), *args),
            kwargs,
            name=node.name,
        )
        made.meta = dict(node.meta)
        self.env[node] = made

    def _function(self, target: Any) -> Any:
        """Return how an op is named as an argument: fx prints no function but torch's own."""
        if isinstance(target, OpOverload):
            return target
        if target not in self.functions:
            names = numbered(target.__name__)
            taken = {str(n.target) for n in self.graph.find_nodes(op="get_attr")}
            name = next(n for n in names if n not in taken)
            self.functions[target] = self.graph.create_node("get_attr", name, name=name)
        return self.functions[target]

    def _recipe(self, node: fx.Node) -> fx.Node:
        """Write the recipe of what a node makes."""
        reads = self._of(node.all_input_nodes)
        sends = "move" in node.meta or any(self.sends[r] for r in reads)
        name = f"{node.name}_again"
        made = self.graph.create_node("call_function", Recipe, (list(reads), sends), name=name)
        self.sends[made] = sends
        return made

    def _needed(self, node: fx.Node, own: fx.Node | None) -> Recipes:
        """Return the recipes of what the backward of a call needs."""
        if node not in self.results:
            return ()
        op, operands = (self.results[node].meta[key] for key in ("op", "operands"))
        slots = needed_positions(op, typing_of(self.network, op))
        found = self._of(operands[k] for k in slots if k != RESULT)
        return (*found, own) if own is not None and RESULT in slots else found

    def _within(self, node: fx.Node) -> Recipes:
        """Return the recipes in whose results that of a node lies: it is a view, or the same."""
        op, move = node.meta.get("op"), node.meta.get("move")
        if move is not None:
            return self._of([source_of(node)]) if move.forward in ALIASES else ()
        is_same = is_getitem(node) or (op is not None and renames(op))
        return self._of(node.all_input_nodes) if is_same else ()

    def _of(self, nodes: Iterable[fx.Node]) -> Recipes:
        return tuple(dict.fromkeys(r for n in nodes for r in self.makes.get(n, ())))
