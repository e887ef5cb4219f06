"""The names that plans use for the nodes of a captured graph: module paths, then path and op.

In each module the one node that reads its parameters has the module's path for its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import fx
from torch._ops import OpOverload

aten = torch.ops.aten

PRODUCTS = {
    "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "convolution", "embedding",
    "embedding_bag", "layer_norm", "linear", "matmul", "mm",
}  # fmt: skip
"""Ops that give a module its bare name though other ops of it read parameters as well."""
PASS_THROUGH = {
    aten.detach.default, aten.expand.default, aten.reshape.default, aten.t.default,
    aten.to.dtype, aten.transpose.int,
}  # fmt: skip
"""Ops through which a parameter still counts as read directly."""


def plan_names(graph: fx.Graph, owners: dict[str, str]) -> dict[str, str]:
    """Return fx node -> plan name: owners' names, then module paths, then path and op.

    In each module the one node that reads its parameters has the module's path for its name.
    """
    bare = bare_nodes(graph, owners)
    names: dict[str, str] = {}
    taken: set[str] = set()
    nodes = sorted(graph.nodes, key=lambda node: (node.op != "placeholder", node not in bare))
    for node in nodes:
        path = module_path(node)
        if node.op == "placeholder":
            wish = owners.get(node.name, node.name)
        else:
            wish = path if node in bare and path else f"{path}.{op_name(node)}".lstrip(".")
        names[node.name] = next(n for n in numbered(wish) if n not in taken)
        taken.add(names[node.name])
    return {node.name: names[node.name] for node in graph.nodes}


def numbered(name: str) -> Iterator[str]:
    """Yield `name`, then `name_1`, `name_2`, and so on."""
    yield name
    number = 0
    while True:
        number += 1
        yield f"{name}_{number}"


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that made `node`; the root's is empty."""
    stack = node.meta.get("nn_module_stack")
    path: str = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"@\d+", "", path)


def op_name(node: fx.Node) -> str:
    """Return the short name of the op of `node`."""
    target = node.target
    if isinstance(target, OpOverload):
        return target._schema.name.split("::")[-1].strip("_")
    return getattr(target, "__name__", str(target))


def bare_nodes(graph: fx.Graph, owners: dict[str, str]) -> set[fx.Node]:
    """Return the nodes that take their module's path for a name."""
    weights: set[fx.Node] = set()
    readers: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            weights |= {node} if node.name.startswith("p_") and node.name in owners else set()
        elif not weights.isdisjoint(node.all_input_nodes):
            if node.target in PASS_THROUGH:
                weights.add(node)
            elif node.op == "call_function":
                readers.setdefault(module_path(node), []).append(node)
    products = {p: [n for n in nodes if op_name(n) in PRODUCTS] for p, nodes in readers.items()}
    chosen = {path: nodes if len(nodes) == 1 else products[path] for path, nodes in readers.items()}
    return {nodes[0] for nodes in chosen.values() if len(nodes) == 1}
