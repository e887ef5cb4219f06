"""Check an emitted program's types before it may run.

Every op's operand and result types must be, axis by axis, one of the four ways that its rule
allows; every collective must be the one that `autotp.layouts.MOVES` names for the change that it
makes. The check reads the graph, not the plan.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from autotp.cost_model.collectives import algorithms
from autotp.errors import LayoutError
from autotp.grid import Grid
from autotp.late import late
from autotp.layouts import MOVES, Layout, Move, is_valid, kind, layout_text, may_change
from autotp.passes.choices import AxisChoice, Typing, axis_choices
from autotp.passes.emit.fused import FUSED, as_multiplied, product_problems
from autotp.passes.emit.move_calls import TARGETS
from autotp.passes.emit.products import LATE, weight_of
from autotp.passes.emit.together_calls import BEGIN, END, SHARED, is_shared, source_of
from autotp.passes.factors import Factors
from autotp.passes.network import Network, Op


def verify(module: fx.GraphModule, network: Network, factors: Factors, grid: Grid) -> None:
    """Raise LayoutError, with every wrong node, unless the program is well typed."""
    legal: dict[str, list[AxisChoice]] = {}
    problems = []
    for node in module.graph.nodes:
        problems += _op_problems(node, network, factors, grid, legal)
        problems += _move_problems(node, network, grid)
        problems += _begin_problems(node)
        problems += _late_problems(node)
    if problems:
        raise LayoutError("the emitted program is not well typed", at=problems)


def _op_problems(
    node: fx.Node,
    network: Network,
    factors: Factors,
    grid: Grid,
    legal: dict[str, list[AxisChoice]],
) -> list[tuple[str, str]]:
    op: Op | None = node.meta.get("op")
    if op is None:
        return []
    results = node.meta.get("results") or (node.meta["layout"],)
    operands = tuple(n.meta["layout"] for n in node.meta["operands"])
    if node.target in FUSED:
        if wrong := product_problems(node, network, grid):
            return wrong
        operands, results = as_multiplied(node, operands, results, grid)
    if op.name not in legal:
        typing = Typing.of(
            [network.values[v] for v in op.operands], [network.values[v] for v in op.results]
        )
        legal[op.name] = axis_choices(op, typing, factors)
    problems = []
    for axis, name in enumerate(grid.names):
        types = (tuple(c[axis] for c in operands), tuple(c[axis] for c in results))
        if not any((c.operands, c.results) == types for c in legal[op.name]):
            left, right = (", ".join(map(str, t)) for t in types)
            problems.append((node.name, f"{op.call.op} on {name}: {left} -> {right} has no rule"))
    for value, layout in zip((*op.operands, *op.results), (*operands, *results), strict=True):
        problems += _validity(node, network.values[value].shape, layout, grid)
    return problems


def _validity(
    node: fx.Node, shape: tuple[int, ...], layout: Layout, grid: Grid
) -> list[tuple[str, str]]:
    if is_valid(shape, layout, grid):
        return []
    return [(node.name, f"{list(shape)} cannot be {layout_text(layout)} on {grid}")]


def _move_problems(node: fx.Node, network: Network, grid: Grid) -> list[tuple[str, str]]:
    if "move" not in node.meta:
        return []
    source, shared = source_of(node), is_shared(node)
    call: Any = node.args[0] if shared else node
    before, after = source.meta["layout"], node.meta["layout"]
    changed = [a for a in range(len(before)) if before[a] != after[a]]
    text = f"{layout_text(before)} to {layout_text(after)}"
    if len(changed) != 1:
        return [(node.name, f"{text} changes {len(changed)} axes at once")]
    (axis,) = changed
    if not may_change(before, axis, after[axis]):
        return [(node.name, f"{text}: another axis splits that dim further in")]
    targets = SHARED if shared else TARGETS
    if call.target is not targets.get((kind(before[axis]), kind(after[axis]))):
        return [(node.name, f"{text} is not what {call.target.__name__} does")]
    if call.args[1].name != grid.names[axis]:
        return [(node.name, f"{text} is a move of axis {grid.names[axis]}")]
    move = MOVES[kind(before[axis]), kind(after[axis])]
    return _algorithm_problems(node, call, move, grid.sizes[axis])


def _algorithm_problems(
    node: fx.Node, call: fx.Node, move: Move, ranks: int
) -> list[tuple[str, str]]:
    """Hold that a collective, and that of its gradient, have the algorithms that are named."""
    named = (move.forward, call.kwargs.get("by")), (move.backward, call.kwargs.get("back_by"))
    return [
        (node.name, f"{what} over {ranks} ranks cannot be made by {by!r}")
        for what, by in named
        if by is not None and by not in algorithms(what, ranks)
    ]


def _begin_problems(node: fx.Node) -> list[tuple[str, str]]:
    """Hold what is begun to be ended: nothing else may read a gradient that is on its way."""
    if node.target in BEGIN and len(node.users) != 1:
        return [(node.name, "what is begun has one reader")]
    given: Any = node.args[0] if node.args else None
    if not (isinstance(given, fx.Node) and given.target in BEGIN):
        return []
    if node.target is not END[BEGIN.index(given.target)]:
        return [(node.name, f"cannot read {given.name}: gradients on their way come to it")]
    if (given.args[1], given.kwargs) != (node.args[1], node.kwargs):
        return [(node.name, f"{given.name} began another move")]
    return []


def _late_problems(node: fx.Node) -> list[tuple[str, str]]:
    """Hold a weight whose gradient is computed late to be the weight of one product."""
    if node.target is not late:
        return []
    readers = [n for n in node.users if n.target in LATE.values() and weight_of(n) is node]
    if len(node.users) == len(readers) == 1:
        return []
    return [(node.name, "a weight whose gradient is late has one reader, a product")]
