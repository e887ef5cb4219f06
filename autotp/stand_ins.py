"""Tensors in place of values that are not there: one rank's parameters, buffers and inputs.

In: a Program captured without weights, a Plan, a rank. Out: the arguments of the rank's graph on a
device, of its local shapes. What has values keeps them. Integers that look rows up stay below the
number of rows, as far as they only pass through views on the way; others are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from autotp.grid import Coords
from autotp.layouts import local_size
from autotp.passes.program import Program
from autotp.plan import Plan, Resting

PARAMETER_STD = 0.02
"""Of the normal distribution that parameters are drawn from: small enough that all stays finite."""

LOOKUPS = {
    "embedding": 0,
    "cross_entropy_loss": 1,
    "nll_loss": 1,
    "nll_loss_nd": 1,
    "nll_loss_forward": 1,
}
"""Ops whose second operand numbers what lies along a dim of the first, and which dim."""

RENAMES = frozenset(
    {
        "alias", "clone", "constant_pad_nd", "contiguous", "detach", "expand", "flatten", "narrow",
        "pad", "permute", "reshape", "roll", "select", "slice", "squeeze", "_to_copy", "to",
        "transpose", "unsqueeze", "view",
    }
)  # fmt: skip
"""Ops that keep the integers that they are given."""


def arguments(
    program: Program,
    plan: Plan,
    coords: Coords,
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the value of every placeholder of a rank's graph, by its node's name.

    `state` holds buffers by name; parameters are of local shapes, whatever the model holds.
    """
    bounds = index_bounds(program)
    given = dict(zip(program.inputs, inputs, strict=True))
    for node in program.graph.nodes:
        if node.op != "placeholder":
            return
        name = node.name
        if name in program.params:
            yield name, parameter(plan.params[program.params[name]], plan, coords, device)
        elif name in given:
            value = given[name]
            filled = stand_in(value, device, bounds.get(name, 1))
            yield name, filled.requires_grad_(value.requires_grad)
        else:
            fqn = program.buffers.get(name)
            yield name, stand_in(state[fqn] if fqn else program.constants[name], device)


def parameter(resting: Resting, plan: Plan, coords: Coords, device: torch.device) -> Tensor:
    """Return a rank's piece of a parameter, at random, as a leaf."""
    grid, layout = plan.grid, resting.layout
    shape = [local_size(n, layout, d, grid, coords) for d, n in enumerate(resting.shape)]
    made = torch.empty(shape, dtype=getattr(torch, resting.dtype), device=device)
    if made.is_floating_point() or made.is_complex():
        made.normal_(0.0, PARAMETER_STD)
    else:
        made.zero_()
    return made.requires_grad_(resting.trained)


def stand_in(value: Tensor, device: torch.device, bound: int = 1) -> Tensor:
    """Return a tensor on `device`: the value, else ones, or integers below `bound`."""
    if not value.is_meta:
        return value.detach().to(device, copy=True)
    made = torch.ones(value.shape, dtype=value.dtype, device=device)
    if made.is_floating_point() or made.is_complex() or made.dtype == torch.bool:
        return made
    return made.random_(0, bound)


def index_bounds(program: Program) -> dict[str, int]:
    """Return below what the integers of inputs must stay, for those that look rows up."""
    bounds: dict[str, int] = {}
    for node in program.graph.nodes:
        if (dim := LOOKUPS.get(_packet(node))) is None:
            continue
        table = node.args[0].meta["val"]
        rows = int(table.shape[min(dim, table.ndim - 1)])
        origin, renamed = _origin(node.args[1])
        for name in [origin.name] if renamed else [n.name for n in _sources(origin)]:
            bounds[name] = min(bounds.get(name, rows), rows if renamed else 1)
    return {name: n for name, n in bounds.items() if name in program.inputs}


def _packet(node: fx.Node) -> str:
    """Return the name of a node's op, without its overload."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema else ""


def _origin(node: fx.Node) -> tuple[fx.Node, bool]:
    """Return what a node shows through views, and whether that is an argument of the graph."""
    while _packet(node) in RENAMES:
        node = node.all_input_nodes[0]
    return node, node.op == "placeholder"


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return the arguments of the graph that a node is computed from."""
    seen, left = {node}, [node]
    while left:
        new = [n for n in left.pop().all_input_nodes if n not in seen]
        seen.update(new)
        left += new
    return [n for n in seen if n.op == "placeholder"]


def retarget(module: fx.GraphModule, device: torch.device) -> None:
    """Let a graph make its tensors on `device`, wherever it was captured."""
    for node in module.graph.nodes:
        node.args, node.kwargs = (
            map_aggregate(a, lambda x: device if isinstance(x, torch.device) else x)
            for a in (node.args, node.kwargs)
        )
    module.recompile()
